"""dlkernels.nn beside torch.nn: the same names, signatures, repr, state_dict, pickle and errors."""

import copy
import importlib
import inspect
import io
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch
from compare import assert_no_worse

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
    ours = {"CrossEntropyLoss", "LazyLinear", "Linear", "LinearCrossEntropyLoss", "functional"}
    ours |= {"Conv2d", "ConvTranspose2d", "LazyConv2d", "LazyConvTranspose2d", "Sequential"}
    ours |= {f"{name}{cell}" for name in ("LSTM", "GRU", "RNN") for cell in ("", "Cell")}
    ours |= {f"{lazy}BatchNorm{d}d" for lazy in ("", "Lazy") for d in (1, 2, 3)}
    others = [name for name in dir(torch.nn) if name[0] != "_" and name not in ours]
    assert len(others) > 100
    assert [name for name in others if getattr(nn, name) is not getattr(torch.nn, name)] == []


def test_star_import_gives_the_namespace():
    names: dict = {}
    exec("from dlkernels.nn import *", names)
    assert names["CrossEntropyLoss"] is nn.CrossEntropyLoss
    assert names["Linear"] is nn.Linear and names["Bilinear"] is torch.nn.Bilinear
    assert "sys" not in names and "torch" not in names


def test_a_name_that_neither_has_is_an_attribute_error():
    with pytest.raises(AttributeError, match="neither 'dlkernels.nn' nor 'torch.nn' has 'Linaer'"):
        nn.Linaer  # noqa: B018
    assert not hasattr(nn, "_no_such_private_name")


def test_functional_is_ours_completed_by_torchs():
    assert nn.functional is dlkernels.functional
    assert nn.functional.cross_entropy is not torch.nn.functional.cross_entropy
    for name in ("batch_norm", "conv2d", "conv_transpose2d", "linear"):
        assert getattr(nn.functional, name) is not getattr(torch.nn.functional, name)
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
    assert type(ours.loss) is nn.CrossEntropyLoss and type(ours.fc) is nn.Linear
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


# --- Linear -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Linear", "LazyLinear"])
def test_constructor_of_linear_is_stocks(name):
    ours, stock = getattr(nn, name), getattr(torch.nn, name)
    assert issubclass(ours, stock)
    assert inspect.signature(ours) == inspect.signature(stock)
    settings = {"bias": False, "dtype": torch.float64, "device": "meta"}
    arguments = (5,) if name == "LazyLinear" else (3, 5)
    made = ours(*arguments, **settings), stock(*arguments, **settings)
    assert repr(made[0]) == repr(made[1])
    assert vars(made[0]).keys() == vars(made[1]).keys()
    assert made[0].weight.dtype is torch.float64 and made[0].weight.is_meta


def test_one_seed_gives_linear_the_same_weights():
    layers = []
    for namespace in (torch.nn, nn):
        torch.manual_seed(3)
        layers.append(namespace.Linear(7, 5))
    stock, ours = layers
    assert list(ours.state_dict()) == list(stock.state_dict()) == ["weight", "bias"]
    assert torch.equal(ours.weight, stock.weight) and torch.equal(ours.bias, stock.bias)
    stock.load_state_dict(saved_and_loaded(ours.state_dict(), weights_only=True))
    ours.load_state_dict(stock.state_dict())


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda m: saved_and_loaded(m, weights_only=False)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_copies_of_linear(again, bias):
    layer = nn.Linear(7, 5, bias=bias)
    copied = again(layer)
    assert type(copied) is nn.Linear and copied.weight is not layer.weight
    assert torch.equal(copied.weight, layer.weight) and (copied.bias is not None) == bias
    x = torch.randn(2, 7)
    assert torch.equal(copied(x), layer(x))


def test_linear_hands_its_parameters_to_the_function(monkeypatch):
    monkeypatch.setattr(nn.functional, "linear", lambda *arguments: arguments)
    layer, x = nn.Linear(7, 5), torch.randn(2, 7)
    assert [a is b for a, b in zip(layer(x), (x, layer.weight, layer.bias), strict=True)] == [
        True
    ] * 3
    layer = nn.Linear(7, 5, bias=False)
    assert layer(x)[2] is None


def test_lazy_linear_becomes_ours():
    lazy = nn.LazyLinear(5)
    assert lazy.has_uninitialized_params()
    torch.manual_seed(1)
    first = lazy(x := torch.randn(4, 7))
    assert type(lazy) is nn.Linear and lazy.in_features == 7
    assert repr(lazy) == repr(torch.nn.Linear(7, 5))
    assert torch.equal(lazy(x), first)


def test_hooks_and_parametrizations_of_linear(monkeypatch):
    monkeypatch.setattr(dlkernels.config, "kernels", "own")
    layer, stock = nn.Linear(7, 5), torch.nn.Linear(7, 5)
    stock.load_state_dict(layer.state_dict())
    fired = []
    for module in (layer, stock):
        torch.nn.utils.parametrizations.weight_norm(module)
        module.register_forward_hook(lambda module, args, out: fired.append(module) or 2 * out)
        module.register_full_backward_hook(lambda module, *_: fired.append(module))
    x = torch.randn(4, 7, requires_grad=True)
    assert isinstance(layer, nn.Linear)
    outputs = layer(x), stock(x)
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*(torch.autograd.grad(out.sum(), x)[0] for out in outputs))
    assert fired == [layer, stock, layer, stock]


