"""DiabetesMLP, 8 to 6, 4, 1 with 87 parameters, and DiabetesLogistic, its one-layer sibling."""

from types import ModuleType

import torch

import dlkernels.nn
from dlkernels.models.recipe import Recipe


class DiabetesMLP(torch.nn.Module):
    """Probabilities (N, 1) of rows (N, 8), a sigmoid after each layer; ``nn``: the namespace."""

    recipe = Recipe(
        data="diabetes",
        epochs=100,
        embedded_epochs=500,  # of fewer rows: until it has left the plateau of its sigmoids
        loss="BCELoss",
        lr=0.1,
        momentum=0.0,
        batch_size=32,
        metric="binary accuracy",
    )

    def __init__(self, nn: ModuleType = dlkernels.nn) -> None:
        super().__init__()
        self.linear1 = nn.Linear(8, 6)
        self.linear2 = nn.Linear(6, 4)
        self.linear3 = nn.Linear(4, 1)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.sigmoid(self.linear1(x))
        x = self.sigmoid(self.linear2(x))
        return self.sigmoid(self.linear3(x))


class DiabetesLogistic(torch.nn.Module):
    """Probabilities (N, 1) of rows (N, 8), trained on all rows at once."""

    recipe = Recipe(
        data="diabetes",
        epochs=100,
        loss="BCELoss",
        lr=0.1,
        momentum=0.0,
        batch_size=None,
        metric="binary accuracy",
    )

    def __init__(self, nn: ModuleType = dlkernels.nn) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 1)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.sigmoid(self.linear(x))
