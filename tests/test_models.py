"""The documented networks: parameters, keys, shapes, recipes, and training beside their twins."""

import math

import pytest
import torch

import dlkernels.nn
from dlkernels import config, data, train
from dlkernels.models import NETWORKS

# name: parameters, then each layer's name and weight shape; every layer has a bias.
GOLDEN = {
    "lenet": (
        61_706,
        {
            "conv1": (6, 1, 5, 5),
            "conv2": (16, 6, 5, 5),
            "fc1": (120, 400),
            "fc2": (84, 120),
            "fc3": (10, 84),
        },
    ),
    "mnist_mlp": (
        575_050,
        {"l1": (512, 784), "l2": (256, 512), "l3": (128, 256), "l4": (64, 128), "l5": (10, 64)},
    ),
    "mnist_cnn": (8_490, {"conv1": (10, 1, 5, 5), "conv2": (20, 10, 5, 5), "fc": (10, 320)}),
}

network = pytest.mark.parametrize("network", sorted(NETWORKS))
namespace = pytest.mark.parametrize("nn", [torch.nn, dlkernels.nn], ids=["stock", "ours"])


def test_every_network_has_golden_values():
    assert sorted(NETWORKS) == sorted(GOLDEN)


@network
@namespace
def test_parameters_and_keys(network, nn):
    model = NETWORKS[network](nn=nn)
    count, layers = GOLDEN[network]
    expected = {}
    for name, shape in layers.items():
        expected[f"{name}.weight"] = shape
        expected[f"{name}.bias"] = shape[:1]
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == expected
    assert list(model.state_dict()) == list(expected)
    assert sum(p.numel() for p in model.parameters()) == count


@network
@namespace
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_logits_have_one_row_per_image(network, nn, batch):
    cls = NETWORKS[network]
    size = cls.recipe.image_size
    assert cls(nn=nn)(torch.randn(batch, 1, size, size)).shape == (batch, 10)


@network
def test_default_namespace_is_ours(network):
    assert repr(NETWORKS[network]()) == repr(NETWORKS[network](nn=dlkernels.nn))
    loss = train.twins(network, 0, torch.device("cpu"))[1].loss
    assert type(loss) is dlkernels.nn.CrossEntropyLoss


@network
def test_recipe_is_the_documented_one(network):
    recipe = NETWORKS[network].recipe
    assert (recipe.loss, recipe.optimiser, recipe.batch_size) == ("CrossEntropyLoss", "SGD", 64)
    assert (recipe.mean, recipe.std, recipe.momentum) == (0.1307, 0.3081, 0.5)
    if network != "lenet":  # whose learning rate the documents leave open
        assert recipe.lr == 0.01


@network
def test_one_seed_gives_both_namespaces_the_same_weights(network):
    weights = []
    for nn in (torch.nn, dlkernels.nn):
        torch.manual_seed(3)
        weights.append(NETWORKS[network](nn=nn).state_dict())
    assert list(weights[0]) == list(weights[1])
    for key in weights[0]:
        assert torch.equal(weights[0][key], weights[1][key]), key


@network
def test_loss_curve_is_as_close_to_float64_as_stock(network, monkeypatch):
    """20 steps of stock, ours and a float64 twin from the same weights, on the same batches.

    Both float32 curves leave the exact one by rounding that the steps amplify alike. Ours may be
    off by twice what stock is, and one ulp of the largest loss: the rule for single ops, since the
    twins differ in nothing but our ops. In the maximum and in the root mean square. "own", since
    "auto" may leave so few logits to stock.
    """
    monkeypatch.setattr(config, "kernels", "own")
    recipe = NETWORKS[network].recipe
    images = data.load(recipe.image_size, recipe.mean, recipe.std)
    stock, ours = train.twins(network, 7, torch.device("cpu"))
    exact, _ = train.twins(network, 7, torch.device("cpu"))
    exact.model.double()
    for batch in torch.randperm(len(images.train_images))[: 20 * 64].split(64):
        x, y = images.train_images[batch], images.train_labels[batch]
        train.step(stock, x, y)
        train.step(ours, x, y)
        train.step(exact, x.double(), y)
    assert len(exact.losses) == 20
    assert exact.losses[-1] < exact.losses[0]  # it trains: the comparison is not of a standstill

    def errors(side):
        differences = [abs(a - b) for a, b in zip(side.losses, exact.losses, strict=True)]
        return max(differences), math.sqrt(sum(d * d for d in differences) / len(differences))

    ulp = max(exact.losses) * torch.finfo(torch.float32).eps
    for ours_error, stock_error in zip(errors(ours), errors(stock), strict=True):
        assert ours_error <= 2 * stock_error + ulp