def test_refusals_of_linear_are_stocks():
    x = torch.randn(2, 4)
    for made, given in (
        ((4, 3), x[:, :3]),
        ((4, 3), x.double()),
        ((4, 3), x.sum()),
        ((4, 3), [1.0]),
    ):
        with pytest.raises((RuntimeError, TypeError)) as stock:
            torch.nn.Linear(*made)(given)
        with pytest.raises(stock.type) as ours:
            nn.Linear(*made)(given)
        assert str(ours.value).splitlines()[0] == str(stock.value).splitlines()[0]


# --- Conv2d, ConvTranspose2d ------------------------------------------------------------------

# Arguments after the channels, of both; and of one of them.
LAYERS = [
    ("Conv2d", (3,), {}),
    ("Conv2d", ((3, 2),), {"stride": 2, "padding": 1, "dilation": 2, "groups": 2, "bias": False}),
    ("Conv2d", (3,), {"padding": "same"}),
    ("Conv2d", ((2, 4),), {"padding": "same", "dilation": (1, 3)}),
    ("Conv2d", (3,), {"padding": (1, 2), "padding_mode": "reflect"}),
    ("Conv2d", (3,), {"padding": 2, "padding_mode": "replicate", "stride": 2}),
    ("Conv2d", ((3, 2),), {"padding": "same", "padding_mode": "circular"}),
    ("ConvTranspose2d", (3,), {}),
    ("ConvTranspose2d", (4,), {"stride": 3, "padding": 1, "output_padding": 2, "groups": 2}),
    ("ConvTranspose2d", (3,), {"bias": False, "dilation": 2}),
]
by_layer = pytest.mark.parametrize(("name", "arguments", "settings"), LAYERS)


def both(name, *arguments, **settings):
    """Stock's and ours, from one seed."""
    modules = []
    for namespace in (torch.nn, nn):
        torch.manual_seed(3)
        modules.append(getattr(namespace, name)(*arguments, **settings))
    return modules


@by_layer
def test_convolutions_are_stocks(name, arguments, settings, monkeypatch):
    monkeypatch.setattr(dlkernels.config, "kernels", "own")
    stock, ours = both(name, 4, 6, *arguments, **settings)
    assert isinstance(ours, type(stock))
    assert repr(ours) == repr(stock) and vars(ours).keys() == vars(stock).keys()
    for key, value in stock.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value)
    stock.load_state_dict(saved_and_loaded(ours.state_dict(), weights_only=True))
    ours.load_state_dict(stock.state_dict())
    for shape in ((2, 4, 9, 8), (4, 9, 8)):
        x = torch.randn(shape, requires_grad=True)
        outputs = stock(x), ours(x)
        torch.testing.assert_close(*outputs)
        upstream = torch.randn_like(outputs[0])
        pairs = (
            torch.autograd.grad(output, (x, *module.parameters()), upstream)
            for output, module in zip(outputs, (stock, ours), strict=True)
        )
        for a, b in zip(*pairs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["Conv2d", "ConvTranspose2d", "LazyConv2d", "LazyConvTranspose2d"])
def test_constructor_of_convolutions_is_stocks(name):
    ours, stock = getattr(nn, name), getattr(torch.nn, name)
    assert issubclass(ours, stock)
    assert inspect.signature(ours) == inspect.signature(stock)
    for wrong in ({"padding_mode": "mirror"}, {"groups": 0}):
        errors = []
        for module in (stock, ours):
            with pytest.raises(ValueError) as error:
                module(*(() if name.startswith("Lazy") else (4,)), 5, 3, **wrong)
            errors.append(str(error.value))
        assert errors[0] == errors[1]


@by_layer
@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda m: saved_and_loaded(m, weights_only=False)]
)
def test_copies_of_convolutions(again, name, arguments, settings):
    _, layer = both(name, 4, 6, *arguments, **settings)
    copied = again(layer)
    assert type(copied) is type(layer) and copied.weight is not layer.weight
    assert repr(copied) == repr(layer)
    x = torch.randn(2, 4, 9, 8)
    assert torch.equal(copied(x), layer(x))


@by_layer
def test_convolutions_hand_all_they_hold_to_the_function(name, arguments, settings, monkeypatch):
    _, layer = both(name, 4, 6, *arguments, **settings)
    function = {"Conv2d": "conv2d", "ConvTranspose2d": "conv_transpose2d"}[name]
    seen = []
    monkeypatch.setattr(nn.functional, function, lambda *arguments, **kept: seen.append(arguments))
    x = torch.randn(2, 4, 9, 8)
    layer(x)
    ((given, weight, bias, stride, padding, *rest),) = seen
    assert weight is layer.weight and bias is layer.bias and stride == layer.stride
    if name == "ConvTranspose2d":
        assert given is x and padding == layer.padding
        assert rest == [layer.output_padding, layer.groups, layer.dilation]
    elif layer.padding_mode == "zeros":
        assert given is x and padding == layer.padding
        assert rest == [layer.dilation, layer.groups]
    else:
        assert given.shape[-1] > x.shape[-1] and padding == (0, 0)


