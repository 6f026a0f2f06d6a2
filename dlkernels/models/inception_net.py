"""InceptionNet: two convolutions, an Inception block behind each, one linear layer; 97,298
parameters."""

from types import ModuleType

import torch

import dlkernels.nn
from dlkernels.models.recipe import Recipe


class Inception(torch.nn.Module):
    """(N, 88, H, W) of (N, ``channels``, H, W): four branches, side by side on the channels."""

    def __init__(self, channels: int, nn: ModuleType = dlkernels.nn) -> None:
        super().__init__()
        self.branch1x1 = nn.Conv2d(channels, 16, 1)
        self.branch5x5_1 = nn.Conv2d(channels, 16, 1)
        self.branch5x5_2 = nn.Conv2d(16, 24, 5, padding=2)
        self.branch3x3_1 = nn.Conv2d(channels, 16, 1)
        self.branch3x3_2 = nn.Conv2d(16, 24, 3, padding=1)
        self.branch3x3_3 = nn.Conv2d(24, 24, 3, padding=1)
        self.branch_pool = nn.Conv2d(channels, 24, 1)
        self.pool = nn.AvgPool2d(3, stride=1, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branches = (
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3_3(self.branch3x3_2(self.branch3x3_1(x))),
            self.branch_pool(self.pool(x)),
        )
        return torch.cat(branches, 1)


class InceptionNet(torch.nn.Module):
    """Logits (N, 10) of images (N, 1, 28, 28); ``nn`` is the namespace of the layers."""

    recipe = Recipe(epochs=10, embedded_epochs=30)

    def __init__(self, nn: ModuleType = dlkernels.nn) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 10, 5)
        self.inception1 = Inception(10, nn)
        self.conv2 = nn.Conv2d(88, 20, 5)
        self.inception2 = Inception(20, nn)
        self.fc = nn.Linear(1408, 10)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inception1(self.relu(self.pool(self.conv1(x))))  # (N, 88, 12, 12)
        x = self.inception2(self.relu(self.pool(self.conv2(x))))  # (N, 88, 4, 4)
        return self.fc(x.flatten(1))
