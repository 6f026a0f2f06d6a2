"""LeNet5Cifar: two convolutions with pooling and no activation, two linear layers; 40,010
parameters."""

from types import ModuleType

import torch

import dlkernels.nn
from dlkernels.models.recipe import IMAGENET_MEAN, IMAGENET_STD, Recipe


class LeNet5Cifar(torch.nn.Module):
    """Logits (N, 10) of images (N, 3, 32, 32); ``nn`` is the namespace of the layers."""

    recipe = Recipe(
        data="cifar10",
        image_size=32,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        epochs=1000,
        embedded_epochs=20,
        optimiser="Adam",
        lr=1e-3,
        momentum=None,
        batch_size=128,
    )

    def __init__(self, nn: ModuleType = dlkernels.nn) -> None:
        super().__init__()
        self.conv_unit = nn.Sequential(
            nn.Conv2d(3, 16, 5),
            nn.MaxPool2d(2),  # (N, 16, 14, 14)
            nn.Conv2d(16, 32, 5),
            nn.MaxPool2d(2),  # (N, 32, 5, 5)
        )
        self.fc_unit = nn.Sequential(nn.Linear(800, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc_unit(self.conv_unit(x).flatten(1))