def test_the_size_of_a_transposed_convolution():
    stock, ours = both("ConvTranspose2d", 4, 6, 3, stride=3)
    x = torch.randn(2, 4, 5, 6)
    for size in ([16, 19], [2, 6, 15, 20], torch.Size([17, 18])):
        torch.testing.assert_close(ours(x, size), stock(x, size))
        assert ours(x, output_size=size).shape[-2:] == torch.Size(size[-2:])
    for wrong in ([14, 18], [15, 21], [15]):
        errors = []
        for module in (stock, ours):
            with pytest.raises(ValueError) as error:
                module(x, wrong)
            errors.append(str(error.value))
        assert errors[0] == errors[1]
    for module in (stock, ours):
        module.padding_mode = "reflect"
        with pytest.raises(ValueError, match="Only `zeros` padding mode"):
            module(x)


@pytest.mark.parametrize("name", ["Conv2d", "ConvTranspose2d"])
def test_lazy_convolutions_become_ours(name):
    lazy = getattr(nn, f"Lazy{name}")(6, 3, padding=1)
    assert lazy.has_uninitialized_params()
    x = torch.randn(2, 4, 7, 8)
    first = lazy(x)
    assert type(lazy) is getattr(nn, name) and lazy.in_channels == 4
    assert repr(lazy) == repr(getattr(torch.nn, name)(4, 6, 3, padding=1))
    torch.testing.assert_close(lazy(x), first)


def test_hooks_and_parametrizations_of_conv2d(monkeypatch):
    monkeypatch.setattr(dlkernels.config, "kernels", "own")
    stock, layer = both("Conv2d", 4, 6, 3)
    fired = []
    for module in (layer, stock):
        torch.nn.utils.parametrizations.spectral_norm(module)
        module.eval()
        module.register_forward_hook(lambda module, args, out: fired.append(module) or 2 * out)
    layer.load_state_dict(stock.state_dict())
    assert isinstance(layer, nn.Conv2d)
    x = torch.randn(2, 4, 7, 8)
    torch.testing.assert_close(layer(x), stock(x))
    assert fired == [layer, stock]


@pytest.mark.parametrize("name", ["Conv2d", "ConvTranspose2d"])
def test_refusals_of_convolutions_are_stocks(name):
    x = torch.randn(2, 4, 9, 8)
    for given in (x[:, :3], x[0, 0], x[None], x.double(), [1.0]):
        errors = []
        for module in both(name, 4, 6, 3):
            with pytest.raises((RuntimeError, TypeError, ValueError, AttributeError)) as error:
                module(given)
            errors.append((type(error.value), str(error.value).splitlines()[0]))
        assert errors[0] == errors[1]


# --- LinearCrossEntropyLoss -------------------------------------------------------------------

HEADS = [
    {},
    {"bias": True, "out_features": (2, 3), "reduction": "sum", "ignore_index": 1},
    {"weight": torch.rand(5), "label_smoothing": 0.1, "dtype": torch.float32},
]
needs_stocks = pytest.mark.skipif(
    not hasattr(torch.nn, "LinearCrossEntropyLoss"), reason="torch below 2.13"
)


@needs_stocks
@pytest.mark.parametrize("settings", HEADS)
def test_linear_cross_entropy_loss_is_stocks(settings):
    modules = []
    for namespace in (torch.nn, nn):
        torch.manual_seed(3)
        modules.append(namespace.LinearCrossEntropyLoss(7, 5, **settings))
    stock, ours = modules
    assert isinstance(ours, torch.nn.LinearCrossEntropyLoss)
    assert repr(ours) == repr(stock) and vars(ours).keys() == vars(stock).keys()
    assert list(ours.state_dict()) == list(stock.state_dict())
    for name, value in stock.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    stock.load_state_dict(saved_and_loaded(ours.state_dict(), weights_only=True))
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(4, 7, dtype=settings.get("dtype"))
    target = torch.randint(5, (4, *settings.get("out_features", ())))
    torch.testing.assert_close(ours(x, target), stock(x, target))


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda m: saved_and_loaded(m, weights_only=False)]
)
def test_copies_of_linear_cross_entropy_loss(again):
    loss = nn.LinearCrossEntropyLoss(7, 5, bias=True, ignore_index=2, softcap=9.0, z_loss=0.1)
    assert repr(loss).split("\n")[1 if "\n" in repr(loss) else 0].count("softcap=9.0, z_loss=0.1")
    copied = again(loss)
    assert type(copied) is nn.LinearCrossEntropyLoss
    assert copied.linear.weight is not loss.linear.weight
    assert (copied.softcap, copied.z_loss, copied.ignore_index) == (9.0, 0.1, 2)
    x, target = torch.randn(4, 7), torch.tensor([0, 2, 4, 1])
    assert torch.equal(copied(x, target), loss(x, target))


