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
    ours = {"CrossEntropyLoss", "LazyLinear", "Linear", "LinearCrossEntropyLoss", "functional"}
    ours |= {"Conv2d", "ConvTranspose2d", "LazyConv2d", "LazyConvTranspose2d", "Sequential"}
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
    monkeypatch.setattr(nn.functional, function, lambda *arguments: seen.append(arguments))
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
