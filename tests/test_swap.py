"""swap, unswap, swapped, report and explain; tests of verify are in test_verify.py.

The rules of swap are tested on cross_entropy, and where a rule needs a class with parameters, on a
line for Linear that a test puts in the place of ours: its class doubles the output, to be seen.
"""

import copy
import importlib
import io
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import dlkernels
from dlkernels import config, explain, report, swap, swapped, unswap

table = importlib.import_module("dlkernels.swap")
ROOT = Path(__file__).parent.parent
STOCK, OURS = nn.CrossEntropyLoss, dlkernels.nn.CrossEntropyLoss
LINEAR = dlkernels.nn.Linear


class Net(nn.Module):
    """Two layers with tied weights, a loss under two names, and a loss of its own."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8, bias=False)
        self.second = nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight
        self.loss = STOCK(weight=torch.linspace(0.5, 1.5, 8))
        self.same_loss = self.loss
        self.auxiliary = STOCK(label_smoothing=0.1)

    def forward(self, x, target):
        hidden = torch.tanh(self.first(x))
        logits = self.second(hidden)
        return self.loss(logits, target) + 0.3 * self.auxiliary(hidden, target)


class Doubled(nn.Linear):
    def forward(self, input):
        config.record("linear", "test/doubled", f"{input.shape[0]} rows")
        return 2 * super().forward(input)


class Fused(nn.Sequential):
    def forward(self, input):
        config.record("linear", "test/fused", "a chain")
        return super().forward(input)


def chain(module):
    return [type(child) for child in module] == [nn.Linear, nn.ReLU]


@pytest.fixture
def linear(monkeypatch):
    """The table with a line for Linear that can be seen, and one for the chain Linear → ReLU."""
    lines = [
        table.Twin("linear", nn.Linear, Doubled),
        table.Twin("linear", nn.Sequential, Fused, fits=chain),
    ]
    others = [twin for twin in table.TWINS if twin.op != "linear"]
    monkeypatch.setattr(table, "TWINS", [*lines, *others])


def batch(rows=16):
    return torch.randn(rows, 8), torch.randint(8, (rows,))


def classes(model):
    return {name: type(module) for name, module in model.named_modules(remove_duplicate=False)}


# --- what is swapped --------------------------------------------------------------------------


def test_swap_sets_the_class_and_nothing_else():
    model = Net()
    before = copy.deepcopy(model)
    ids = {name: id(module) for name, module in model.named_modules(remove_duplicate=False)}
    assert swap(model) is model
    ours = dict.fromkeys(["loss", "same_loss", "auxiliary"], OURS)
    ours |= dict.fromkeys(["first", "second"], LINEAR)
    assert classes(model) == classes(before) | ours
    after = {name: id(module) for name, module in model.named_modules(remove_duplicate=False)}
    assert after == ids
    assert repr(model) == repr(before)
    assert list(model.state_dict()) == list(before.state_dict())
    for ours, stock in zip(model.modules(), before.modules(), strict=True):
        assert vars(ours).keys() == vars(stock).keys()
    assert classes(unswap(model)) == classes(before)


def test_a_loss_is_swapped_as_the_model_itself():
    loss = swap(STOCK())
    assert type(loss) is OURS
    assert report(loss) == [("", "torch.nn.CrossEntropyLoss", "dlkernels.nn.CrossEntropyLoss", "")]


def test_swapping_twice_is_swapping_once():
    assert classes(swap(swap(Net()))) == classes(swap(Net()))


@pytest.mark.parametrize(
    "model", [pytest.param(torch.tanh, id="torch.tanh"), "net", None, STOCK], ids=str
)
@pytest.mark.parametrize("function", [swap, unswap, report, explain, dlkernels.verify])
def test_no_module_is_a_type_error(function, model):
    arguments = (model, ()) if function is dlkernels.verify else (model,)
    with pytest.raises(TypeError, match=f"{function.__name__}: model must be a torch.nn.Module"):
        function(*arguments)


def test_filter_fn_sees_each_candidate_once_and_decides(linear):
    seen = []

    def first(module, name):
        seen.append(name)
        return isinstance(module, nn.Linear) and name == "first"

    model = swap(Net(), filter_fn=first)
    assert sorted(seen) == ["auxiliary", "first", "loss", "second"]
    assert [name for name, cls in classes(model).items() if cls is Doubled] == ["first"]
    assert OURS not in classes(model).values()


@pytest.mark.parametrize("ops", [["linear"], ("linear",), {"linear"}, "linear"], ids=repr)
def test_ops_chooses(linear, ops):
    found = set(classes(swap(Net(), ops=ops)).values())
    assert Doubled in found and OURS not in found


def test_no_ops_is_no_swap():
    assert OURS not in classes(swap(Net(), ops=[])).values()


def test_an_unknown_op_names_the_known(linear):
    model = Net()
    with pytest.raises(
        ValueError,
        match="no op named conv3d; known: batch_norm, conv2d, conv2d_max_pool2d, cross_entropy",
    ):
        swap(model, ops=["linear", "conv3d"])
    assert Doubled not in classes(model).values()


def test_a_composite_is_matched_by_what_is_in_it(linear):
    model = nn.Sequential(
        nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Sequential(nn.ReLU(), nn.Linear(8, 8))
    )
    seen = []
    swap(model, filter_fn=lambda module, name: seen.append(name) or True)
    assert seen == ["1.1", "0.0", "0"], "children before their parents"
    assert [type(child) for child in model] == [Fused, nn.Sequential]
    assert type(model[0][0]) is Doubled and type(model[1][1]) is Doubled
    assert [type(child) for child in unswap(model)] == [nn.Sequential, nn.Sequential]


# --- what is left, and why --------------------------------------------------------------------


class Scaled(STOCK):
    def forward(self, input, target):
        return 2 * super().forward(input, target)


class Exponential(nn.Module):
    def forward(self, x):
        return torch.exp(x)


def parametrized():
    return parametrize.register_parametrization(STOCK(torch.rand(4)), "weight", Exponential())


def scripted():
    return torch.jit.script(STOCK())


def quantised():
    return pytest.importorskip("torch.ao.nn.quantized.dynamic").Linear(4, 4)


LEFT = [
    (Scaled, "a subclass of CrossEntropyLoss"),
    (parametrized, "parametrized (weight)"),
    (scripted, "scripted"),
    (quantised, "quantised"),
]


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize(("make", "reason"), LEFT, ids=lambda value: getattr(value, "__name__", ""))
def test_relatives_of_a_twin_are_left_with_a_reason(linear, make, reason):
    model = nn.ModuleDict({"good": STOCK(), "odd": make()})
    cls = type(model["odd"])
    with pytest.raises(ValueError, match="1 cannot be swapped: odd ") as refusal:
        swap(model, strict=True)
    assert reason in str(refusal.value)
    assert type(model["good"]) is STOCK, "strict must change nothing"
    swap(model)
    assert type(model["good"]) is OURS
    assert type(model["odd"]) is cls
    line = next(line for line in report(model) if line.name == "odd")
    assert line.new == "" and reason in line.reason


def test_strict_minds_only_what_was_asked_for(linear):
    model = nn.ModuleDict({"odd": Scaled(), "fc": nn.Linear(2, 2)})
    swap(model, ops=["linear"], strict=True)
    assert type(model["fc"]) is Doubled
    swap(model, filter_fn=lambda module, name: name != "odd", strict=True)


def test_report_lists_leaves_and_twins():
    model = nn.ModuleDict({"a": nn.Tanh(), "b": nn.Sequential(STOCK()), "c": Exponential()})
    lines = {line.name: line for line in report(model)}
    assert list(lines) == ["a", "b.0", "c"]
    assert lines["a"].reason == "no kernel of ours for Tanh"
    assert lines["b.0"] == ("b.0", "torch.nn.CrossEntropyLoss", "", "not swapped")
    assert lines["c"].old == f"{__name__}.Exponential"


def test_a_lazy_layer_is_swapped_after_its_first_call():
    model = nn.Sequential(nn.LazyLinear(3), dlkernels.nn.LazyLinear(4))
    x = torch.randn(2, 5)
    with pytest.raises(ValueError, match="1 cannot be swapped: 0 .*lazy"):
        swap(model, strict=True)
    assert [line.reason for line in report(swap(model))] == [
        "lazy: it becomes a Linear at its first call, swap it after that",
        "lazy: it becomes ours at its first call",
    ]
    wanted = model(x)
    assert [type(layer) for layer in model] == [nn.Linear, LINEAR]
    assert [type(layer) for layer in swap(model, strict=True)] == [LINEAR, LINEAR]
    assert torch.equal(model(x), wanted)


def test_convolutions_are_swapped_each_by_itself():
    """A ReLU behind one stays a module of its own; one of another dimension is torch's."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, 2), nn.Conv1d(4, 4, 1)
    )
    swap(model, ops="conv2d", strict=True)
    wanted = [dlkernels.nn.Conv2d, nn.ReLU, dlkernels.nn.ConvTranspose2d, nn.Conv1d]
    assert [type(module) for module in model] == wanted
    assert [line.reason for line in report(model)] == [
        "", "no kernel of ours for ReLU", "", "no kernel of ours for Conv1d"
    ]  # fmt: skip
    stock = [nn.Conv2d, nn.ReLU, nn.ConvTranspose2d, nn.Conv1d]
    assert [type(module) for module in unswap(model)] == stock