def test_linear_cross_entropy_loss_hands_every_setting_to_the_function(monkeypatch):
    seen = {}
    monkeypatch.setattr(
        nn.functional, "linear_cross_entropy", lambda *a, **k: seen.update(args=a, **k)
    )
    settings = {"weight": torch.rand(5), "ignore_index": 3, "reduction": "sum"}
    settings |= {"label_smoothing": 0.2, "softcap": 9.0, "z_loss": 0.1}
    module = nn.LinearCrossEntropyLoss(7, 5, bias=True, out_features=(2, 3), **settings)
    x, target = torch.randn(4, 7), torch.randint(5, (4, 2, 3))
    module(x, target)
    given, linear_weight, wanted = seen.pop("args")
    assert given is x and wanted is target
    assert linear_weight.shape == (5, 2, 3, 7)
    assert linear_weight.data_ptr() == module.linear.weight.data_ptr()
    assert seen.pop("linear_bias").shape == (5, 2, 3) and seen.pop("options") is None
    assert seen.pop("weight") is module.weight
    del settings["weight"]
    assert seen == settings


BELOW_TORCH_2_13 = """
import sys
import torch
from torch.nn import functional as F

Stock = torch.nn.LinearCrossEntropyLoss
del torch.nn.LinearCrossEntropyLoss, torch.nn.modules.LinearCrossEntropyLoss
stocks_function = F.linear_cross_entropy
del F.linear_cross_entropy

import dlkernels
from dlkernels import nn

assert not issubclass(nn.LinearCrossEntropyLoss, Stock)
more = {"bias": True, "out_features": (2, 3), "reduction": "sum", "ignore_index": 1}
for settings in {}, more, {"weight": torch.rand(5), "label_smoothing": 0.1}:
    modules = []
    for module in Stock, nn.LinearCrossEntropyLoss:
        torch.manual_seed(3)
        modules.append(module(7, 5, **settings))
    stock, ours = modules
    assert repr(ours) == repr(stock)
    assert list(ours.state_dict()) == list(stock.state_dict())
    for name, value in stock.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    x, target = torch.randn(4, 7), torch.randint(5, (4, *settings.get("out_features", ())))
    F.linear_cross_entropy = stocks_function  # stock's module calls it
    wanted = stock(x, target)
    del F.linear_cross_entropy
    for kernels in "own", "stock":
        dlkernels.config.kernels = kernels
        torch.testing.assert_close(ours(x, target), wanted)
for wrong in {"weight": torch.rand(4)}, {"label_smoothing": 1.5}:
    errors = []
    for module in Stock, nn.LinearCrossEntropyLoss:
        try:
            module(7, 5, **wrong)
        except Exception as error:
            errors.append(type(error))
    assert len(errors) == 2 and errors[0] is errors[1], errors
assert "LinearCrossEntropyLoss" not in {
    twin.stock.__name__ for twin in sys.modules["dlkernels.swap"].TWINS
}
"""


