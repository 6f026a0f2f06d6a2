"""swap on modules of torchvision, timm and transformers: on classes of the same path, modules and
forward, and on transformers' own where it is installed."""

import copy
import pickle
import sys
from types import SimpleNamespace

import foreign
import processes
import pytest
import torch
from foreign import BLOCKS, Net, block
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

import dlkernels
from dlkernels import explain, report, swap, swapped, unswap, verify

# The identity, a projection, and a projection with a stride.
SHAPES = {
    "identity": {},
    "projects": {"projects": True},
    "strides": {"projects": True, "stride": 2},
}


@pytest.fixture(autouse=True)
def _installed(request, monkeypatch):
    """What pickle imports, but for tests of the real packages."""
    if "real" not in request.fixturenames:
        for name, module in foreign.MODULES.items():
            monkeypatch.setitem(sys.modules, name, module)


def drawn(name, dtype=torch.float64, rows=2, **more):
    """A block with statistics of its own, and an input."""
    module, channels = block(name, **more)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.3)
            nn.init.normal_(norm.running_mean, std=0.3)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
    x = torch.randn(rows, channels, 9, 10, dtype=dtype, requires_grad=True)
    return module.to(dtype), x


def evaluate(module, x, d=None):
    y = module(x)
    d = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape) if d is None else d
    return [y, *torch.autograd.grad(y, [x, *module.parameters()], d), *module.buffers()]


