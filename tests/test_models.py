"""The documented networks: parameters, keys, shapes, recipes, and training beside their twins."""

import copy
import math
import pickle

import pytest
import torch

import dlkernels.nn
from dlkernels import config, data, train
from dlkernels.models import NETWORKS


def layers(**shapes):
    """The keys of layers with a weight of this shape and a bias."""
    keys = {}
    for name, shape in shapes.items():
        keys |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return keys


def inception(name, channels):
    """The keys of an Inception block."""
    return layers(
        **{
            f"{name}.branch1x1": (16, channels, 1, 1),
            f"{name}.branch5x5_1": (16, channels, 1, 1),
            f"{name}.branch5x5_2": (24, 16, 5, 5),
            f"{name}.branch3x3_1": (16, channels, 1, 1),
            f"{name}.branch3x3_2": (24, 16, 3, 3),
            f"{name}.branch3x3_3": (24, 24, 3, 3),
            f"{name}.branch_pool": (24, channels, 1, 1),
        }
    )


def norm(name, channels):
    """The keys of a batch norm."""
    keys = layers(**{name: (channels,)})
    keys |= {f"{name}.running_mean": (channels,), f"{name}.running_var": (channels,)}
    return keys | {f"{name}.num_batches_tracked": ()}


def residual(name, before, after, shortcut, *, bias, projects):
    """The keys of a residual block."""
    keys = {}
    for conv, bn, shape in (
        ("conv1", "bn1", (after, before, 3, 3)),
        ("conv2", "bn2", (after, after, 3, 3)),
        (f"{shortcut}.0", f"{shortcut}.1", (after, before, 1, 1)),
    ):
        if conv[:4] == "conv" or projects:
            keys |= layers(**{f"{name}.{conv}": shape})
            if not bias:
                del keys[f"{name}.{conv}.bias"]
            keys |= norm(f"{name}.{bn}", after)
    return keys


def resnet18_cifar():
    keys = {"conv1.weight": (64, 3, 3, 3), **norm("bn1", 64)}
    for i, (before, after) in enumerate(((64, 64), (64, 128), (128, 256), (256, 512)), 1):
        for at, channels in enumerate((before, after)):
            keys |= residual(
                f"block{i}.{at}",
                channels,
                after,
                "shortcut",
                bias=False,
                projects=channels != after,
            )
    return keys | layers(linear=(10, 512))


def four_blocks(channels, outlayer):
    """The keys of resnet18_light and of resnet18_pokemon."""
    keys = layers(**{"conv1.0": (channels[0], 3, 3, 3)}) | norm("conv1.1", channels[0])
    for i, (before, after) in enumerate(zip(channels, channels[1:], strict=False), 1):
        keys |= residual(f"blk{i}", before, after, "extra", bias=True, projects=before != after)
    return keys | layers(outlayer=outlayer)


def recurrent(name, gates, *sizes, suffixes=("",)):
    """The keys of a cell, or with suffixes of the layers and directions of a whole one."""
    keys = {}
    inputs, hidden = sizes
    for at, suffix in enumerate(suffixes):
        features = inputs if at < 2 else 2 * hidden
        keys |= {
            f"{name}.weight_ih{suffix}": (gates * hidden, features),
            f"{name}.weight_hh{suffix}": (gates * hidden, hidden),
            f"{name}.bias_ih{suffix}": (gates * hidden,),
            f"{name}.bias_hh{suffix}": (gates * hidden,),
        }
    return keys