@needs_stocks
def test_linear_cross_entropy_loss_below_torch_2_13():
    """The class on a base of our own."""
    done = subprocess.run(
        [sys.executable, "-c", BELOW_TORCH_2_13], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# --- residual blocks --------------------------------------------------------------------------

# Identity and projection, with a stride and without, of each class.
BLOCKS = [
    ("ResidualBlock", (16, 16), {}),
    ("ResidualBlock", (16, 16), {"stride": 2, "bias": True}),
    ("ResidualBlock", (16, 24, 2), {}),
    ("ResBlk", (16, 16), {}),
    ("ResBlk", (16, 24, 3), {}),
    ("ResBlk", (16, 16, 2), {"strided_shortcut": True}),
    ("BottleneckBlock", (16, 4), {}),
    ("BottleneckBlock", (16, 8), {"stride": 2}),
]
by_block = pytest.mark.parametrize(("name", "arguments", "settings"), BLOCKS)
SHORTCUTS = {"ResidualBlock": "shortcut", "ResBlk": "extra", "BottleneckBlock": "downsample"}


@pytest.fixture
def own(monkeypatch):
    monkeypatch.setattr(dlkernels.config, "kernels", "own")


def both_blocks(name, *arguments, **settings):
    """Of torch's modules and ours, with the same weights, none of them 0 or 1."""
    stock = getattr(nn, f"Stock{name}")(*arguments, **settings)
    for module in stock.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for scale in (module.weight.data, module.running_var):
                scale.uniform_(0.5, 1.5)
            for shift in (module.bias.data, module.running_mean):
                shift.normal_(0, 0.2)
    ours = getattr(nn, name)(*arguments, **settings)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def ops_of(block, x):
    """The names of the public functions that a call takes."""
    with dlkernels.config.recording() as choices:
        block(x)
    return [choice.op for choice in choices]


@by_block
def test_residual_blocks_are_their_twins(name, arguments, settings):
    modules = []
    for cls in (f"Stock{name}", name):
        torch.manual_seed(3)
        modules.append(getattr(nn, cls)(*arguments, **settings))
    stock, ours = modules
    assert isinstance(ours, type(stock)) and vars(ours).keys() == vars(stock).keys()
    assert repr(ours).removeprefix(name) == repr(stock).removeprefix(f"Stock{name}")
    assert list(ours.state_dict()) == list(stock.state_dict())
    for key, value in stock.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    stock.load_state_dict(saved_and_loaded(ours.state_dict(), weights_only=True))
    ours.load_state_dict(stock.state_dict())
    assert {type(module).__module__.partition(".")[0] for module in stock.children()} == {"torch"}
    assert {type(module) for module in ours.children()} == {
        nn.Conv2d, nn.BatchNorm2d, nn.Sequential
    }  # fmt: skip


def test_names_and_shapes_of_residual_blocks():
    def of(block, *names):
        return {name: tuple(block.get_submodule(name).weight.shape) for name in names}

    block = nn.ResidualBlock(64, 128, 2)
    assert of(block, "conv1", "conv2", "shortcut.0", "shortcut.1") == {
        "conv1": (128, 64, 3, 3), "conv2": (128, 128, 3, 3), "shortcut.0": (128, 64, 1, 1),
        "shortcut.1": (128,),
    }  # fmt: skip
    assert not [key for key in block.state_dict() if key.endswith(("conv1.bias", "0.bias"))]
    assert (block.conv1.stride, block.conv2.stride) == ((2, 2), (1, 1))
    assert block.shortcut[0].stride == (2, 2)
    assert len(nn.ResidualBlock(64, 64).shortcut) == 0
    assert len(nn.ResidualBlock(64, 64, 2).shortcut) == 2
    block = nn.ResBlk(64, 128, stride=4)
    assert block(torch.randn(2, 64, 32, 32)).shape == (2, 128, 8, 8)
    assert {"conv1.bias", "conv2.bias", "extra.0.bias", "extra.1.bias"} <= set(block.state_dict())
    assert len(nn.ResBlk(64, 64, 2).extra) == 0
    keys = [key for key in nn.BottleneckBlock(64, 32, 2).state_dict() if key.endswith("weight")]
    assert keys == [
        "conv1.weight", "bn1.weight", "conv2.weight", "bn2.weight", "conv3.weight", "bn3.weight",
        "downsample.0.weight", "downsample.1.weight",
    ]  # fmt: skip
    block = nn.BottleneckBlock(64, 32, 2)
    assert block.conv2.stride == (2, 2) and block.conv3.weight.shape == (128, 32, 1, 1)


@by_block
def test_the_twin_is_the_definition(name, arguments, settings):
    """In torch's functions, in training."""
    stock, _ = both_blocks(name, *arguments, **settings)
    x, F = torch.randn(3, 16, 9, 8), torch.nn.functional
    tensors = stock.state_dict()
    stride = settings.get("stride", arguments[2] if len(arguments) > 2 else 1)

    def layer(x, conv, norm, stride):
        weight, bias = tensors[f"{conv}.weight"], tensors.get(f"{conv}.bias")
        x = F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2)
        return F.batch_norm(
            x, None, None, tensors[f"{norm}.weight"], tensors[f"{norm}.bias"], training=True
        )

    last, strided = (3, 2) if name == "BottleneckBlock" else (2, 1)
    y = x
    for at in range(1, last + 1):
        y = layer(y, f"conv{at}", f"bn{at}", stride if at == strided else 1)
        y = F.relu(y) if at < last else y
    around = SHORTCUTS[name]
    projects = f"{around}.0.weight" in tensors
    past = layer(x, f"{around}.0", f"{around}.1", stride) if projects else x
    torch.testing.assert_close(stock(x), F.relu(y + past))


def passed(block, x, upstream):
    """Output, gradients and running statistics of a call."""
    block = copy.deepcopy(block).to(x.dtype)
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    output = block(x)
    leaves = {"input": x, **dict(block.named_parameters())}
    gradients = torch.autograd.grad(output, list(leaves.values()), upstream.to(x.dtype))
    names = (f"grad {name}" for name in leaves)
    return {
        "output": output,
        **dict(zip(names, gradients, strict=True)),
        **dict(block.named_buffers()),
    }


