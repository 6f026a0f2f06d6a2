"""LinearRegression: one weight and one bias."""

from types import ModuleType

import torch

import dlkernels.nn
from dlkernels.models.recipe import Recipe


class LinearRegression(torch.nn.Module):
    """w·x + b, (N, 1) of (N, 1); ``nn`` is the namespace of the layer."""

    recipe = Recipe(
        data="line",
        epochs=100,
        loss="MSELoss",
        loss_arguments={"reduction": "sum"},
        momentum=0.0,
        batch_size=3,
        metric="mean squared error",
    )

    def __init__(self, nn: ModuleType = dlkernels.nn) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)