def assert_alike(ours, stock):
    for a, b in zip(ours, stock, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def kernel_of(module, x):
    return next(line.kernel for line in explain(copy.deepcopy(module), x) if line.name == "")


def line_of(module, name=""):
    return next(line for line in report(module) if line.name == name)


# --- blocks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_one_op_and_computes_what_it_did(own, name, shape, training):
    stock, x = drawn(name, **SHAPES[shape])
    ours = copy.deepcopy(stock.train(training))
    swap(ours)
    assert isinstance(ours, type(stock)) and repr(ours) == repr(stock)
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert kernel_of(ours, x).startswith("cpu/")
    line = line_of(ours)
    assert line.old.endswith(type(stock).__qualname__) and line.new and not line.reason
    assert_alike(evaluate(ours, x), evaluate(stock, x))
    unswap(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in stock.modules()]
    assert vars(ours).keys() == vars(stock).keys()


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_verifies_in_float32(own, name):
    module, x = drawn(name, torch.float32, rows=4, projects=True)
    verify(swap(module), x, strict=True)


class Halved(nn.Module):
    def forward(self, x):
        return x / 2


def with_attribute(name, attribute, make, **more):
    def made():
        module, x = drawn(name, **more)
        setattr(module, attribute, make())
        return module.double(), x

    return made


def with_pool():
    pool = nn.AvgPool2d(2, ceil_mode=True)
    return nn.Sequential(pool, nn.Conv2d(24, 16, 1, bias=False), nn.BatchNorm2d(16))


def with_parametrized_conv():
    module, x = drawn("torchvision-BasicBlock")
    parametrizations.weight_norm(module.conv2)
    return module, x


def with_group_norm():
    module, x = drawn("torchvision-Bottleneck", norm_layer=lambda c: nn.GroupNorm(4, c))
    return module, x


MISFITS = {
    "se": (with_attribute("timm-BasicBlock", "se", Halved), "se is a Halved"),
    "drop_path": (with_attribute("timm-Bottleneck", "drop_path", Halved), "drop_path is a Halved"),
    "aa": (with_attribute("timm-BasicBlock", "aa", Halved), "aa is a Halved"),
    "timm-act": (with_attribute("timm-Bottleneck", "act3", nn.SiLU), "act3 is a SiLU"),
    "act": (with_attribute("torchvision-BasicBlock", "relu", nn.GELU), "relu is a GELU"),
    "transformers-act": (
        with_attribute("transformers-ResNetBasicLayer", "activation", nn.GELU),
        "activation is a GELU",
    ),
    "more": (with_attribute("torchvision-BasicBlock", "extra", nn.ReLU), "unknown module extra"),
    "pool": (
        with_attribute(
            "timm-BasicBlock", "downsample", with_pool, stride=2, projects=True
        ),
        "downsample is no convolution",
    ),
    "parametrized": (with_parametrized_conv, "ParametrizedConv2d for a Conv2d"),
    "norm": (with_group_norm, "a GroupNorm for a BatchNorm2d"),
    "padding": (
        with_attribute(
            "torchvision-BasicBlock",
            "conv2",
            lambda: nn.Conv2d(16, 16, 3, padding=1, bias=False, padding_mode="circular"),
        ),
        "padding_mode='circular'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_swapped_in_parts_and_the_report_says_why(own, case):
    make, reason = MISFITS[case]
    stock, x = make()
    ours = swap(copy.deepcopy(stock))
    assert type(ours) is type(stock)
    line = line_of(ours)
    assert line.new == "" and reason in line.reason and "one by one" in line.reason
    assert dlkernels.nn.Conv2d in {type(module) for module in ours.modules()}
    assert_alike(evaluate(ours, x), evaluate(stock, x))


@pytest.mark.parametrize("name", ["bn1", "conv1", "downsample"])
def test_a_class_of_the_path_with_other_modules_is_left(name):
    for cls in ("torchvision-BasicBlock", "timm-Bottleneck"):
        module, _ = drawn(cls, projects=True)
        delattr(module, name)
        if name == "conv1":
            del module.conv2, module.bn2
            module.conv3 = None
        kept = type(swap(module)) is BLOCKS[cls]
        assert kept == (name != "downsample") and bool(line_of(module).reason) == kept


def test_a_stride_without_a_projection_broadcasts_in_parts():
    module, _ = drawn("torchvision-BasicBlock", stride=2)
    assert "broadcasts" in line_of(swap(module)).reason


def test_another_forward_is_not_trusted(monkeypatch):
    module, _ = drawn("torchvision-BasicBlock")
    monkeypatch.setattr(type(module), "forward", lambda self, x: self.conv1(x))
    assert "the forward of BasicBlock" in line_of(swap(module)).reason


class Mine(BLOCKS["torchvision-BasicBlock"]):
    def forward(self, x):
        return super().forward(x) + 1


def test_a_subclass_of_a_block_is_left_unless_it_is_named(own):
    stock, x = Mine(16, 16).double(), torch.randn(2, 16, 9, 9, dtype=torch.float64)
    ours = swap(copy.deepcopy(stock), strict=True)
    assert type(ours) is Mine and "a subclass of BasicBlock" in line_of(ours).reason
    named = swap(copy.deepcopy(stock), subclasses=[Mine])
    assert isinstance(named, Mine) and kernel_of(named, x).startswith("cpu/")
    torch.testing.assert_close(named(x), stock(x))
    again = pickle.loads(pickle.dumps(named))
    assert type(again) is type(named)
    assert type(unswap(again)) is Mine


def test_a_hook_inside_is_called_and_the_report_says_so(own):
    module, x = drawn("timm-BasicBlock")
    stock = evaluate(copy.deepcopy(module), x)
    swap(module)
    seen = []
    hook = module.act1.register_forward_hook(lambda m, args, y: seen.append(y.shape))
    assert line_of(module).reason == "module by module: act1 has a hook"
    assert_alike(evaluate(module, x), stock)
    assert seen == [(2, 16, 9, 10)]
    hook.remove()
    assert line_of(module).reason == "" and kernel_of(module, x).startswith("cpu/")
    module.bn2.forward = lambda y: 0 * y  # as libraries do that move weights around
    assert torch.equal(module(x), torch.relu(x))


def test_hooks_of_the_block_itself_leave_it_one_op(own):
    module, x = drawn("torchvision-Bottleneck")
    seen = []
    module.register_forward_hook(lambda *_: seen.append("forward"))
    module.register_full_backward_hook(lambda *_: seen.append("backward"))
    swap(module)(x).sum().backward()
    assert seen == ["forward", "backward"]
    assert line_of(module).reason == ""


@pytest.mark.parametrize("name", BLOCKS)
def test_pickle_and_deepcopy_keep_the_class(own, name):
    module, x = drawn(name, projects=True)
    swap(module)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert [type(m) for m in again.modules()] == [type(m) for m in module.modules()]
        assert_alike(evaluate(again, x), evaluate(copy.deepcopy(module), x))


def test_batch_norms_in_two_modes_run_in_parts_for_as_long(own):
    stock, x = drawn("torchvision-BasicBlock")
    ours = swap(copy.deepcopy(stock))
    for module in (stock, ours):
        module.bn2.eval()
    assert "training and in eval" in line_of(ours).reason
    assert_alike(evaluate(ours, x), evaluate(stock, x))
    ours.train()
    assert line_of(ours).reason == ""


# --- blocks of anybody's ----------------------------------------------------------------------


def _fill(module, inputs, channels, stride, around):
    for at, planes in enumerate((inputs, channels), 1):
        conv = nn.Conv2d(planes, channels, 3, stride if at == 1 else 1, 1, bias=False)
        setattr(module, f"conv{at}", conv)
        setattr(module, f"bn{at}", nn.BatchNorm2d(channels))
    projects = stride != 1 or inputs != channels
    projection = [nn.Conv2d(inputs, channels, 1, stride), nn.BatchNorm2d(channels)]
    setattr(module, around, nn.Sequential(*projection if projects else ()))


class ResidualBlock(nn.Module):
    def __init__(self, inputs, channels, stride=1):
        super().__init__()
        _fill(self, inputs, channels, stride, "shortcut")

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out, True)


class ResBlk(nn.Module):
    def __init__(self, inputs, channels, stride=1):
        super().__init__()
        _fill(self, inputs, channels, stride, "extra")
        self.act, self.drop = nn.ReLU(inplace=True), nn.Identity()

    def forward(self, x):
        out = self.drop(self.bn1(self.conv1(x))).relu_()
        return self.act(torch.add(self.extra(x), self.bn2(self.conv2(out))))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("channels, stride", [(16, 1), (24, 2)])
@pytest.mark.parametrize("cls", [ResidualBlock, ResBlk])
def test_a_block_is_known_by_its_name_and_what_its_forward_does(
    own, cls, channels, stride, training
):
    stock = cls(16, channels, stride).double().train(training)
    x = torch.randn(2, 16, 9, 10, dtype=torch.float64, requires_grad=True)
    ours = swap(copy.deepcopy(stock))
    assert isinstance(ours, cls) and kernel_of(ours, x).startswith("cpu/")
    assert line_of(ours).new == f"dlkernels.foreign.NamedBlock[{cls.__name__}]"
    assert_alike(evaluate(ours, x), evaluate(stock, x))
    again = pickle.loads(pickle.dumps(ours))
    assert type(again) is type(ours) and type(unswap(again)) is cls


def before(self, x):
    return self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x)))))) + self.shortcut(x)