# name: parameters, then each key and its shape.
GOLDEN = {
    "diabetes_logistic": (9, layers(linear=(1, 8))),
    "diabetes_mlp": (87, layers(linear1=(6, 8), linear2=(4, 6), linear3=(1, 4))),
    "inception_net": (
        97_298,
        {
            **layers(conv1=(10, 1, 5, 5)),
            **inception("inception1", 10),
            **layers(conv2=(20, 88, 5, 5)),
            **inception("inception2", 20),
            **layers(fc=(10, 1408)),
        },
    ),
    "lenet": (
        61_706,
        layers(
            conv1=(6, 1, 5, 5), conv2=(16, 6, 5, 5), fc1=(120, 400), fc2=(84, 120), fc3=(10, 84)
        ),
    ),
    "lenet5_cifar": (
        40_010,
        layers(
            **{
                "conv_unit.0": (16, 3, 5, 5),
                "conv_unit.2": (32, 16, 5, 5),
                "fc_unit.0": (32, 800),
                "fc_unit.2": (10, 32),
            }
        ),
    ),
    "linear_regression": (2, layers(linear=(1, 1))),
    "logistic_regression": (2, layers(linear=(1, 1))),
    "mlp200": (
        199_210,
        {
            "w1": (200, 784),
            "b1": (200,),
            "w2": (200, 200),
            "b2": (200,),
            "w3": (10, 200),
            "b3": (10,),
        },
    ),
    "mlp200_leaky": (
        199_210,
        layers(**{"model.0": (200, 784), "model.2": (200, 200), "model.4": (10, 200)}),
    ),
    "mlp256": (203_530, layers(hidden=(256, 784), output=(10, 256))),
    "mnist_cnn": (8_490, layers(conv1=(10, 1, 5, 5), conv2=(20, 10, 5, 5), fc=(10, 320))),
    "mnist_mlp": (
        575_050,
        layers(l1=(512, 784), l2=(256, 512), l3=(128, 256), l4=(64, 128), l5=(10, 64)),
    ),
    "resnet18_cifar": (11_173_962, resnet18_cifar()),
    "resnet18_light": (9_553_674, four_blocks((64, 128, 256, 512, 512), (10, 512))),
    "resnet18_pokemon": (1_234_885, four_blocks((16, 32, 64, 128, 256), (5, 256 * 9))),
    "sentiment_lstm": (
        3_310_857,
        {
            "embedding.weight": (10_002, 100),
            **recurrent("rnn", 4, 100, 256, suffixes=("_l0", "_l0_reverse", "_l1", "_l1_reverse")),
            **layers(fc=(1, 512)),
        },
    ),
    "sine_rnn": (321, {**recurrent("rnn", 1, 1, 16, suffixes=("_l0",)), **layers(linear=(1, 16))}),
    "two_cell_lstm": (
        20_000,
        {**recurrent("cell1", 4, 100, 30), **recurrent("cell2", 4, 30, 20)},
    ),
    "two_cell_rnn": (5_000, {**recurrent("cell1", 1, 100, 30), **recurrent("cell2", 1, 30, 20)}),
}

# name: data, loss and its arguments, learning rate, momentum, batch, epochs of the documents; None
# where they leave it open.
RECIPES = {
    "diabetes_logistic": ("diabetes", "BCELoss", {}, 0.1, 0.0, None, 100),
    "diabetes_mlp": ("diabetes", "BCELoss", {}, 0.1, 0.0, 32, 100),
    "inception_net": ("images", "CrossEntropyLoss", {}, 0.01, 0.5, 64, None),
    "lenet": ("images", "CrossEntropyLoss", {}, None, 0.5, 64, None),
    "lenet5_cifar": ("cifar10", "CrossEntropyLoss", {}, 1e-3, None, 128, 1000),
    "linear_regression": ("line", "MSELoss", {"reduction": "sum"}, 0.01, 0.0, 3, 100),
    "logistic_regression": ("step", "BCELoss", {"reduction": "sum"}, 0.01, 0.0, 3, 1000),
    "mlp200": ("images", "CrossEntropyLoss", {}, 0.01, 0.0, 200, 10),
    "mlp200_leaky": ("images", "CrossEntropyLoss", {}, 0.01, 0.0, 200, 10),
    "mlp256": ("images", "CrossEntropyLoss", {}, None, None, None, None),
    "mnist_cnn": ("images", "CrossEntropyLoss", {}, 0.01, 0.5, 64, None),
    "mnist_mlp": ("images", "CrossEntropyLoss", {}, 0.01, 0.5, 64, 10),
    "resnet18_cifar": ("cifar10", "CrossEntropyLoss", {}, 0.1, 0.9, 128, 200),
    "resnet18_light": ("cifar10", "CrossEntropyLoss", {}, 1e-3, None, 128, 1000),
    "resnet18_pokemon": ("folders", "CrossEntropyLoss", {}, 1e-3, None, 32, 10),
    "sentiment_lstm": ("text", "BCEWithLogitsLoss", {}, 1e-3, None, 30, None),
    "sine_rnn": ("sine", "MSELoss", {}, 0.01, None, 1, 1),
    "two_cell_lstm": ("vectors", "CrossEntropyLoss", {}, None, None, None, None),
    "two_cell_rnn": ("vectors", "CrossEntropyLoss", {}, None, None, None, None),
}

