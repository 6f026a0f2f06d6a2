"""MnistMLP: 784 to 512, 256, 128, 64, 10; 575,050 parameters."""

from types import ModuleType

import torch

import dlkernels.nn
from dlkernels.models.recipe import Recipe


class MnistMLP(torch.nn.Module):
    """Logits (N, 10) of images (N, 1, 28, 28) or rows (N, 784); ``nn``: the namespace."""

    recipe = Recipe(epochs=10, embedded_epochs=60)

    def __init__(self, nn: ModuleType = dlkernels.nn) -> None:
        super().__init__()
        self.l1 = nn.Linear(784, 512)
        self.l2 = nn.Linear(512, 256)
        self.l3 = nn.Linear(256, 128)
        self.l4 = nn.Linear(128, 64)
        self.l5 = nn.Linear(64, 10)
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        for layer in (self.l1, self.l2, self.l3, self.l4):
            x = self.relu(layer(x))
        return self.l5(x)
