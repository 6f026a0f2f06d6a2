"""verify: it passes what is right, fails what is wrong by 1 %, and leaves the model as it was."""

import copy
import importlib
import math

import pytest
import torch
from torch import nn

import dlkernels
from dlkernels import config, verify

table = importlib.import_module("dlkernels.swap")
OURS = dlkernels.nn.CrossEntropyLoss


class Right(nn.Linear):
    """The products in another order of summation: right, and not bit for bit."""

    def forward(self, input):
        return (input.flip(-1) @ self.weight.flip(-1).T) + self.bias


class WrongOutput(nn.Linear):
    def forward(self, input):
        return 1.01 * super().forward(input)


class OffByOnePercent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 1.01 * gradient


class WrongInputGradient(nn.Linear):
    def forward(self, input):
        return super().forward(OffByOnePercent.apply(input))


class WrongWeightGradient(nn.Linear):
    def forward(self, input):
        return nn.functional.linear(input, OffByOnePercent.apply(self.weight), self.bias)


class NoInputGradient(nn.Linear):
    def forward(self, input):
        return super().forward(input.detach())


class NoGradient(nn.Linear):
    def forward(self, input):
        return super().forward(input).detach()


class WrongDtype(nn.Linear):
    def forward(self, input):
        return super().forward(input).double()


class NotANumber(nn.Linear):
    def forward(self, input):
        output = super().forward(input)
        return output + torch.where(torch.arange(output.shape[-1]) == 0, math.nan, 0.0)


class Stopped(nn.Module):
    """An in-place activation right behind the layer, a second call, and a layer never called."""

    def __init__(self):
        super().__init__()
        self.first, self.act = nn.Linear(6, 6), nn.ReLU(inplace=True)
        self.unused = nn.Linear(6, 6)

    def forward(self, x):
        return self.act(self.first(self.act(self.first(x)))) + 1


def line(monkeypatch, ours):
    """The table with a class for Linear in the place of ours, and no chains."""
    others = [t for t in table.TWINS if t.op != "linear" and t.stock is not nn.Sequential]
    monkeypatch.setattr(table, "TWINS", [*others, table.Twin("linear", nn.Linear, ours)])


def failed(records):
    return {record.what for record in records if record.ok is False}


def test_a_right_class_is_ok_with_every_gradient(monkeypatch):
    line(monkeypatch, Right)
    model = dlkernels.swap(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(64, 32), nn.Tanh()))
    records = verify(model, torch.randn(128, 64), strict=True)
    assert [r.name for r in records] == ["1"] * 4
    assert [r.what for r in records] == ["output", "grad weight", "grad bias", "grad input"]
    assert all(0 < r.error < 1e-3 and 0 < r.stock_error for r in records[:2])