def twice(self, x):
    out = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))
    return F.relu(out + x)


def scaled(self, x):
    out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
    return F.relu(torch.add(out, self.shortcut(x), alpha=2))


def first_changed(self, x):
    x.mul_(2)
    return ResidualBlock.forward(self, x)


def trained_otherwise(self, x):
    out = F.relu(self.bn1(self.conv1(x)))
    out = self.bn2(self.conv2(-out if self.training else out))
    return F.relu(out + self.shortcut(x))


def crossed(self, x):
    out = F.relu(self.bn2(self.conv1(x)))
    return F.relu(self.bn1(self.conv2(out)) + self.shortcut(x))


def depends(self, x):
    return ResidualBlock.forward(self, x) if x.sum() > 0 else x


def of_two(self, x, y=None):
    return ResidualBlock.forward(self, x)


@pytest.mark.parametrize(
    "forward",
    [before, twice, scaled, first_changed, trained_otherwise, crossed, depends, of_two],
    ids=lambda forward: forward.__name__,
)
def test_a_forward_that_does_otherwise_is_left(own, forward):
    theirs = type("ResidualBlock", (nn.Module,), {"forward": forward, "__module__": __name__})
    forward.__qualname__ = "ResidualBlock.forward"
    stock = theirs()
    _fill(stock, 8, 8, 1, "shortcut")
    ours = swap(copy.deepcopy(stock))
    reason = line_of(ours).reason
    assert type(ours) is theirs and "one by one" in reason
    assert ("cannot trace" if forward is depends else "none of a residual block") in reason
    x = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(ours(x.clone()), stock(x.clone()))


