"""dlkernels.nn beside torch.nn: the same names, signatures, repr, state_dict, pickle and errors."""

import copy
import inspect
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dlkernels
import dlkernels.nn as nn

ROOT = Path(__file__).parent.parent
EXTRAS = {"softcap": 30.0, "z_loss": 1e-4, "return_lse": True}


def saved_and_loaded(value, **kwargs):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, **kwargs)


# --- the namespace ----------------------------------------------------------------------------


def test_every_public_name_of_torch_nn_is_there():
    missing = {name for name in dir(torch.nn) if name[0] != "_"} - set(dir(nn))
    assert not missing


def test_names_without_a_kernel_are_torchs_own_objects():
    ours = {"CrossEntropyLoss", "functional"}
    others = [name for name in dir(torch.nn) if name[0] != "_" and name not in ours]
    assert len(others) > 100
    assert [name for name in others if getattr(nn, name) is not getattr(torch.nn, name)] == []


def test_star_import_gives_the_namespace():
    names: dict = {}
    exec("from dlkernels.nn import *", names)
    assert names["CrossEntropyLoss"] is nn.CrossEntropyLoss
    assert names["Linear"] is torch.nn.Linear
    assert "sys" not in names and "torch" not in names


def test_a_name_that_neither_has_is_an_attribute_error():
    with pytest.raises(AttributeError, match="neither 'dlkernels.nn' nor 'torch.nn' has 'Linaer'"):
        nn.Linaer  # noqa: B018
    assert not hasattr(nn, "_no_such_private_name")


def test_functional_is_ours_completed_by_torchs():
    assert nn.functional is dlkernels.functional
    assert nn.functional.cross_entropy is not torch.nn.functional.cross_entropy
    assert nn.functional.relu is torch.nn.functional.relu
    assert "max_pool2d" in dir(nn.functional)


def test_functional_imports_like_torchs():
    code = "import dlkernels.nn.functional as F, dlkernels; assert F is dlkernels.functional"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_network_takes_the_namespace():
    class Net(torch.nn.Module):
        def __init__(self, nn):
            super().__init__()
            self.nn = nn
            self.fc = nn.Linear(5, 3)
            self.loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))

        def forward(self, x, target):
            return self.loss(self.nn.functional.relu(self.fc(x)), target)

    stock, ours = Net(nn=torch.nn), Net(nn=nn)
    ours.load_state_dict(stock.state_dict())
    assert list(ours.state_dict()) == list(stock.state_dict())
    x, target = torch.randn(4, 5), torch.tensor([0, 2, 1, 1])
    assert type(ours.loss) is nn.CrossEntropyLoss
    torch.testing.assert_close(ours(x, target), stock(x, target))


# --- CrossEntropyLoss -------------------------------------------------------------------------


def test_constructor_is_stocks_and_then_keyword_only_extras():
    stock = inspect.signature(torch.nn.CrossEntropyLoss).parameters
    ours = inspect.signature(nn.CrossEntropyLoss).parameters
    facts = [(p.name, p.kind, p.default) for p in ours.values()]
    assert facts[: len(stock)] == [(p.name, p.kind, p.default) for p in stock.values()]
    rest = list(ours.values())[len(stock) :]
    assert [p.name for p in rest] == list(EXTRAS)
    assert all(p.kind is p.KEYWORD_ONLY for p in rest)


def test_class_defaults_are_the_constructors():
    for name in EXTRAS:
        default = inspect.signature(nn.CrossEntropyLoss).parameters[name].default
        assert getattr(nn.CrossEntropyLoss, name) is default


def test_an_instance_without_extras_holds_what_stocks_holds():
    assert vars(nn.CrossEntropyLoss()).keys() == vars(torch.nn.CrossEntropyLoss()).keys()


def test_repr():
    assert repr(nn.CrossEntropyLoss()) == repr(torch.nn.CrossEntropyLoss())
    ours = nn.CrossEntropyLoss(softcap=30.0, return_lse=True)
    assert repr(ours) == "CrossEntropyLoss(softcap=30.0, return_lse=True)"


@pytest.mark.parametrize("weight", [None, torch.rand(4)], ids=["no_weight", "weight"])
def test_state_dict_is_stocks(weight):
    ours, stock = nn.CrossEntropyLoss(weight), torch.nn.CrossEntropyLoss(weight)
    assert list(ours.state_dict()) == list(stock.state_dict())
    stock.load_state_dict(ours.state_dict())
    ours.load_state_dict(saved_and_loaded(stock.state_dict(), weights_only=True))


def test_the_weight_buffer_moves_with_the_module():
    loss = nn.CrossEntropyLoss(torch.rand(4)).to(torch.bfloat16)
    assert loss.weight.dtype is torch.bfloat16
    assert loss.to("meta").weight.is_meta


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda m: saved_and_loaded(m, weights_only=False)]
)
def test_copies_keep_settings(again):
    loss = nn.CrossEntropyLoss(torch.rand(4), ignore_index=2, label_smoothing=0.1, **EXTRAS)
    copied = again(loss)
    assert type(copied) is nn.CrossEntropyLoss
    assert torch.equal(copied.weight, loss.weight) and copied.weight is not loss.weight
    for name in ("ignore_index", "label_smoothing", "reduction", *EXTRAS):
        assert getattr(copied, name) == getattr(loss, name)


@pytest.mark.parametrize(
    ("size_average", "reduce"), [(True, None), (False, None), (None, False), (None, True)]
)
@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")
def test_legacy_arguments(size_average, reduce):
    stock = torch.nn.CrossEntropyLoss(size_average=size_average, reduce=reduce)
    ours = nn.CrossEntropyLoss(size_average=size_average, reduce=reduce)
    assert ours.reduction == stock.reduction


def test_forward_hands_every_setting_to_the_function(monkeypatch):
    seen = {}
    monkeypatch.setattr(nn.functional, "cross_entropy", lambda *a, **k: seen.update(args=a, **k))
    weight, x, target = torch.rand(4), torch.randn(2, 4), torch.tensor([1, 3])
    settings = {"weight": weight, "ignore_index": 3, "reduction": "sum", "label_smoothing": 0.2}
    nn.CrossEntropyLoss(**settings, **EXTRAS)(x, target)
    assert seen.pop("args") == (x, target)
    assert seen == settings | EXTRAS


def test_forward_gives_what_the_function_gives():
    x, target = torch.randn(64, 100, requires_grad=True), torch.randint(100, (64,))
    loss, lse = nn.CrossEntropyLoss(**EXTRAS)(x, target)
    wanted, wanted_lse = dlkernels.functional.cross_entropy(x, target, **EXTRAS)
    assert torch.equal(loss, wanted) and torch.equal(lse, wanted_lse)
    pair = [torch.autograd.grad(value, x)[0] for value in (loss, wanted)]
    assert torch.equal(*pair)


def test_refusals_are_stocks():
    x, target = torch.randn(2, 4), torch.tensor([1, 3])
    cases = [
        ({"reduction": "avg"}, x, target),
        ({}, x, torch.tensor([1, 4])),
        ({}, x, torch.tensor([1, 2, 3])),
        ({"weight": torch.rand(3)}, x, target),
        ({"label_smoothing": 1.5}, x, target),
    ]
    for settings, *inputs in cases:
        with pytest.raises((RuntimeError, ValueError, IndexError)) as stock:
            torch.nn.CrossEntropyLoss(**settings)(*inputs)
        with pytest.raises(stock.type):
            nn.CrossEntropyLoss(**settings)(*inputs)