# name: optimiser, mean and std of its pixels; of the others SGD and MNIST's.
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OTHERS = {
    "lenet5_cifar": ("Adam", *IMAGENET),
    "resnet18_cifar": ("SGD", (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "resnet18_light": ("Adam", *IMAGENET),
    "resnet18_pokemon": ("Adam", *IMAGENET),
}
OTHERS |= {
    name: ("Adam", 0.1307, 0.3081)
    for name in ("sentiment_lstm", "sine_rnn", "two_cell_lstm", "two_cell_rnn")
}
RESNETS = [name for name in NETWORKS if name.startswith("resnet")]

network = pytest.mark.parametrize("network", sorted(NETWORKS))
namespace = pytest.mark.parametrize("nn", [torch.nn, dlkernels.nn], ids=["stock", "ours"])


def input_shape(recipe):
    """Of one example."""
    image = recipe.channels, recipe.image_size, recipe.image_size
    images = dict.fromkeys(("images", "cifar10", "folders"), image)
    others = {"diabetes": (8,), "sine": (7, 1), "vectors": (5, 100), "text": (6,)}
    return {**images, **others}.get(recipe.data, (1,))


def inputs_of(recipe, batch):
    """Random ones."""
    if recipe.data == "text":
        return torch.randint(1, 10_002, (batch, *input_shape(recipe)))
    return torch.randn(batch, *input_shape(recipe))


def outputs_of(model, x):
    outputs = model(x)
    return outputs[0] if model.recipe.carries_state else outputs


def test_every_network_has_golden_values():
    assert sorted(NETWORKS) == sorted(GOLDEN) == sorted(RECIPES)


@network
@namespace
def test_parameters_and_keys(network, nn):
    model = NETWORKS[network](nn=nn)
    count, expected = GOLDEN[network]
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == expected
    assert list(model.state_dict()) == list(expected)
    assert sum(p.numel() for p in model.parameters()) == count


@network
@namespace
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_outputs_have_one_row_per_example(network, nn, batch):
    if network == "sentiment_lstm" and not batch:
        pytest.skip("torch packs no empty batch")
    cls = NETWORKS[network]
    rest = {"vectors": (20,), "sine": (7, 1)}.get(cls.recipe.data)
    rest = rest or (cls.recipe.classes if len(input_shape(cls.recipe)) == 3 else 1,)
    outputs = outputs_of(cls(nn=nn).eval(), inputs_of(cls.recipe, batch))
    assert outputs.shape == (batch, *rest)


@namespace
def test_what_comes_out_of_the_convolutions(nn):
    """The documented sizes between the layers."""
    sizes = {}

    def note(name):
        return lambda module, inputs, output: sizes.update({name: tuple(output.shape[1:])})

    model = NETWORKS["inception_net"](nn=nn)
    for name in ("conv1", "inception1", "conv2", "inception2"):
        getattr(model, name).register_forward_hook(note(name))
    model(torch.randn(2, 1, 28, 28))
    assert sizes == {
        "conv1": (10, 24, 24),
        "inception1": (88, 12, 12),
        "conv2": (20, 8, 8),
        "inception2": (88, 4, 4),
    }
    assert NETWORKS["lenet5_cifar"](nn=nn).conv_unit(torch.randn(2, 3, 32, 32)).shape == (
        2, 32, 5, 5
    )  # fmt: skip


@namespace
@pytest.mark.parametrize(
    ("network", "sizes"),
    [
        ("resnet18_cifar", {"bn1": 32, "block1": 32, "block2": 16, "block3": 8, "block4": 4}),
        ("resnet18_light", {"conv1": 10, "blk1": 5, "blk2": 3, "blk3": 2, "blk4": 2}),
        ("resnet18_pokemon", {"conv1": 74, "blk1": 25, "blk2": 9, "blk3": 5, "blk4": 3}),
    ],
)
def test_sizes_along_a_resnet(network, sizes, nn):
    seen = {}
    model = NETWORKS[network](nn=nn).eval()
    for name in sizes:
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: output.shape[2:]})
        )
    model(torch.randn(1, *input_shape(model.recipe)))
    assert seen == {name: (size, size) for name, size in sizes.items()}


