"""The documented networks. ``NETWORKS`` maps their command-line names to their classes."""

from dlkernels.models.lenet import LeNet
from dlkernels.models.mnist_cnn import MnistCNN
from dlkernels.models.mnist_mlp import MnistMLP
from dlkernels.models.recipe import Recipe

NETWORKS = {"lenet": LeNet, "mnist_cnn": MnistCNN, "mnist_mlp": MnistMLP}

__all__ = ["NETWORKS", "LeNet", "MnistCNN", "MnistMLP", "Recipe"]