def test_a_block_with_a_module_more_is_left():
    module = ResidualBlock(8, 8)
    module.dropout = nn.Dropout()
    assert "an unknown module dropout" in line_of(swap(module)).reason
    module = ResBlk(8, 8)
    module.shortcut = nn.Sequential()
    assert "both shortcut and extra" in line_of(swap(module)).reason


def test_transformers_convolution_layer_normalises_and_activates_at_once(own):
    stock, x = drawn("transformers-ResNetBasicLayer")
    stock = stock.layer[0]
    ours = swap(copy.deepcopy(stock))
    lines = {line.name: line.kernel for line in explain(copy.deepcopy(ours), x)}
    assert lines["normalization"] == lines["activation"] == "fused"
    assert_alike(evaluate(ours, x), evaluate(stock, x))
    ours.eval(), stock.eval()
    x = x.detach().contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        lines = {line.name: line for line in explain(ours, x)}
        assert "folded" in lines[""].reason and lines["convolution"].kernel == "fused"
        torch.testing.assert_close(ours(x), stock(x))
    calls = []
    ours.activation.register_forward_hook(lambda *_: calls.append(1))
    ours(x)
    assert calls == [1] and line_of(ours).reason == "module by module: activation has a hook"


# --- a network of blocks ----------------------------------------------------------------------


def run(model, x):
    loss = model(x).square().sum()
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.fixture
def image():
    return torch.randn(4, 3, 9, 9, dtype=torch.float64)


def test_compiled_it_is_one_graph(own, image):
    model = swap(Net().double())
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    assert_alike(run(compiled, image), run(model, image))


def test_exported_it_holds_the_op(own, image):
    model = swap(Net().double()).eval()
    exported = torch.export.export(model, (image,))
    calls = {str(node.target) for node in exported.graph.nodes}
    assert "dlkernels.residual_block.default" in calls
    torch.testing.assert_close(exported.module()(image), model(image))


def test_checkpointed_it_gives_the_same_gradients(own, image):
    model = swap(Net().double())
    again = copy.deepcopy(model)
    again.rematerialise = True
    assert_alike(run(again, image), run(model, image))


def test_amp_trains_as_stock(own):
    stock = Net()
    ours = swap(copy.deepcopy(stock))
    x, target = torch.randn(32, 3, 9, 9), torch.randint(5, (32,))
    ends = []
    for model in (stock, ours):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        losses = []
        for _ in range(8):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(x).float(), target)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
        ends.append(losses)
    assert ends[0][-1] < 0.9 * ends[0][0], "a model that does not learn proves nothing"
    assert abs(ends[1][-1] - ends[0][-1]) < 0.1 * (ends[0][0] - ends[0][-1])


def formats(model):
    return {
        name: weight.is_contiguous(memory_format=torch.channels_last)
        for name, weight in model.named_parameters()
        if weight.dim() == 4 and weight.shape[-1] > 1
    }