def test_the_last_block_of_resnet18_light_with_a_strided_shortcut():
    cls = NETWORKS["resnet18_light"]
    for nn in (torch.nn, dlkernels.nn):
        model = cls(nn=nn, strided_shortcut=True).eval()
        more = set(model.state_dict()) - set(cls(nn=nn).state_dict())
        blocks = (
            residual("blk4", 512, 512, "extra", bias=True, projects=projects)
            for projects in (True, False)
        )
        assert more == set.difference(*map(set, blocks))
        assert model._features(torch.randn(2, 3, 32, 32)).shape == (2, 512, 1, 1)


@pytest.mark.parametrize("network", RESNETS)
def test_resnets_run_on_their_blocks(network, monkeypatch):
    """In training and in eval every block is one op but the one that broadcasts."""
    monkeypatch.setattr(config, "kernels", "own")
    model = NETWORKS[network]()
    x = torch.randn(2, *input_shape(model.recipe))
    for mode in (True, False):
        with config.recording() as choices:
            model.train(mode)(x)
        taken = [c.kernel for c in choices if c.op == "residual_block"]
        blocks = {"resnet18_cifar": 8, "resnet18_light": 3, "resnet18_pokemon": 4}[network]
        assert taken == [config.owner("cpu")] * blocks


def test_the_schedule_of_resnet18_cifar():
    side, _ = train.twins("resnet18_cifar", 0, torch.device("cpu"))
    assert side.optimiser.param_groups[0]["weight_decay"] == 5e-4
    rates = []
    for _ in range(201):
        rates.append(side.optimiser.param_groups[0]["lr"])
        side.optimiser.step()
        side.schedule.step()
    assert rates[149] == 0.1 and rates[150] == rates[199] == pytest.approx(0.01)
    assert rates[200] == pytest.approx(0.001)


def test_an_inception_block_is_its_four_branches_in_order():
    from dlkernels.models.inception_net import Inception

    block, x = Inception(3, nn=torch.nn), torch.randn(2, 3, 5, 6)
    got = block(x).split([16, 24, 24, 24], 1)

    def through(x, *names):
        for name in names:
            layer = getattr(block, name)
            x = torch.nn.functional.conv2d(x, layer.weight, layer.bias, padding=layer.padding)
        return x

    mean = torch.nn.functional.conv2d(  # over nine pixels, also where some lie outside
        x, torch.full((3, 1, 3, 3), 1 / 9), padding=1, groups=3
    )
    for branch, wanted in zip(
        got,
        (
            through(x, "branch1x1"),
            through(x, "branch5x5_1", "branch5x5_2"),
            through(x, "branch3x3_1", "branch3x3_2", "branch3x3_3"),
            through(mean, "branch_pool"),
        ),
        strict=True,
    ):
        torch.testing.assert_close(branch, wanted)


@network
def test_default_namespace_is_ours(network):
    assert repr(NETWORKS[network]()) == repr(NETWORKS[network](nn=dlkernels.nn))
    loss = train.twins(network, 0, torch.device("cpu"))[1].loss
    assert type(loss) is getattr(dlkernels.nn, NETWORKS[network].recipe.loss)


@network
def test_recipe_is_the_documented_one(network):
    recipe = NETWORKS[network].recipe
    ours = recipe.data, recipe.loss, recipe.loss_arguments, recipe.lr, recipe.momentum
    ours = *ours, recipe.batch_size, recipe.epochs
    for value, wanted in zip(ours, RECIPES[network], strict=True):
        assert value == wanted or wanted is None
    wanted = OTHERS.get(network, ("SGD", 0.1307, 0.3081))
    assert (recipe.optimiser, recipe.mean, recipe.std) == wanted
    if network == "diabetes_logistic":
        assert recipe.batch_size is None  # all of the set


