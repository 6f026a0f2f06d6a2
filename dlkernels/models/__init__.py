"""The documented networks. ``NETWORKS`` maps their command-line names to their classes."""

from dlkernels.models.diabetes import DiabetesLogistic, DiabetesMLP
from dlkernels.models.inception_net import InceptionNet
from dlkernels.models.lenet import LeNet
from dlkernels.models.lenet5_cifar import LeNet5Cifar
from dlkernels.models.linear_regression import LinearRegression
from dlkernels.models.logistic_regression import LogisticRegression
from dlkernels.models.mlp import MLP200, MLP256, MLP200Leaky
from dlkernels.models.mnist_cnn import MnistCNN
from dlkernels.models.mnist_mlp import MnistMLP
from dlkernels.models.recipe import Recipe
from dlkernels.models.resnet import ResNet18Cifar, ResNet18Light, ResNet18Pokemon
from dlkernels.models.sentiment_lstm import SentimentLSTM
from dlkernels.models.sine_rnn import SineRNN
from dlkernels.models.two_cells import TwoCellLSTM, TwoCellRNN

NETWORKS = {
    "diabetes_logistic": DiabetesLogistic,
    "diabetes_mlp": DiabetesMLP,
    "inception_net": InceptionNet,
    "lenet": LeNet,
    "lenet5_cifar": LeNet5Cifar,
    "linear_regression": LinearRegression,
    "logistic_regression": LogisticRegression,
    "mlp200": MLP200,
    "mlp200_leaky": MLP200Leaky,
    "mlp256": MLP256,
    "mnist_cnn": MnistCNN,
    "mnist_mlp": MnistMLP,
    "resnet18_cifar": ResNet18Cifar,
    "resnet18_light": ResNet18Light,
    "resnet18_pokemon": ResNet18Pokemon,
    "sentiment_lstm": SentimentLSTM,
    "sine_rnn": SineRNN,
    "two_cell_lstm": TwoCellLSTM,
    "two_cell_rnn": TwoCellRNN,
}

__all__ = [
    "MLP200",
    "MLP256",
    "NETWORKS",
    "DiabetesLogistic",
    "DiabetesMLP",
    "InceptionNet",
    "LeNet",
    "LeNet5Cifar",
    "LinearRegression",
    "LogisticRegression",
    "MLP200Leaky",
    "MnistCNN",
    "MnistMLP",
    "Recipe",
    "ResNet18Cifar",
    "ResNet18Light",
    "ResNet18Pokemon",
    "SentimentLSTM",
    "SineRNN",
    "TwoCellLSTM",
    "TwoCellRNN",
]