def test_channels_last_converts_the_weights_and_keeps_the_numbers(own, image):
    stock = Net().double()
    wanted = run(copy.deepcopy(stock), image)
    held = dict(stock.named_parameters())
    for setting, last in ((False, False), (True, True), ("auto", True)):
        model = copy.deepcopy(stock)
        swap(model, channels_last=setting)
        assert set(formats(model).values()) == {last}, setting
        assert model.one(model.stem(image)).is_contiguous(memory_format=torch.channels_last) is last
        assert_alike(run(model, image), wanted)
    with swapped(stock, channels_last="auto"):
        assert set(formats(stock).values()) == {True}
        assert all(held[name] is weight for name, weight in stock.named_parameters())
    assert set(formats(stock).values()) == {False}


def test_channels_last_auto_leaves_a_network_that_may_view_its_images():
    model = swap(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), channels_last="auto")
    assert set(formats(model).values()) == {False}
    with pytest.raises(ValueError, match="channels_last must be False, True or"):
        swap(model, channels_last="always")


DDP = """
from foreign import Net
from torch import nn
dlkernels.config.kernels = "own"
for when in ("before", "after"):
    torch.manual_seed(0)
    model = Net().double().eval()  # of the whole batch, statistics would be others
    x = torch.randn(4 * size, 3, 9, 9, dtype=torch.float64)
    model(x).square().mean().backward()
    whole = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    if when == "before":
        dlkernels.swap(model, channels_last="auto")
    ddp = nn.parallel.DistributedDataParallel(model)
    if when == "after":
        dlkernels.swap(ddp, channels_last="auto")
    last = model.stem.weight.is_contiguous(memory_format=torch.channels_last)
    assert last is (when == "before"), when
    assert isinstance(model.two, dlkernels.nn.Fused)
    for _ in range(2):
        ddp.zero_grad()
        ddp(x[rank::size]).square().mean().backward()
    for parameter, wanted in zip(model.parameters(), whole):
        torch.testing.assert_close(parameter.grad, wanted)
    print("equal", when)

from torch.distributed.fsdp import fully_shard
torch.manual_seed(0)
model = dlkernels.swap(Net().double().eval())
for part in (model.one, model.two, model):
    fully_shard(part)
with dlkernels.config.recording() as choices:
    model(x[rank::size]).square().mean().backward()
assert [choice.op for choice in choices].count("residual_block") == 2
for parameter, wanted in zip(model.parameters(), whole):
    torch.testing.assert_close(parameter.grad.full_tensor(), wanted)
print("equal", "sharded")
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_blocks_before_and_after_ddp_and_before_fsdp_with_two_processes(tmp_path):
    for printed in processes.run(DDP, tmp_path):
        assert printed[1::2] == ["before", "after", "sharded"]


# --- subclasses, chains, wrappers -------------------------------------------------------------


class Doubling(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class Layers(nn.Sequential):
    pass


def test_a_named_subclass_keeps_what_it_defines(own):
    model = nn.ModuleDict({"fc": Doubling(8, 8), "plain": nn.Linear(8, 8)})
    x = torch.randn(4, 8)
    wanted = model["fc"](x)
    with pytest.raises(ValueError, match="1 cannot be swapped: fc .*a subclass of Linear"):
        swap(model, strict=True)
    swap(model, strict=True, subclasses=[Doubling])
    assert isinstance(model["fc"], Doubling) and isinstance(model["fc"], dlkernels.nn.Linear)
    torch.testing.assert_close(model["fc"](x), wanted)
    assert explain(model["fc"], x)[0].kernel.startswith("cpu/")
    assert line_of(model, "fc")[1:] == (
        f"{__name__}.Doubling", "dlkernels.nn.Linear[Doubling]", ""
    )  # fmt: skip
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert type(again["fc"]) is type(model["fc"]) and repr(again) == repr(model)
    assert [type(m) for m in unswap(again).values()] == [Doubling, nn.Linear]


def test_a_named_sequential_runs_its_chains(own):
    model = Layers(nn.Linear(8, 8), nn.Tanh())
    x = torch.randn(4, 8)
    assert type(swap(copy.deepcopy(model))) is Layers
    ours = swap(copy.deepcopy(model), subclasses=[Layers])
    assert [line.kernel for line in explain(ours, x)][1:] == ["fused", "fused"]
    torch.testing.assert_close(ours(x), model(x))


@pytest.mark.parametrize("cls", [nn.ReLU, "Linear", Halved], ids=str)
def test_a_class_without_a_relative_cannot_be_named(cls):
    with pytest.raises(ValueError, match="is no subclass of a class that has one of ours"):
        swap(nn.Linear(2, 2), subclasses=[cls])


def test_a_subclass_of_what_ours_is_no_subclass_of_cannot_be_named():
    class Mine(nn.LSTM):
        pass

    with pytest.raises(ValueError, match="would run the forward of torch.nn.LSTM"):
        swap(Mine(2, 2), subclasses=[Mine])


def test_report_knows_a_subclass_of_a_recurrent_layer_of_ours():
    class Mine(dlkernels.nn.LSTM):
        pass

    line = line_of(Mine(2, 2))
    assert (line.old, line.reason) == ("torch.nn.LSTM", "a subclass of ours, as its author made it")


ACTIVATIONS = [nn.ReLU(), nn.LeakyReLU(), nn.Tanh(), nn.Sigmoid()]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_a_linear_layer_and_its_activation_are_one(own, activation):
    stock = nn.Sequential(nn.Linear(20, 30), activation, nn.Linear(30, 4)).double()
    ours = swap(copy.deepcopy(stock))
    x = torch.randn(6, 20, dtype=torch.float64, requires_grad=True)
    assert [line.kernel for line in explain(ours, x)][1:3] == ["fused", "fused"]
    assert_alike(evaluate(ours, x), evaluate(stock, x))


@pytest.mark.parametrize("activation", [nn.LeakyReLU(0.2), nn.GELU(), nn.ReLU6()], ids=str)
def test_other_activations_stay_modules(activation):
    assert type(swap(nn.Sequential(nn.Linear(4, 4), activation))) is nn.Sequential


def test_a_sequential_is_swapped_by_the_ops_of_its_chains():
    mixed = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU())
    assert type(swap(copy.deepcopy(mixed), ops=["linear"])) is nn.Sequential
    assert type(swap(copy.deepcopy(mixed), ops=["linear", "batch_norm"])) is dlkernels.nn.Sequential
    norm = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
    assert type(swap(norm, ops="batch_norm")) is dlkernels.nn.Sequential


class LowRank(nn.Module):
    """A wrapper that adds a product of its own, as LoRA's do."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