@network
@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_networks_are_copied_and_pickled(network, again):
    model = NETWORKS[network]()
    copied = again(model)
    assert repr(copied) == repr(model)
    for (key, a), b in zip(model.state_dict().items(), copied.state_dict().values(), strict=True):
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr(), key


def test_mlp200_starts_as_documented():
    """Kaiming-normal weights for a ReLU, std √(2/inputs), and zero biases."""
    model = NETWORKS["mlp200"]()
    for i, inputs in ((1, 784), (2, 200), (3, 200)):
        weight, bias = getattr(model, f"w{i}"), getattr(model, f"b{i}")
        assert (bias == 0).all()
        assert weight.std().item() == pytest.approx((2 / inputs) ** 0.5, rel=0.1)
        assert weight.mean().abs() < 4 * weight.std() / weight.numel() ** 0.5


@network
def test_what_stands_behind_the_last_layer(network):
    """The documented activation on the outputs: a ReLU on logits is kept."""
    cls = NETWORKS[network]
    model = cls(nn=torch.nn).eval()
    outputs = outputs_of(model, inputs_of(cls.recipe, 20))
    if cls.recipe.loss == "BCELoss":
        assert (0 < outputs).all() and (outputs < 1).all()
    elif network == "mlp200":
        assert (outputs >= 0).all() and (outputs == 0).any()
    else:
        negative = -outputs[outputs < 0]
        assert len(negative) > 0 or network == "linear_regression"
        if network == "mlp200_leaky":
            assert negative.max() < 0.1 * outputs.max()


@network
def test_one_seed_gives_both_namespaces_the_same_weights(network):
    weights = []
    for nn in (torch.nn, dlkernels.nn):
        torch.manual_seed(3)
        weights.append(NETWORKS[network](nn=nn).state_dict())
    assert list(weights[0]) == list(weights[1])
    for key in weights[0]:
        assert torch.equal(weights[0][key], weights[1][key]), key


def batches(examples, size, steps):
    """Of few examples all of them at each step, else shuffled."""
    count = len(examples.train_inputs)
    for _ in range(steps):
        chosen = torch.randperm(count)[: min(size or count, 64)]
        yield examples.train_inputs[chosen], examples.train_targets[chosen]


@pytest.mark.parametrize("network", sorted(set(NETWORKS) - set(RESNETS) - {"sentiment_lstm"}))
def test_loss_curve_is_as_close_to_float64_as_stock(network, monkeypatch):
    """20 steps of stock, ours and a float64 twin from the same weights, on the same batches.

    Both float32 curves leave the exact one by rounding that the steps amplify alike. Ours may be
    off by twice what stock is, and one ulp of the largest loss: the rule for single ops, since the
    twins differ in nothing but our ops. In the maximum and in the root mean square, of three runs
    together. "own", since "auto" may leave so little work to stock.
    """
    monkeypatch.setattr(config, "kernels", "own")
    recipe = NETWORKS[network].recipe
    examples = data.load_for(recipe)
    differences = {"stock": [], "ours": []}
    highest = 0.0
    for seed in (7, 8, 9):
        stock, ours = train.twins(network, seed, torch.device("cpu"))
        exact, _ = train.twins(network, seed, torch.device("cpu"))
        exact.model.double()
        for x, y in batches(examples, recipe.batch_size, 20):
            train.step(stock, x, y)
            train.step(ours, x, y)
            train.step(exact, x.double(), y.double() if y.is_floating_point() else y)
        assert len(exact.losses) == 20
        # It trains: the comparison is not of a standstill.
        assert len(set(exact.losses)) == 20 or network.endswith("regression")
        for name, side in (("stock", stock), ("ours", ours)):
            pairs = zip(side.losses, exact.losses, strict=True)
            differences[name] += [abs(a - b) for a, b in pairs]
        highest = max(highest, *exact.losses)

    def errors(name):
        return max(differences[name]), math.sqrt(sum(d * d for d in differences[name]) / 60)

    ulp = highest * torch.finfo(torch.float32).eps
    for ours_error, stock_error in zip(errors("ours"), errors("stock"), strict=True):
        assert ours_error <= 2 * stock_error + ulp