@pytest.mark.parametrize(
    ("ours", "wrong"),
    [
        (WrongOutput, {"output", "grad weight", "grad bias", "grad input"}),
        (WrongInputGradient, {"grad input"}),
        (WrongWeightGradient, {"grad weight"}),
        (NoInputGradient, {"grad input"}),
        (NoGradient, {"grad weight", "grad bias", "grad input"}),
        (WrongDtype, {"output"}),
        (NotANumber, {"output"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_wrong_class_fails_by_what_is_wrong_in_it(monkeypatch, ours, wrong):
    line(monkeypatch, ours)
    model = dlkernels.swap(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)))
    records = verify(model, torch.randn(9, 6))
    assert failed(r for r in records if r.name == "0") == wrong
    assert failed(r for r in records if r.name == "2") == wrong, "each on its own, not by the first"
    assert all(r.reason for r in records if not r.ok)
    with pytest.raises(AssertionError, match=f"verify: {2 * len(wrong)} of 8 not ok"):
        verify(model, torch.randn(9, 6), strict=True)


def test_a_wrong_loss_fails(monkeypatch):
    class Wrong(OURS):
        def forward(self, input, target):
            return 1.01 * super().forward(input, target)

    class WrongKernel(OURS):  # right where the choice is forced to stock: with an extra in use the
        def forward(self, input, target):  # reference is all that ours can be held against
            wrong = 1.0 if config.kernels == "stock" else 1.01
            return wrong * super().forward(input, target)

    inputs = torch.randn(32, 100), torch.randint(100, (32,))
    assert failed(verify(dlkernels.swap(nn.CrossEntropyLoss()), inputs)) == set()
    everything = {"output", "grad input"}
    for ours, settings in ((Wrong, {}), (WrongKernel, {}), (WrongKernel, {"softcap": 3.0})):
        twin = table.Twin("cross_entropy", nn.CrossEntropyLoss, ours, ("softcap",))
        monkeypatch.setattr(table, "TWINS", [twin])
        assert failed(verify(ours(**settings), inputs)) == everything, (ours, settings)


def test_the_root_mean_square_is_judged_too():
    exact = torch.linspace(1, 1.99, 1000, dtype=torch.float64)
    stock = exact.float()
    stock[0] += 1e-5  # stock's one bad element lifts the bound of the maximum
    _, _, ok, reason = table._judge(exact.float() + 5e-6, stock, exact, 2.0)
    assert not ok and "rms" in reason
    assert table._judge(stock.clone(), stock, exact, 2.0)[2]


def test_inf_and_nan_belong_where_stock_has_them():
    exact = torch.tensor([1.0, math.inf, math.nan, -math.inf], dtype=torch.float64)
    stock = exact.float()
    assert table._judge(stock.clone(), stock, exact, 2.0)[2]
    for i, value in ((0, math.nan), (1, 1.0), (2, 0.0), (3, math.inf)):
        ours = stock.clone()
        ours[i] = value
        assert not table._judge(ours, stock, exact, 2.0)[2], (i, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_cross_entropy_is_ok_in_a_network_and_as_its_loss(monkeypatch, dtype):
    monkeypatch.setattr(config, "kernels", "own")
    model = nn.Sequential(nn.Linear(20, 50), nn.Tanh(), nn.Linear(50, 300)).to(dtype)
    loss = dlkernels.swap(nn.CrossEntropyLoss(torch.rand(300, dtype=dtype), label_smoothing=0.1))
    x, target = torch.randn(40, 20, dtype=dtype), torch.randint(300, (40,))
    records = verify(model, x, target, loss, strict=True)
    assert [(r.name, r.what) for r in records] == [("loss", "output"), ("loss", "grad input")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_linear_is_ok_with_every_gradient(monkeypatch, dtype):
    monkeypatch.setattr(config, "kernels", "own")
    layers = nn.Linear(70, 50), nn.LeakyReLU(inplace=True), nn.Linear(50, 40, bias=False)
    model = dlkernels.swap(nn.Sequential(*layers)).to(dtype)
    x = torch.randn(3, 60, 70, dtype=dtype)
    records = verify(model, x, strict=True)
    assert [(r.name, r.what) for r in records] == [
        ("", "output"), ("", "grad 0.weight"), ("", "grad 0.bias"), ("", "grad 2.weight"),
        ("", "grad input"),
        ("0", "output"), ("0", "grad weight"), ("0", "grad bias"), ("0", "grad input"),
        ("2", "output"), ("2", "grad weight"), ("2", "grad input"),
    ]  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16):
        assert len(verify(model, x, strict=True)) == 12


def test_extras_are_verified_against_the_reference(monkeypatch):
    monkeypatch.setattr(config, "kernels", "own")
    loss = OURS(softcap=5.0, z_loss=1e-3, return_lse=True)
    records = verify(loss, (torch.randn(40, 300), torch.randint(300, (40,))), strict=True)
    assert [r.what for r in records] == ["output.0", "output.1", "grad input"]
    assert config.kernels == "own"


def test_float32_accumulation_in_float64_is_found(monkeypatch):
    class Rounded(nn.Linear):
        def forward(self, input):
            return nn.functional.linear(input.float(), self.weight.float()).double() + self.bias

    line(monkeypatch, Rounded)
    model = dlkernels.swap(nn.Linear(6, 6).double())
    assert "output" in failed(verify(model, torch.randn(3, 6, dtype=torch.float64)))


def test_inputs_require_grad_as_given_or_else_the_first(monkeypatch):
    loss, logits, target = OURS(), torch.randn(4, 5), torch.rand(4, 5)
    whats = [r.what for r in verify(loss, (logits, target))]
    assert whats == ["output", "grad input"] and not logits.requires_grad
    whats = [r.what for r in verify(loss, (logits, target.requires_grad_()))]
    assert whats == ["output", "grad target"]


def test_autocast_is_replayed():
    model = nn.Sequential(nn.Linear(20, 300))
    x, target = torch.randn(64, 20), torch.randint(300, (64,))
    with torch.autocast("cpu", torch.bfloat16):
        records = verify(model, x, target, dlkernels.swap(nn.CrossEntropyLoss()), strict=True)
    assert len(records) == 2


def test_without_grad_there_are_outputs_only(monkeypatch):
    line(monkeypatch, Right)
    with torch.no_grad():
        records = verify(dlkernels.swap(nn.Linear(6, 6)), torch.randn(3, 6), strict=True)
    assert [r.what for r in records] == ["output"]


def test_the_real_inputs_and_gradients_are_met_whatever_happens_in_place(monkeypatch):
    line(monkeypatch, Right)
    records = verify(dlkernels.swap(Stopped()), {"x": torch.randn(5, 6)})
    assert {r.name for r in records if r.ok} == {"first"}
    assert [r for r in records if not r.ok][0][:3] == ("unused", f"{__name__}.Right", "")
    with pytest.raises(AssertionError, match="1 of 5 not ok"):
        verify(dlkernels.swap(Stopped()), torch.randn(5, 6), strict=True)


def test_the_worst_call_is_shown(monkeypatch):
    class WrongOnTheSecond(nn.Linear):
        def forward(self, input):
            output = super().forward(input)
            return 1.01 * output if input.shape[0] == 3 else output

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x):
            return self.fc(x).sum() + self.fc(x[:3]).sum() + self.fc(x).sum()

    line(monkeypatch, WrongOnTheSecond)
    records = verify(dlkernels.swap(Two()), torch.randn(8, 6))
    assert "output" in failed(records) and len(records) == 4


def test_nothing_to_verify_is_an_empty_table_or_under_strict_an_error():
    assert verify(nn.Linear(6, 6), torch.randn(2, 6)) == []
    with pytest.raises(AssertionError, match="no module of ours in the model; swap it first"):
        verify(nn.Linear(6, 6), torch.randn(2, 6), strict=True)


def test_the_model_stays_as_it_was(monkeypatch):
    line(monkeypatch, WrongOutput)
    model = dlkernels.swap(nn.Sequential(nn.Linear(6, 6), nn.Tanh()))
    model[0].weight.grad = torch.ones(6, 6)
    before = copy.deepcopy(model)
    x = torch.randn(2, 6)
    verify(model, x)
    with pytest.raises(RuntimeError):
        verify(model, torch.randn(2, 5))
    assert type(model[0]) is WrongOutput and config.kernels == "auto"
    assert torch.equal(model[0].weight, before[0].weight)
    assert torch.equal(model[0].weight.grad, torch.ones(6, 6)) and model[0].bias.grad is None
    assert not x.requires_grad and x.grad is None
    for module in model.modules():
        assert not (module._forward_hooks or module._forward_pre_hooks)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).view(3, 4).T,
        torch.arange(12.0)[::3],
        torch.arange(4.0).expand(3, 4),
        torch.empty(0, 3),
        torch.tensor(2.0, requires_grad=True),
        torch.arange(24).view(1, 2, 3, 4).to(memory_format=torch.channels_last),
    ],
    ids=["transposed", "sliced", "expanded", "empty", "scalar", "channels_last"],
)
def test_replayed_tensors_keep_values_strides_and_requires_grad(tensor):
    copied = table._copy(tensor)
    assert torch.equal(copied, tensor) and copied.stride() == tensor.stride()
    assert copied.requires_grad == tensor.requires_grad and copied.is_leaf
    assert tensor.numel() == 0 or copied.data_ptr() != tensor.data_ptr()