def test_a_low_rank_wrapper_keeps_its_own_forward(own):
    stock = nn.Sequential(LowRank(nn.Linear(16, 16)), nn.ReLU()).double()
    stock[0].base_layer.requires_grad_(False)
    ours = swap(copy.deepcopy(stock))
    assert type(ours) is nn.Sequential and type(ours[0]) is LowRank
    assert type(ours[0].base_layer) is dlkernels.nn.Linear
    x = torch.randn(4, 16, dtype=torch.float64)
    for model in (stock, ours):
        model(x).sum().backward()
    assert ours[0].base_layer.weight.grad is None
    torch.testing.assert_close(ours[0].up.weight.grad, stock[0].up.weight.grad)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_both_weight_norms_compute_as_before(own):
    hooked = nn.utils.weight_norm(nn.Linear(8, 8))
    made = parametrizations.weight_norm(nn.Linear(8, 8))
    stock = nn.Sequential(hooked, nn.ReLU(), made, nn.ReLU()).double()
    x = torch.randn(4, 8, dtype=torch.float64)
    wanted = stock(x).detach()  # before: the hook leaves a tensor that deepcopy refuses
    swap(stock)
    assert type(stock[0]) is dlkernels.nn.Linear and parametrize.is_parametrized(stock[2])
    hooked.weight_g.data.mul_(2)
    assert not torch.allclose(stock(x), wanted), "the hook runs still"
    hooked.weight_g.data.div_(2)
    torch.testing.assert_close(stock(x), wanted)