@by_block
@pytest.mark.parametrize("mode", ["training", "eval", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_residual_blocks_compute_what_their_twins_do(
    name, arguments, settings, mode, dtype, own, monkeypatch
):
    """By the rule; what Winograd's convolutions round more is for the op's own tests."""
    monkeypatch.setattr(dlkernels.config, "winograd", "off")
    results = []
    for _ in range(12):  # of 16 channels: of few numbers stock gets some by luck
        stock, ours = both_blocks(name, *arguments, **settings)
        for block in (stock, ours):
            block.train(mode == "training")
            if mode == "frozen":  # the rest of the network trains
                block.training = True
        x = torch.randn(4, 16, 9, 8, dtype=dtype)
        if mode == "eval":
            x = x.contiguous(memory_format=torch.channels_last)
        assert ops_of(copy.deepcopy(ours).to(dtype), x) == ["residual_block"]
        upstream = torch.randn(stock(x.float()).shape, dtype=torch.float64)
        stock.load_state_dict(ours.state_dict())
        runs = (passed(ours, x, upstream), passed(stock, x, upstream))
        results.append((*runs, passed(stock, x.double(), upstream)))
    for key in results[0][0]:
        if key.endswith("num_batches_tracked"):
            assert results[0][0][key] == results[0][1][key] == (mode == "training")
            continue
        if mode == "training" and key.startswith("grad") and key.endswith((".bias", "0.bias")):
            if "conv" in key or key.endswith(".0.bias"):  # the norm takes it away
                assert (results[0][0][key] == 0).all()
                continue
        assert_no_worse(key, *([r[j][key] for r in results] for j in range(3)))


@pytest.mark.parametrize(
    "norm", [{"momentum": None}, {"track_running_stats": False}, {"affine": False}]
)
def test_a_block_s_batch_norms_count_as_torchs(norm, own):
    stock, ours = both_blocks("ResidualBlock", 16, 24, 2)
    for block, cls in ((stock, torch.nn.BatchNorm2d), (ours, nn.BatchNorm2d)):
        block.bn1, block.bn2 = cls(24, **norm), cls(24, **norm)
        block.shortcut[1] = cls(24, **norm)
    for step in range(3):
        x = torch.randn(3, 16, 8, 8)
        if step == 0:
            assert ops_of(copy.deepcopy(ours), x) == ["residual_block"]
        torch.testing.assert_close(ours(x), stock(x))
    assert list(ours.state_dict()) == list(stock.state_dict())
    for key, value in stock.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, msg=key)
    if "momentum" in norm:
        assert ours.bn2.num_batches_tracked == 3
    torch.testing.assert_close(ours.eval()(x), stock.eval()(x))


class Subclass(nn.BatchNorm2d):
    pass


UNFUSED = {
    "forward hook": lambda block: block.bn1.register_forward_hook(lambda *_: None),
    "pre-hook of the shortcut": lambda block: block.shortcut.register_forward_pre_hook(
        lambda *_: None
    ),
    "backward hook": lambda block: block.conv2.register_full_backward_hook(lambda *_: None),
    "hook inside the shortcut": lambda block: block.shortcut[1].register_forward_hook(
        lambda *_: None
    ),
    "parametrized": lambda block: torch.nn.utils.parametrizations.weight_norm(block.conv1),
    "subclass": lambda block: setattr(block, "bn2", Subclass(24)),
    "another module": lambda block: setattr(block, "bn1", torch.nn.GroupNorm(4, 24)),
    "two modes": lambda block: block.bn1.eval(),
    "two groups": lambda block: setattr(block.bn1, "process_group", "world"),
    "another padding": lambda block: setattr(block.conv2, "padding_mode", "reflect"),
    "another shortcut": lambda block: block.shortcut.append(torch.nn.ReLU()),
}


@pytest.mark.parametrize("change", UNFUSED)
def test_a_block_that_is_watched_or_changed_calls_its_modules(change, own):
    torch.manual_seed(5)
    _, ours = both_blocks("ResidualBlock", 16, 24, 2)
    x = torch.randn(3, 16, 8, 8)
    assert ops_of(copy.deepcopy(ours), x) == ["residual_block"]
    if change == "another padding":
        ours.conv2._reversed_padding_repeated_twice = [1, 1, 1, 1]
    UNFUSED[change](ours)
    stock = copy.deepcopy(ours)
    stock.__class__ = nn.StockResidualBlock
    assert "residual_block" not in ops_of(copy.deepcopy(ours), x)
    torch.testing.assert_close(ours(x), stock(x))


def test_a_hook_on_the_block_itself_leaves_it_one_op(own):
    _, ours = both_blocks("ResidualBlock", 16, 16)
    seen = []
    ours.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    assert ops_of(ours, torch.randn(2, 16, 6, 6)) == ["residual_block"]
    assert seen == [(2, 16, 6, 6)]


def test_a_branch_of_one_pixel_broadcasts_over_its_shortcut(own):
    stock, ours = both_blocks("ResBlk", 16, 16, 2)
    x = torch.randn(3, 16, 2, 2)
    assert "residual_block" not in ops_of(copy.deepcopy(ours), x)
    outputs = stock(x), ours(x)
    assert outputs[0].shape == (3, 16, 2, 2)
    torch.testing.assert_close(*outputs)
    with pytest.raises(RuntimeError, match="must match the size"):
        ours(torch.randn(3, 16, 6, 6))


def test_refusals_of_residual_blocks_are_stocks():
    for given in (
        torch.randn(16, 6, 6), torch.randn(2, 15, 6, 6), torch.randn(2, 16, 6, 6).double(),
        torch.randn(1, 16, 1, 1),
    ):  # fmt: skip
        errors = []
        for block in both_blocks("ResidualBlock", 16, 16):
            with pytest.raises((RuntimeError, ValueError)) as error:
                block(given)
            errors.append((type(error.value), str(error.value).splitlines()[0]))
        assert errors[0] == errors[1]


@by_block
@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda m: saved_and_loaded(m, weights_only=False)]
)
def test_copies_of_residual_blocks(again, name, arguments, settings, own):
    _, block = both_blocks(name, *arguments, **settings)
    copied = again(block)
    assert type(copied) is type(block) and repr(copied) == repr(block)
    assert copied.conv1.weight is not block.conv1.weight
    x = torch.randn(2, 16, 6, 6)
    assert torch.equal(copied(x), block(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "arguments", "settings"), [BLOCKS[0], BLOCKS[4], BLOCKS[7]])