@pytest.mark.parametrize("network", RESNETS)
def test_loss_curve_of_a_resnet_is_stocks(network, monkeypatch):
    """20 steps of few images, of which the last ones fit: ours leaves the float64 curve by no more
    than the spread of stock in another layout and order of the batch, which the steps amplify."""
    monkeypatch.setattr(config, "kernels", "own")
    recipe = NETWORKS[network].recipe
    images = torch.randn(8, *input_shape(recipe))
    targets = torch.arange(8) % recipe.classes
    stock, ours = train.twins(network, 7, torch.device("cpu"))
    other, _ = train.twins(network, 7, torch.device("cpu"))
    exact, _ = train.twins(network, 7, torch.device("cpu"))
    exact.model.double()
    turned = images.flip(0).contiguous(memory_format=torch.channels_last)
    for _ in range(20):
        train.step(stock, images, targets)
        train.step(ours, images, targets)
        train.step(other, turned, targets.flip(0))
        train.step(exact, images.double(), targets)

    def away(side):
        pairs = zip(side.losses, exact.losses, strict=True)
        return max(abs(a - b) for a, b in pairs)

    assert exact.losses[-1] < exact.losses[0]
    ulp = max(exact.losses) * torch.finfo(torch.float32).eps
    assert away(ours) <= 4 * max(away(stock), away(other)) + ulp


# ------------------------------------------------------------- values of the documents, recomputed


def trained(network, nn, epochs, weight, bias):
    cls = NETWORKS[network]
    recipe, examples = cls.recipe, data.load_for(cls.recipe)
    model = cls(nn=nn)
    torch.nn.init.constant_(model.linear.weight, weight)
    torch.nn.init.constant_(model.linear.bias, bias)
    loss = getattr(nn, recipe.loss)(**recipe.loss_arguments)
    optimiser = torch.optim.SGD(model.parameters(), lr=recipe.lr, momentum=recipe.momentum)
    losses = []
    for _ in range(epochs):
        optimiser.zero_grad()
        value = loss(model(examples.train_inputs), examples.train_targets)
        value.backward()
        optimiser.step()
        losses.append(value.item())
    return model, losses


@namespace
def test_linear_regression_predicts_what_the_documents_print(nn, monkeypatch):
    monkeypatch.setattr(config, "kernels", "own")
    for epochs, prediction in ((100, 7.8642), (1000, 7.9998)):
        model, _ = trained("linear_regression", nn, epochs, 1.0, 0.0)
        asked = data.load_for(NETWORKS["linear_regression"].recipe).test_inputs
        assert model(asked).item() == pytest.approx(prediction, abs=1e-4)


@namespace
def test_logistic_regression_learns_what_the_documents_print(nn, monkeypatch):
    monkeypatch.setattr(config, "kernels", "own")
    model, losses = trained("logistic_regression", nn, 1000, 0.0, 0.0)
    assert losses[0] == pytest.approx(2.0794415, abs=1e-6)
    assert losses[-1] == pytest.approx(1.0463302, abs=1e-4)
    assert model.linear.weight.item() == pytest.approx(1.1989502, abs=1e-4)
    assert model.linear.bias.item() == pytest.approx(-2.8964312, abs=1e-4)


@namespace
def test_a_line_through_the_origin(nn, monkeypatch):
    """y = w·x by full batches of the mean square, from w = 1."""
    monkeypatch.setattr(config, "kernels", "own")
    examples = data.load_for(NETWORKS["linear_regression"].recipe)
    model, loss = nn.Linear(1, 1, bias=False), nn.MSELoss()
    torch.nn.init.ones_(model.weight)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    losses, weights = [], []
    for _ in range(100):
        optimiser.zero_grad()
        value = loss(model(examples.train_inputs), examples.train_targets)
        value.backward()
        optimiser.step()
        losses.append(value.item())
        weights.append(model.weight.item())
    assert losses[:2] == pytest.approx([4.6666667, 3.8362074], abs=1e-6)
    assert weights[0] == pytest.approx(1.0933333, abs=1e-6)
    assert weights[-1] == pytest.approx(1.9999444, abs=1e-6)
    assert model(examples.test_inputs).item() == pytest.approx(7.9997778, abs=2e-6)


