"""LeNet: two convolutions with pooling, three linear layers; 61,706 parameters."""

from types import ModuleType

import torch

import dlkernels.nn
from dlkernels.models.recipe import Recipe


class LeNet(torch.nn.Module):
    """Logits (N, 10) of images (N, 1, 32, 32).

    ``nn`` is the namespace of the layers: ``LeNet(nn=torch.nn)`` is the stock twin, with the same
    ``state_dict`` key for key.
    """

    recipe = Recipe(image_size=32, epochs=10, embedded_epochs=25, lr=0.03)

    def __init__(self, nn: ModuleType = dlkernels.nn) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(400, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        # The three in one, where the namespace has it.
        self.fused = getattr(nn.functional, "conv2d_max_pool2d", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self._convolve(self.conv1, x)  # (N, 6, 14, 14)
        x = self._convolve(self.conv2, x)  # (N, 16, 5, 5)
        x = self.relu(self.fc1(x.flatten(1)))
        x = self.relu(self.fc2(x))
        return self.fc3(x)

    def _convolve(self, conv: torch.nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        if self.fused is None:
            return self.pool(self.relu(conv(x)))
        return self.fused(x, conv.weight, conv.bias, activation="relu")
