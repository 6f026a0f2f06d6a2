"""MnistCNN: two convolutions with pooling, one linear layer; 8,490 parameters."""

from types import ModuleType

import torch

import dlkernels.nn
from dlkernels.models.recipe import Recipe


class MnistCNN(torch.nn.Module):
    """Logits (N, 10) of images (N, 1, 28, 28); ``nn`` is the namespace of the layers."""

    recipe = Recipe(epochs=10, embedded_epochs=30)

    def __init__(self, nn: ModuleType = dlkernels.nn) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 10, 5)
        self.conv2 = nn.Conv2d(10, 20, 5)
        self.fc = nn.Linear(320, 10)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        # The three in one, where the namespace has it.
        self.fused = getattr(nn.functional, "conv2d_max_pool2d", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self._convolve(self.conv1, x)  # (N, 10, 12, 12)
        x = self._convolve(self.conv2, x)  # (N, 20, 4, 4)
        return self.fc(x.flatten(1))

    def _convolve(self, conv: torch.nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        if self.fused is None:
            return self.relu(self.pool(conv(x)))
        return self.fused(x, conv.weight, conv.bias, activation="relu")