# --- Conv1D and the losses --------------------------------------------------------------------


def test_conv1d_is_a_linear_layer(own):
    stock = foreign.Conv1D(24, 16).double()
    ours = swap(copy.deepcopy(stock), ops="linear", strict=True)
    x = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    assert explain(ours, x)[0].kernel.startswith("cpu/")
    assert_alike(evaluate(ours, x), evaluate(stock, x))
    assert type(pickle.loads(pickle.dumps(ours))) is type(ours)
    assert type(unswap(ours)) is foreign.Conv1D
    verify(swap(foreign.Conv1D(24, 16)), torch.randn(6, 16), strict=True)
    stock.extra = nn.Parameter(torch.ones(3))
    assert line_of(swap(stock)).reason == "parameters weight, bias, extra"


class Language(foreign.PreTrainedModel):
    """A model whose class says which loss it has."""

    def __init__(self, loss_type):
        super().__init__()
        self.loss_type = loss_type
        self.lm_head = nn.Linear(6, 11)

    def forward(self, x, **more):
        return self.loss_function(self.lm_head(x), **more)


LABELS = torch.tensor([[3, 1, -100, 10], [0, -100, 5, 5]])
CONFIG = SimpleNamespace(num_labels=11, problem_type=None)
CALLS = {
    "causal": ("ForCausalLM", {"labels": LABELS, "vocab_size": 11}),
    "default": (None, {"labels": LABELS, "vocab_size": 11}),
    "items": ("ForCausalLM", {"labels": LABELS, "vocab_size": 11, "num_items_in_batch": 17}),
    "items-tensor": (
        "ForMaskedLM",
        {"labels": LABELS, "vocab_size": 11, "num_items_in_batch": torch.tensor(9)},
    ),
    "shifted": (
        "ForCausalLM",
        {"labels": None, "shift_labels": LABELS, "vocab_size": 11, "ignore_index": -100},
    ),
    "tokens": ("ForTokenClassification", {"labels": LABELS, "config": CONFIG}),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_the_loss_of_a_model_is_ours_and_is_put_back(own, case):
    loss_type, arguments = CALLS[case]
    stock = Language(loss_type)
    ours = swap(copy.deepcopy(stock))
    assert line_of(ours, "loss_function").new == "dlkernels.foreign.Loss"
    x = torch.randn(2, 4, 6)
    with dlkernels.config.recording() as choices:
        losses = [model(x, **arguments) for model in (ours, stock)]
    assert [c.op for c in choices].count("cross_entropy") == 1
    torch.testing.assert_close(*losses)
    gradients = [torch.autograd.grad(loss, model.lm_head.weight)[0]
                 for loss, model in zip(losses, (ours, stock), strict=True)]  # fmt: skip
    torch.testing.assert_close(*gradients)
    again = pickle.loads(pickle.dumps(copy.deepcopy(ours.loss_function)))
    torch.testing.assert_close(again(ours.lm_head(x), **arguments), losses[0])
    unswap(ours)
    assert vars(ours).keys() == vars(stock).keys()
    assert ours.loss_function is stock.loss_function


def test_classification_decides_as_transformers_does(own):
    x, labels = torch.randn(5, 6), torch.tensor([1, 0, 10, 4, 4])
    for count, targets, problem in (
        (11, labels, "single_label_classification"),
        (1, torch.randn(5), "regression"),
    ):
        results = []
        for model in (Language("ForSequenceClassification"),) * 2:
            torch.manual_seed(0)
            model.lm_head = nn.Linear(6, count)
            config = SimpleNamespace(num_labels=count, problem_type=None)
            if results:
                swap(model)
                assert foreign.ForSequenceClassificationLoss is model.loss_function.stock
            loss = model.loss_function(
                labels=targets, pooled_logits=model.lm_head(x), config=config
            )
            assert config.problem_type == problem
            results.append(loss)
        torch.testing.assert_close(*results)


def test_a_loss_that_somebody_set_comes_back():
    def mine(logits, labels, vocab_size):
        return logits.sum()

    model = Language("ForCausalLM")
    model.loss_function = foreign.ForMaskedLMLoss
    swap(model)
    assert model.loss_function.stock is foreign.ForMaskedLMLoss
    assert swap(model).loss_function.stock is foreign.ForMaskedLMLoss, "twice is once"
    assert unswap(model)._loss_function is foreign.ForMaskedLMLoss
    model.loss_function = mine
    assert swap(model).loss_function is mine


def test_ops_filter_and_swapped_hold_for_the_loss(monkeypatch):
    model = Language("ForCausalLM")
    for arguments in ({"ops": "linear"}, {"filter_fn": lambda m, name: "loss" not in name}):
        assert swap(model, **arguments).loss_function is foreign.ForCausalLMLoss
        assert line_of(model, "loss_function").reason == "not swapped"
    with swapped(model, ops=["cross_entropy"]):
        assert model.loss_function is not foreign.ForCausalLMLoss
    assert "_loss_function" not in vars(model)
    monkeypatch.setenv("DLKERNELS_DISABLE", "1")
    assert swap(model).loss_function is foreign.ForCausalLMLoss
    assert "DLKERNELS_DISABLE" in line_of(model, "loss_function").reason


def test_a_base_model_has_no_loss():
    model = foreign.PreTrainedModel()
    assert "_loss_function" not in vars(swap(model))


# --- transformers' own ------------------------------------------------------------------------


def resnet(layer_type):
    import transformers

    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], layer_type=layer_type, num_labels=3
    )
    model = transformers.ResNetForImageClassification(config)
    return model, {"pixel_values": torch.randn(4, 3, 40, 40), "labels": torch.tensor([0, 2, 1, 1])}


