"""freeze and unfreeze: what is kept is read, where it holds, and is never that of other weights."""

import copy
import io
import pickle

import pytest
import torch
from torch.nn import functional as F

import dlkernels
from dlkernels import nn

ops = torch.ops.dlkernels

# id: batch, channels in and out, side. Few tiles with many channels go by the second form.
SHAPES = {
    "by_tiles": (2, 64, 48, 12),
    "by_panels": (1, 144, 160, 8),
    "tails": (2, 70, 67, 9),
}


def convolution(shape="by_tiles", dtype=torch.float32, **keywords):
    """A module in eval mode, and an input."""
    batch, channels, outputs, side = SHAPES[shape]
    module = nn.Conv2d(channels, outputs, 3, padding=1, **keywords).to(dtype).eval()
    return module, torch.randn(batch, channels, side, side).to(dtype)


def is_frozen(module):
    return module._kept is not None


def spoil(module):
    """Makes it seen whether what is kept is read."""
    module._kept.value.fill_(float("nan"))


def reads_what_it_keeps(module, x):
    spoil(module)
    return bool(module(x).isnan().any())


@pytest.fixture(autouse=True)
def _kernels(own):
    pass


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_bits_as_unfrozen(shape, dtype, form, poisoned):
    module, x = convolution(shape, dtype)
    x = x.contiguous(memory_format=form)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with torch.no_grad():
            wanted = module(x)
            assert dlkernels.freeze(module) is module and is_frozen(module)
            assert torch.equal(module(x), wanted) and module(x).stride() == wanted.stride()
            assert reads_what_it_keeps(module, x)
        dlkernels.unfreeze(module)


@pytest.mark.parametrize("kernels", ["own", "auto"])
def test_what_is_kept_is_read_where_it_holds_alone(kernels):
    dlkernels.config.kernels = kernels
    module, x = convolution()
    x = x.repeat(4, 1, 1, 1)
    wanted = module(x).detach()
    dlkernels.freeze(module)
    spoil(module)
    with torch.no_grad():
        assert module(x).isnan().any()
        with torch.autocast("cpu", torch.bfloat16):
            assert module(x).isfinite().all()
        dlkernels.config.winograd = "off"
        assert module(x).isfinite().all()
        dlkernels.config.winograd = "auto"
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), wanted)
        replaced = {"weight": module.weight * 2, "bias": module.bias}
        doubled = torch.func.functional_call(module, replaced, (x,))
        torch.testing.assert_close(doubled, F.conv2d(x, *replaced.values(), padding=1), **CLOSE)
    assert torch.equal(module(x), wanted)  # with a gradient
    with torch.inference_mode():
        assert module(x).isnan().any()


CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def test_a_frozen_forward_transforms_nothing():
    module, x = convolution()
    dlkernels.freeze(module)
    with torch.no_grad(), torch.profiler.profile() as profile:
        module(x)
    names = {event.key for event in profile.key_averages()}
    assert "dlkernels::conv2d_prepared" in names
    assert not names & {"dlkernels::conv2d_prepare", "dlkernels::conv2d_forward"}


def test_only_what_has_something_to_keep_keeps_it():
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1),
        nn.Conv2d(64, 64, 3, stride=2),
        nn.Conv2d(64, 64, 1),
        nn.Conv2d(64, 64, 3, dilation=2),
        nn.Conv2d(64, 64, 3, groups=2),
        nn.Conv2d(64, 64, 3).double(),
        torch.nn.Conv2d(64, 64, 3),
        nn.Conv2d(64, 64, 3, padding="same", padding_mode="circular"),
    ).eval()
    dlkernels.freeze(model)
    assert [getattr(module, "_kept", None) is not None for module in model] == [False] * 7 + [True]
    x = torch.randn(2, 64, 8, 8)
    wanted = F.conv2d(F.pad(x, (1, 1, 1, 1), "circular"), model[7].weight, model[7].bias)
    with torch.no_grad():
        torch.testing.assert_close(model[7](x), wanted, **CLOSE)
        assert reads_what_it_keeps(model[7], x)


def test_a_chain_with_a_pool_reads_it():
    dlkernels.config.kernels = "auto"
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.ReLU(), nn.MaxPool2d(2)).eval()
    x = torch.randn(8, 64, 14, 14)
    with torch.no_grad():
        wanted = model(x)
        dlkernels.freeze(model)
        assert torch.equal(model(x), wanted)
        spoil(model[0])
        assert model(x).isnan().any()


# ------------------------------------------------------------------------------------- the way back

BACK = {
    "unfreeze": dlkernels.unfreeze,
    "train": lambda model: model.train(),
    "load_state_dict": lambda model: model.load_state_dict(model.state_dict()),
    "assign": lambda model: model.load_state_dict(model.state_dict(), assign=True),
    "half": lambda model: model.half(),
    "to": lambda model: model.to(torch.float64),
    "unswap": dlkernels.unswap,
}