def test_lazy_and_quantised_convolutions_are_left_with_a_reason():
    model = nn.Sequential(nn.LazyConv2d(3, 1), dlkernels.nn.LazyConvTranspose2d(3, 1))
    assert [line.reason for line in report(swap(model))] == [
        "lazy: it becomes a Conv2d at its first call, swap it after that",
        "lazy: it becomes ours at its first call",
    ]
    model(torch.randn(2, 4, 5, 5))
    wanted = [dlkernels.nn.Conv2d, dlkernels.nn.ConvTranspose2d]
    assert [type(module) for module in swap(model, strict=True)] == wanted


@pytest.mark.parametrize("kernels", ["own", "auto"])
def test_swapped_convolutions_verify(kernels, monkeypatch):
    """By 4 times stock's error, 5 times in the gradient of a weight, where they may be faster."""
    monkeypatch.setattr(config, "kernels", kernels)
    model = swap(nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ConvTranspose2d(16, 8, 3)))
    records = dlkernels.verify(model, torch.randn(4, 16, 14, 13), strict=True)
    assert {record.what for record in records} == {
        "output", "grad input", "grad weight", "grad bias"
    }  # fmt: skip


def test_attention_keeps_its_projection():
    """It reads the weights of its Linear and never calls it: a class of its own, that is left."""
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    swap(model)
    assert type(model.linear1) is type(model.linear2) is LINEAR
    assert type(model.self_attn.out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear
    x = torch.randn(2, 3, 16)
    ours = model.eval()(x)
    assert torch.equal(unswap(model)(x), ours)


class Capped(OURS):
    pass


def test_a_subclass_of_ours_is_no_obstacle_and_no_stock_module(caplog):
    model = nn.ModuleDict({"loss": Capped(softcap=5.0)})
    swap(model, strict=True)
    assert report(model)[0].new == f"{__name__}.Capped"
    unswap(model)
    assert type(model["loss"]) is Capped
    assert "loss stays" in caplog.text and "a subclass of ours" in caplog.text


# --- the report as a table --------------------------------------------------------------------


def test_report_prints_as_a_table():
    text = str(report(swap(Net())))
    rows = [line for line in text.splitlines() if "auxiliary" in line]
    assert len(rows) == 1 and "dlkernels.nn.CrossEntropyLoss" in rows[0]
    assert "(model)" in str(report(STOCK()))
    assert "[0]" in str(table.Records([table.Explained("", "a[0]", "[b]", "")])), "no markup"
    assert "no modules" in str(table.Records())


def test_without_rich_report_prints_a_record_a_line(monkeypatch):
    monkeypatch.setattr(table.importlib.util, "find_spec", lambda name: None)
    records = report(swap(Net()))
    assert str(records).splitlines() == [repr(record) for record in records]


def test_report_is_not_stored_on_the_model():
    model = swap(Net())
    wanted = report(model)
    assert report(copy.deepcopy(model)) == wanted
    assert report(pickle.loads(pickle.dumps(model))) == wanted
    assert pickle.loads(pickle.dumps(wanted)) == wanted
    assert type(pickle.loads(pickle.dumps(wanted))) is table.Records


# --- unswap and swapped -----------------------------------------------------------------------


def test_unswap_keeps_a_module_that_uses_what_stock_lacks(caplog):
    model = nn.ModuleDict({"plain": OURS(), "capped": OURS(softcap=20.0)})
    model["plain"].softcap = None  # set, but to the default
    unswap(model)
    assert type(model["plain"]) is STOCK and vars(model["plain"]).keys() == vars(STOCK()).keys()
    assert type(model["capped"]) is OURS and model["capped"].softcap == 20.0
    assert "capped stays dlkernels.nn.CrossEntropyLoss: it uses softcap=20.0" in caplog.text


def test_swapped_restores_what_it_changed_even_on_an_exception():
    model = nn.ModuleDict({"stock": STOCK(), "ours": OURS()})
    with swapped(model) as inside:
        assert inside is model and type(model["stock"]) is OURS
    assert [type(m) for m in model.values()] == [STOCK, OURS]
    with pytest.raises(KeyError, match="inside"), swapped(model):
        assert type(model["stock"]) is OURS
        raise KeyError("inside")
    assert [type(m) for m in model.values()] == [STOCK, OURS]


def test_swapped_takes_the_arguments_of_swap():
    with pytest.raises(ValueError, match="no op named conv3d"), swapped(Net(), ops=["conv3d"]):
        pass
    with swapped(Net(), filter_fn=lambda module, name: name == "loss") as model:
        assert type(model.loss) is OURS and type(model.auxiliary) is STOCK


# --- the kill switch --------------------------------------------------------------------------


def test_kill_switch(monkeypatch, caplog):
    monkeypatch.setenv("DLKERNELS_DISABLE", "1")
    model = swap(Net(), strict=True)
    assert OURS not in classes(model).values()
    assert "DLKERNELS_DISABLE" in caplog.text and caplog.records[0].levelno == logging.WARNING
    assert "DLKERNELS_DISABLE is set" in {line.name: line for line in report(model)}["loss"].reason
    with swapped(model):
        assert OURS not in classes(model).values()
    monkeypatch.setenv("DLKERNELS_DISABLE", "0")
    assert OURS in classes(swap(model)).values()


def test_kill_switch_from_the_command_line():
    code = (
        "import torch, dlkernels; loss = dlkernels.swap(torch.nn.CrossEntropyLoss());"
        "assert type(loss) is torch.nn.CrossEntropyLoss; print(dlkernels.report(loss))"
    )
    environment = os.environ | {"DLKERNELS_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "DLKERNELS_DISABLE is set" in done.stdout and "DLKERNELS_DISABLE is set" in done.stderr


# --- explain ----------------------------------------------------------------------------------


class Twice(nn.Module):
    """A layer under two names that runs twice, on different inputs; one that never runs; a call of
    a function of ours in the forward of the model itself."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.tied = self.layer
        self.act = nn.ReLU()
        self.unused = nn.Linear(8, 8)

    def forward(self, x, target):
        x = self.tied(self.act(self.layer(x))[:3])
        return dlkernels.functional.cross_entropy(x, target[:3])


def test_explain_attributes_each_choice_to_its_module(linear):
    lines = {line.name: line for line in explain(swap(Twice()), *batch())}
    assert list(lines) == ["", "layer", "act", "unused"]
    assert lines["layer"].kernel == "test/doubled"
    assert lines["layer"].reason == "16 rows; 3 rows"
    assert lines["layer"].cls == f"{__name__}.Doubled"
    assert lines["act"] == ("act", "torch.nn.ReLU", "stock", "no kernel of ours for ReLU")
    assert lines["unused"][2:] == ("none", "not called with these inputs")
    assert lines[""].cls == f"{__name__}.Twice"
    assert lines[""].kernel and "rows" not in lines[""].reason


def test_explain_attributes_to_the_innermost_module(linear):
    model = swap(nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 8)))
    kernels = {line.name: line.kernel for line in explain(model, batch()[0])}
    assert kernels == {
        "0": "test/fused", "0.0": "test/doubled", "0.1": "stock", "1": "test/doubled"
    }  # fmt: skip


def test_explain_on_a_stock_model_says_not_swapped():
    reasons = {line.name: line.reason for line in explain(Net(), *batch())}
    assert reasons["loss"] == reasons["first"] == "not swapped"


def test_explain_of_a_loss_names_the_forced_kernel(monkeypatch):
    logits, target = torch.randn(64, 100), torch.randint(100, (64,))
    monkeypatch.setattr(config, "kernels", "own")
    assert explain(OURS(), logits, target)[0].kernel.startswith("cpu/")
    monkeypatch.setattr(config, "kernels", "stock")
    assert explain(OURS(), logits, target)[0].kernel == "stock"


class Careful(nn.Module):
    """Catches what its first child throws, chooses itself, and goes on with the second."""

    def __init__(self):
        super().__init__()
        self.wrong, self.right = nn.Sequential(nn.Linear(3, 3)), nn.Linear(8, 8)

    def forward(self, x):
        try:
            self.wrong(x)
        except RuntimeError:
            config.record("linear", "test/model", "after the exception")
        return self.right(x)


def test_explain_survives_an_exception_that_the_model_catches(linear):
    lines = {line.name: line for line in explain(swap(Careful()), batch()[0])}
    assert lines["right"].kernel == "test/doubled"
    assert lines[""].kernel == "test/model"
    assert lines["wrong.0"].kernel == "test/doubled", "it chose, and then threw"


def test_explain_leaves_mode_and_hooks_alone_also_on_an_exception():
    model = swap(Net())
    grad_modes = []
    model.first.register_forward_hook(lambda *_: grad_modes.append(torch.is_grad_enabled()))
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    explain(model, *batch())
    with torch.no_grad():
        explain(model.eval(), *batch())
    with pytest.raises(RuntimeError):
        explain(model, torch.randn(4, 3), torch.zeros(4, dtype=torch.int64))
    assert grad_modes == [True, False] and not model.training
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert not config._recorders


# --- training ---------------------------------------------------------------------------------


def train(model, steps, optimizer, data):
    losses = []
    for x, target in [next(data) for _ in range(steps)]:
        optimizer.zero_grad()
        loss = model(x, target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def batches(dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    while True:
        target = torch.randint(8, (512,), generator=generator)
        x = torch.eye(8)[target] + 0.5 * torch.randn(512, 8, generator=generator)
        yield x.to(dtype), target


def test_training_through_swap_copy_pickle_and_unswap_is_training(tmp_path):
    """Against the curve in float64: no further from it than 4 x the curve of stock."""
    start = Net()
    curves = {}
    for name, dtype in (("stock", torch.float32), ("exact", torch.float64)):
        model = copy.deepcopy(start).to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
        curves[name] = train(model, 40, optimizer, batches(dtype))

    model, data, fired = copy.deepcopy(start), batches(), []
    model.loss.register_forward_hook(lambda *_: fired.append("forward"))
    model.loss.register_full_backward_hook(lambda *_: fired.append("backward"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    curve = train(model, 10, optimizer, data)

    swap(model)
    assert fired == ["forward", "backward"] * 10
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert list(map(id, held)) == list(map(id, model.parameters()))
    assert set(map(id, optimizer.state)) == set(map(id, model.parameters()))
    curve += train(model, 10, optimizer, data)
    assert fired == ["forward", "backward"] * 20
    assert model.second.weight is model.first.weight

    # What follows is trained by copies: a deepcopy for 10 steps, then its pickle, unswapped.
    model.loss._forward_hooks.clear()  # a lambda cannot be pickled
    model.loss._backward_hooks.clear()
    for again in (copy.deepcopy, lambda model: saved(model, tmp_path / "model.pt")):
        state = optimizer.state_dict()
        model = again(model)
        assert type(model.loss) is OURS and model.same_loss is model.loss
        assert model.second.weight is model.first.weight
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
        optimizer.load_state_dict(state)
        if len(curve) == 30:
            unswap(model)
        curve += train(model, 10, optimizer, data)
    assert OURS not in classes(model).values()

    exact = torch.tensor(curves["exact"], dtype=torch.float64)
    error, stock_error = (
        (torch.tensor(c, dtype=torch.float64) - exact).abs().max() for c in (curve, curves["stock"])
    )
    assert error <= 4 * stock_error + torch.finfo(torch.float32).eps * exact.max()
    assert exact[-1] < 0.7 * exact[0], "a model that does not learn proves nothing"


def saved(model, path):
    torch.save(model, path)
    return torch.load(path, weights_only=False)


def test_state_dict_goes_both_ways_with_weights_only():
    stock, ours = Net(), swap(Net())
    for source, sink in ((stock, ours), (ours, stock)):
        buffer = io.BytesIO()
        torch.save(source.state_dict(), buffer)
        buffer.seek(0)
        sink.load_state_dict(torch.load(buffer, weights_only=True))
        assert torch.equal(source.first.weight, sink.first.weight)


# --- compile and DDP --------------------------------------------------------------------------


def test_a_model_compiled_before_swap_runs_the_new_class(linear):
    model = nn.Linear(8, 8)
    x = torch.randn(4, 8)
    compiled = torch.compile(model, backend="aot_eager")
    stock = compiled(x)
    swap(model)
    assert torch.equal(compiled(x), 2 * stock)
    assert explain(compiled, x)[0].kernel == "test/doubled"
    with torch.no_grad():
        unswap(model)
    assert torch.equal(compiled(x), stock)


def test_swap_then_compile():
    model = swap(Net())
    x, target = torch.randn(512, 8), torch.randint(8, (512,))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    losses, gradients = [], []
    for run in (model, compiled):
        loss = run(x, target)
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, model.first.weight)[0])
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)


def test_compiler_is_reset_only_by_a_change(monkeypatch):
    import torch._dynamo  # noqa: F401  without it there is nothing to reset

    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    unswap(nn.ReLU())
    swap(nn.Sequential(nn.ReLU(), OURS()))
    swap(Net(), ops=[])
    assert resets == []
    model = swap(Net())
    assert len(resets) == 1, "once, however many modules"
    unswap(model)
    assert len(resets) == 2


DDP = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.loss = nn.Linear(16, 300), nn.CrossEntropyLoss()
    def forward(self, x, target):
        return self.loss(self.fc(x), target)

for when in ("before", "after"):
    torch.manual_seed(0)
    model, x, target = Net(), torch.randn(8 * size, 16), torch.randint(300, (8 * size,))
    model(x, target).backward()
    whole = model.fc.weight.grad.clone()
    model.zero_grad()
    if when == "before":
        dlkernels.swap(model)
    ddp = nn.parallel.DistributedDataParallel(model)
    if when == "after":
        dlkernels.swap(ddp)
    assert type(model.loss) is dlkernels.nn.CrossEntropyLoss
    for _ in range(2):
        ddp.zero_grad()
        ddp(x[rank::size], target[rank::size]).backward()
    torch.testing.assert_close(model.fc.weight.grad, whole)
    print("equal", when)
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_swap_before_and_after_ddp_with_two_processes(tmp_path):
    for printed in processes.run(DDP, tmp_path):
        assert printed == ["equal", "before", "equal", "after"]