def basic():
    return resnet("basic")


def bottleneck():
    return resnet("bottleneck")


def vit():
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ViTConfig(
        **sizes, intermediate_size=64, image_size=16, patch_size=8, num_labels=3
    )
    model = transformers.ViTForImageClassification(config)
    return model, {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 2])}


def gpt2():
    import transformers

    config = transformers.GPT2Config(
        n_layer=2, n_embd=32, n_head=2, vocab_size=301, n_positions=16,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    ids = torch.randint(301, (2, 12))
    return transformers.GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids}


@pytest.fixture
def real():
    return pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("make", "kinds"),
    [
        (basic, {"residual_block", "conv2d", "cross_entropy"}),
        (bottleneck, {"residual_block", "conv2d", "cross_entropy"}),
        (vit, {"linear", "conv2d", "cross_entropy"}),
        (gpt2, {"linear", "cross_entropy"}),
    ],
)
def test_a_model_of_transformers(own, real, make, kinds):
    stock, inputs = make()
    stock.double()
    inputs = {k: x.double() if x.is_floating_point() else x for k, x in inputs.items()}
    ours = swap(copy.deepcopy(stock), channels_last="auto")
    assert list(ours.state_dict()) == list(stock.state_dict()) and repr(ours) == repr(stock)
    with dlkernels.config.recording() as choices:
        outputs = [model(**inputs) for model in (ours, stock)]
    assert kinds <= {choice.op for choice in choices}
    results = [
        [out.loss, out.logits, *torch.autograd.grad(out.loss, list(model.parameters()))]
        for out, model in zip(outputs, (ours, stock), strict=True)
    ]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)  # transformers' loss is in float32
    again = pickle.loads(pickle.dumps(ours))
    torch.testing.assert_close(again(**inputs).loss, ours(**inputs).loss)
    unswap(again)
    assert [type(m) for m in again.modules()] == [type(m) for m in stock.modules()]
    assert all(
        vars(a).keys() == vars(b).keys()
        for a, b in zip(again.modules(), stock.modules(), strict=True)
    )