# ------------------------------------------------------------------------------ recurrent networks


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_sentiment_lstm_trains_as_stock(packed, monkeypatch):
    """From the same weights with the same dropout, on texts of a few words that it can learn."""
    monkeypatch.setattr(config, "kernels", "own")
    examples = torch.randint(2, 50, (12, 7))
    examples[::2, 5:] = 0
    targets = (examples[:, :1] % 2).float()
    losses = []
    for nn in (torch.nn, dlkernels.nn):
        torch.manual_seed(2)
        model = NETWORKS["sentiment_lstm"](nn=nn, words=50, packed=packed)
        model.embedding.weight.data.mul_(2)
        optimiser = torch.optim.Adam(model.parameters(), 3e-3)
        losses.append([])
        for step in range(12):
            torch.manual_seed(step)
            loss = nn.BCEWithLogitsLoss()(model(examples), targets)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)
    assert losses[1][-1] < 0.5 * losses[1][0]


def test_sentiment_lstm_reads_up_to_the_end_of_a_text(monkeypatch):
    monkeypatch.setattr(config, "kernels", "own")
    model = NETWORKS["sentiment_lstm"](words=50).eval()
    text = torch.randint(2, 50, (1, 5))
    padded = torch.cat([text, torch.zeros(1, 4, dtype=torch.int64)], 1)
    torch.testing.assert_close(model(padded), model(text))


def test_sentiment_lstm_starts_from_vectors():
    model = NETWORKS["sentiment_lstm"](words=50)
    before, vectors = model.embedding.weight.detach().clone(), torch.randn(2, 100)
    model.copy_vectors(torch.tensor([7, 3]), vectors)
    assert torch.equal(model.embedding.weight[[7, 3]], vectors)
    assert torch.equal(model.embedding.weight[8:], before[8:])


@namespace
def test_sine_rnn_starts_as_documented(nn):
    model = NETWORKS["sine_rnn"](nn=nn)
    weights = torch.cat([p.detach().flatten() for p in model.rnn.parameters()])
    assert weights.std().item() == pytest.approx(0.001, rel=0.2)
    assert model.linear.weight.abs().max() > 0.05


def test_sine_rnn_predicts_along_the_sine(monkeypatch):
    """On its own, point by point, for half a wave after 300 steps and the documents' recipe."""
    monkeypatch.setattr(config, "kernels", "own")
    recipe, examples = NETWORKS["sine_rnn"].recipe, data.load_for(NETWORKS["sine_rnn"].recipe)
    side = train.twins("sine_rnn", 0, torch.device("cpu"))[1]
    for at in range(300):
        train.step(side, examples.train_inputs[at : at + 1], examples.train_targets[at : at + 1])
    assert side.state.shape == (1, 1, 16) and not side.state.requires_grad
    assert side.losses[-1] < 0.1 * side.losses[0]
    targets = examples.test_targets[:, :5]
    score = train.score(recipe.metric, side.model, examples.test_inputs, targets)
    assert score.value < 0.05 < targets.square().mean()


def test_a_prediction_is_fed_back():
    model = NETWORKS["sine_rnn"](nn=torch.nn)
    x = torch.randn(2, 4, 1)
    first = model.predict(x, 1)
    torch.testing.assert_close(
        model.predict(x, 3)[:, 1:], model.predict(torch.cat([x, first], 1), 2)
    )


def test_gradients_are_scaled_down():
    recipe = NETWORKS["two_cell_rnn"].recipe
    side = train.twins("two_cell_rnn", 0, torch.device("cpu"))[1]
    side.max_norm = 1e-3
    train.step(side, inputs_of(recipe, 4), torch.arange(4))
    norm = torch.cat([p.grad.flatten() for p in side.model.parameters()]).norm().item()
    assert norm == pytest.approx(1e-3, rel=1e-3)