def test_residual_blocks_are_compiled_and_exported(name, arguments, settings, training, own):
    _, block = both_blocks(name, *arguments, **settings)
    block.double().train(training)  # the op knows no running mean to take its sums about
    x = torch.randn(2, 16, 6, 6, dtype=torch.float64)
    exported = torch.export.export(copy.deepcopy(block), (x,))
    assert "dlkernels.residual_block" in str(exported.graph)
    eager, traced = copy.deepcopy(block), copy.deepcopy(block)
    compiled = torch.compile(traced, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(exported.module()(x), copy.deepcopy(block)(x))
    for _ in range(2):
        eager.zero_grad(), traced.zero_grad()
        outputs = [run(x) for run in (eager, compiled)]
        torch.testing.assert_close(*outputs)
        upstream = torch.randn_like(outputs[0])
        for output in outputs:
            output.backward(upstream)
        for a, b in zip(eager.parameters(), traced.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
    for (key, a), b in zip(eager.state_dict().items(), traced.state_dict().values(), strict=True):
        if not (key == "bn1.num_batches_tracked" and training):
            torch.testing.assert_close(a, b, msg=key)


@pytest.mark.parametrize(
    ("arguments", "part"), [((64, 64), 0.65), ((64, 128, 2), 0.75)], ids=["identity", "projection"]
)
def test_what_residual_blocks_keep_for_the_backward(arguments, part, own):
    """In distinct storages, the input included and parameters not."""
    kept = []
    for block in both_blocks("ResidualBlock", *arguments):
        parameters = {p.untyped_storage().data_ptr() for p in block.parameters()}
        storages = {}

        def pack(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.randn(4, 64, 16, 16).contiguous(memory_format=torch.channels_last)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = block(x.requires_grad_())
        kept.append(sum(size for at, size in storages.items() if at not in parameters))
        del output
    assert 0 < kept[1] <= part * kept[0]


def test_swap_explain_and_verify_know_residual_blocks(own):
    stock = torch.nn.Sequential(nn.StockResidualBlock(16, 24, 2), nn.StockBottleneckBlock(24, 6))
    keys, x = list(stock.state_dict()), torch.randn(3, 16, 8, 8)
    wanted = stock.eval()(x)
    model = dlkernels.swap(stock)
    assert [type(block) for block in model] == [nn.ResidualBlock, nn.BottleneckBlock]
    torch.testing.assert_close(model(x), wanted)
    assert list(model.state_dict()) == keys
    rows = {row.name: row for row in dlkernels.explain(model, x)}
    assert rows["0"].kernel == f"cpu/{dlkernels.config.libraries['cpu']}"
    for name in ("0.conv1", "0.bn2", "0.shortcut.0", "0.shortcut.1", "1.conv3", "1.bn3"):
        assert (rows[name].kernel, rows[name].reason[:9]) == ("fused", "a part of")
    model[0].bn1.register_forward_hook(lambda *_: None)
    rows = {row.name: row for row in dlkernels.explain(model, x)}
    assert "0" not in rows and rows["0.conv1"].kernel == rows["1"].kernel
    verified = dlkernels.verify(model.train(), x.double().float(), strict=False)
    blocks = {(row.name, row.what): row for row in verified if row.name in ("0", "1")}
    assert ("0", "grad shortcut.0.weight") in blocks and ("1", "grad conv3.weight") in blocks
    assert all(row.error < 1e-3 for row in blocks.values())
    assert {type(block) for block in dlkernels.unswap(model)} == {
        nn.StockResidualBlock, nn.StockBottleneckBlock
    }  # fmt: skip
    assert dlkernels.swap(model, ops=["residual_block"])[0].conv1.__class__ is torch.nn.Conv2d


SYNC = """
import copy
from dlkernels import nn

def total(x):
    x = x.clone()
    dist.all_reduce(x)
    return x

# Batches of 4 and 5 images, of none and 9; in "auto" one is small, and the other is not.
for kernels, cut, channels in (("own", 4, 8), ("own", 0, 8), ("stock", 4, 8), ("auto", 1, 32)):
    dlkernels.config.kernels = kernels
    for make in (nn.ResidualBlock, nn.ResBlk, nn.BottleneckBlock):
        torch.manual_seed(0)
        one = make(channels, channels // (4 if make is nn.BottleneckBlock else 1))
        if cut == 4:
            one = make(channels, 12, stride=2)
        one.double()
        two = copy.deepcopy(one)
        nn.convert_sync_batchnorm(two, dist.group.WORLD if cut else None)
        part = slice(cut) if rank == 0 else slice(cut, None)
        for _ in range(2):
            x = torch.randn(9, channels, 7, 6, dtype=torch.float64)
            results = []
            for block, cut_of in ((one, slice(None)), (two, part)):
                block.zero_grad()
                leaf = x[cut_of].clone().requires_grad_()
                with dlkernels.config.recording() as choices:
                    y = block(leaf)
                torch.manual_seed(1)
                upstream = torch.randn(9, *y.shape[1:], dtype=torch.float64)
                y.backward(upstream[cut_of])
                results.append([y, leaf.grad])
            if kernels == "own":
                taken = [c.kernel for c in choices if c.op == "residual_block"]
                assert taken == ["parts" if cut == 0 else dlkernels.config.owner("cpu")], choices
            for a, b in zip(*results):
                torch.testing.assert_close(a[part], b)
            for (name, a), b in zip(one.named_parameters(), two.parameters()):
                torch.testing.assert_close(a.grad, total(b.grad), msg=name)
        for (name, a), b in zip(one.state_dict().items(), two.state_dict().values()):
            torch.testing.assert_close(a, b, msg=name)
        torch.testing.assert_close(one.eval()(x), two.eval()(x))
        print("equal")
world = dist.group.WORLD
block = nn.ResidualBlock(8, 12, 2, process_group=world)
assert all(norm.process_group is world for norm in (block.bn1, block.bn2, block.shortcut[1]))
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_residual_blocks_of_two_processes_equal_one_on_the_whole_batch(tmp_path):
    for printed in processes.run(SYNC, tmp_path):
        assert printed == ["equal"] * 12


# ------------------------------------------------------------------------- what a backward computes

WANTED = {  # of which bools at the end of a backward's arguments it is told
    "conv2d": lambda: nn.Conv2d(4, 6, 3),
    "conv_transpose2d": lambda: nn.ConvTranspose2d(4, 6, 3),
    "conv2d_max_pool2d": lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.MaxPool2d(2)),
    "linear": lambda: nn.Linear(8, 6),
    "batch_norm": lambda: nn.BatchNorm2d(4),
}


@pytest.mark.parametrize("op", WANTED)
def test_what_nobody_asks_a_backward_for_is_not_computed(op, own, monkeypatch):
    """As stock's nodes: by torch.autograd.grad of some tensors, and by backward(inputs=...)."""
    module = importlib.import_module(
        f"dlkernels.ops.{'conv2d' if op == 'conv_transpose2d' else op}"
    )
    told = []

    class Spy:
        def __getattr__(self, name, ops=module._ops):
            raw = getattr(ops, name)
            if name != f"{op}_backward":
                return raw
            return lambda *arguments: told.append(arguments[-3:]) or raw(*arguments)

    monkeypatch.setattr(module, "_ops", Spy())
    ours = WANTED[op]()
    weight, bias = ours.parameters()
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    y = ours(x * 1)
    # Of batch_norm the three are weight, bias and residual.
    first = () if op == "batch_norm" else (True,)
    last = (False,) if op == "batch_norm" else ()

    def told_by(call):
        told.clear()
        call()
        return told

    def grad(*inputs):
        return torch.autograd.grad(y.sum(), inputs, retain_graph=True)

    no_input = tuple(not want for want in first)
    assert told_by(lambda: grad(x)) == [(*first, False, False, *last)]
    # Of leaves it is known that some are asked for, not which of those behind the first.
    assert told_by(lambda: grad(weight)) == [(*no_input, True, True, *last)]
    assert told_by(lambda: grad(bias)) == [(*no_input, False, True, *last)]
    assert told_by(lambda: grad(weight, bias)) == [(*no_input, True, True, *last)]
    assert told_by(lambda: y.sum().backward(retain_graph=True)) == [(*first, True, True, *last)]
    assert told_by(lambda: y.sum().backward(inputs=[x], retain_graph=True)) == [
        (*first, False, False, *last)
    ]


def test_a_residual_block_computes_what_is_asked_for(own, monkeypatch):
    module = importlib.import_module("dlkernels.ops.residual_block")
    told = []
    backward = module._backward
    monkeypatch.setattr(
        module, "_backward", lambda *a: told.append((a[-2], any(a[-1]))) or backward(*a)
    )
    block = nn.ResidualBlock(16, 16)
    x = torch.randn(2, 16, 8, 8, requires_grad=True)
    y = block(x * 1)
    torch.autograd.grad(y.sum(), x, retain_graph=True)
    torch.autograd.grad(y.sum(), block.conv1.weight, retain_graph=True)
    y.sum().backward()
    assert told == [(True, False), (False, True), (True, True)]