@pytest.mark.parametrize("way", BACK)
def test_the_way_back(way):
    module, x = convolution()
    model = dlkernels.freeze(torch.nn.Sequential(module).eval())
    model.eval()
    assert is_frozen(module)
    spoil(module)
    BACK[way](model)
    assert getattr(module, "_kept", None) is None and "_kept" not in module.__dict__
    model.eval()
    with torch.no_grad():
        assert model(x.to(module.weight.dtype)).isfinite().all()


def written_to(weight):
    with torch.no_grad():
        weight.mul_(2)


CHANGES = {
    "in_place": lambda module: written_to(module.weight),
    "another": lambda module: setattr(module, "weight", torch.nn.Parameter(module.weight * 2)),
    "data": lambda module: setattr(module.weight, "data", module.weight.data * 2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_not_what_was_kept(change):
    module, x = convolution()
    dlkernels.freeze(module)
    CHANGES[change](module)
    with torch.no_grad():
        wanted = F.conv2d(x, module.weight, module.bias, padding=1)
        torch.testing.assert_close(module(x), wanted, **CLOSE)
        dlkernels.freeze(module)
        torch.testing.assert_close(module(x), wanted, **CLOSE)
        assert reads_what_it_keeps(module, x)


@pytest.mark.parametrize("change", [{"stride": (2, 2)}, {"dilation": (2, 2)}], ids=str)
def test_a_changed_setting_is_not_what_was_kept_for(change):
    module, x = convolution()
    dlkernels.freeze(module)
    for name, value in change.items():
        setattr(module, name, value)
    with torch.no_grad():
        wanted = F.conv2d(
            x, module.weight, module.bias, module.stride, module.padding, module.dilation
        )
        torch.testing.assert_close(module(x), wanted, **CLOSE)


def test_inference_tensors_can_be_frozen():
    with torch.inference_mode():
        module, x = convolution()
        wanted = module(x)
        dlkernels.freeze(module)
        assert torch.equal(module(x), wanted) and reads_what_it_keeps(module, x)


# ----------------------------------------------------------------------------------- the rest of it


def test_copies_are_as_of_an_unfrozen_module():
    module, x = convolution()
    plain = pickle.dumps(module)
    keys = list(module.state_dict())
    dlkernels.freeze(module)
    assert list(module.state_dict()) == keys and list(dict(module.named_buffers())) == []
    spoil(module)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    copies = (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(buffer, weights_only=False),
    )
    assert len(pickle.dumps(module)) < len(plain) + 200
    for other in copies:
        assert not is_frozen(other) and type(other) is nn.Conv2d
        with torch.no_grad():
            assert other(x).isfinite().all()
            dlkernels.freeze(other)
            assert reads_what_it_keeps(other, x)
    assert is_frozen(module)


def test_a_swapped_model_freezes():
    model = torch.nn.Sequential(torch.nn.Conv2d(64, 64, 3), torch.nn.BatchNorm2d(64)).eval()
    assert not any(map(is_ours, dlkernels.freeze(model)))
    dlkernels.freeze(dlkernels.swap(model))
    assert is_frozen(model[0])
    with dlkernels.swapped(model):
        pass
    report = dlkernels.verify(model, torch.randn(2, 64, 8, 8))
    assert all(line.ok is not False for line in report)


def is_ours(module):
    return isinstance(module, nn.Freezable)


def test_refusals():
    module, _ = convolution()
    with pytest.raises(RuntimeError, match="freeze: a model in training mode .* eval"):
        dlkernels.freeze(torch.nn.Sequential(module))
    model = torch.nn.Sequential(module).eval()
    module.train()
    with pytest.raises(RuntimeError, match="freeze: a model in training mode .* eval"):
        dlkernels.freeze(model)
    assert not is_frozen(module)
    for function in (dlkernels.freeze, dlkernels.unfreeze):
        with pytest.raises(TypeError, match="model must be a torch.nn.Module, got list"):
            function([module])


def block(kind=nn.ResidualBlock, channels=(64, 64), **keywords):
    """A residual block in eval mode whose batch norms have seen images, and an image."""
    module = kind(*channels, **keywords)
    x = torch.randn(2, channels[0], 12, 12).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for _ in range(3):
            module(torch.randn(4, channels[0], 9, 9) * 2 + 1)
    return module.eval(), x


def spoil_affine(module):
    module._kept.value[0][0].fill_(float("nan"))


BLOCKS = {
    "identity": {},
    "projection": {"channels": (48, 64), "stride": 2},
    "biases": {"kind": nn.ResBlk, "channels": (64, 80)},
    "bottleneck": {"kind": nn.BottleneckBlock, "channels": (64, 16)},
    "bfloat16": {},
    "float64": {},
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_frozen_residual_block(name, poisoned):
    """Its convolutions' transforms are kept once, by them."""
    module, x = block(**BLOCKS[name])
    if name in ("bfloat16", "float64"):
        dtype = getattr(torch, name)
        module, x = module.to(dtype), x.to(dtype)
    with torch.no_grad():
        wanted = module(x)
        dlkernels.freeze(module)
        assert torch.equal(module(x), wanted)
        convolution = module.conv2
        if is_frozen(convolution):
            before = convolution._kept.value.clone()
            spoil(convolution)
            assert module(x).isnan().any()
            convolution._kept.value.copy_(before)
        assert is_frozen(convolution) == (name != "float64")
        spoil_affine(module)
        assert module(x).isnan().any()
        with torch.autocast("cpu", torch.bfloat16):
            assert module(x).isfinite().all()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert compiled(x).isfinite().all()
    assert torch.isfinite(module(x)).all()  # with a gradient
    dlkernels.unfreeze(module)
    with torch.no_grad():
        assert torch.equal(module(x), wanted)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.bn1.running_mean.add_(1),
        lambda m: m.bn2.weight.mul_(2),
        lambda m: setattr(m.conv1, "bias", torch.nn.Parameter(torch.ones(64))),
        lambda m: setattr(m.bn1, "bias", torch.nn.Parameter(torch.ones(64))),
        lambda m: m.load_state_dict(m.state_dict()),
        lambda m: m.train().eval(),
        lambda m: m.double().float(),
        lambda m: setattr(m.bn2, "eps", 0.5),
    ],
    ids=["running", "weight", "a_bias_more", "bias", "load_state_dict", "train", "to", "eps"],
)
def test_a_changed_residual_block_is_computed_anew(change):
    module, x = block()
    dlkernels.freeze(module)
    spoil_affine(module)
    with torch.no_grad():
        assert module(x).isnan().any()
        change(module)
        ours = module(x)
        dlkernels.config.kernels = "stock"
        torch.testing.assert_close(ours, module(x), rtol=1e-3, atol=1e-3)


def test_a_frozen_block_whose_parts_are_called():
    """What a hook sees is right, and a block that is no single op keeps nothing."""
    module, x = block()
    dlkernels.freeze(module)
    with torch.no_grad():
        wanted = module(x)
        spoil_affine(module)
        module.bn1.register_forward_hook(lambda *_: None)
        torch.testing.assert_close(module(x), wanted, rtol=1e-3, atol=1e-3)
    module, _ = block()
    module.bn2 = torch.nn.GroupNorm(4, 64)
    dlkernels.freeze(module)
    assert module._kept is None


@pytest.mark.parametrize("first", ["frozen", "training"])
def test_batch_norms_that_train_in_a_block_in_eval_mode(first):
    """They keep nothing, read nothing that was kept, and count each batch once."""
    module, x = block()
    wanted = copy.deepcopy(module)
    if first == "frozen":
        dlkernels.freeze(module)
        spoil_affine(module)
    for each in (module, wanted):
        each.bn1.train(), each.bn2.train()
    if first == "training":
        dlkernels.freeze(module)
        assert module._kept is None
    with torch.no_grad():
        torch.testing.assert_close(module(x), wanted(x))
    torch.testing.assert_close(module.state_dict(), wanted.state_dict())


def test_refusals_of_raw_ops():
    module, x = convolution()
    weight, settings = module.weight.detach(), ([1, 1], [1, 1], [1, 1], 1, "none", False, True)
    prepared = ops.conv2d_prepare(weight, [1, 1], [1, 1], 1)
    ops.conv2d_prepared(x, weight, prepared, None, *settings)
    for bad, message in (
        (prepared[:-1], "prepared of shape"),
        (prepared.double(), "prepared of dtype Float, got Double"),
        (prepared.repeat(2)[::2], "contiguous prepared"),
    ):
        with pytest.raises(RuntimeError, match=f"conv2d: expected .*{message}"):
            ops.conv2d_prepared(x, weight, bad, None, *settings)
    for arguments, message in (
        ((weight[0], [1, 1], [1, 1], 1), "weight with 4 dimensions"),
        ((weight.int(), [1, 1], [1, 1], 1), "weight of dtype"),
        ((weight, [0, 1], [1, 1], 1), "stride of at least 1"),
    ):
        with pytest.raises(RuntimeError, match=f"conv2d: expected .*{message}"):
            ops.conv2d_prepare(*arguments)
    leaf = weight.clone().requires_grad_()
    for output in (
        ops.conv2d_prepare(leaf, [1, 1], [1, 1], 1),
        ops.conv2d_prepared(x, leaf, prepared, None, *settings),
    ):
        with pytest.raises(NotImplementedError, match="raw op"):
            output.sum().backward()


def test_opcheck():
    module, x = convolution()
    weight, settings = module.weight.detach(), ([1, 1], [1, 1], [1, 1], 1, "none", False, True)
    eager = ("test_schema", "test_autograd_registration", "test_faketensor")
    prepared = ops.conv2d_prepare(weight, [1, 1], [1, 1], 1)
    arguments = weight, [1, 1], [1, 1], 1
    torch.library.opcheck(ops.conv2d_prepare.default, arguments, test_utils=eager[:2])
    arguments = x, weight, prepared, module.bias.detach(), *settings
    torch.library.opcheck(ops.conv2d_prepared.default, arguments, test_utils=eager)
