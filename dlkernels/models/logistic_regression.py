"""LogisticRegression: one weight and one bias before a sigmoid."""

from types import ModuleType

import torch

import dlkernels.nn
from dlkernels.models.recipe import Recipe


class LogisticRegression(torch.nn.Module):
    """The probability sigmoid(w·x + b), (N, 1) of (N, 1); ``nn`` is the namespace of the layer."""

    recipe = Recipe(
        data="step",
        epochs=1000,
        loss="BCELoss",
        loss_arguments={"reduction": "sum"},
        momentum=0.0,
        batch_size=3,
        metric="binary accuracy",
    )

    def __init__(self, nn: ModuleType = dlkernels.nn) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.sigmoid(self.linear(x))
