"""SineRNN, 321 parameters: the next points of a sine from those before."""

from types import ModuleType

import torch

import dlkernels.nn
from dlkernels.models.recipe import Recipe


class SineRNN(torch.nn.Module):
    """(N, T, 1) points, each with its next one guessed, and the hidden state (1, N, 16).

    ``forward(x, hidden_prev=None)``. In training the state of a batch is the start of the next.
    """

    recipe = Recipe(
        data="sine",
        epochs=1,  # of 6000 batches
        loss="MSELoss",
        optimiser="Adam",
        lr=0.01,
        momentum=None,
        batch_size=1,
        metric="autoregressive mean squared error",
        carries_state=True,
    )

    def __init__(self, nn: ModuleType = dlkernels.nn) -> None:
        super().__init__()
        self.rnn = nn.RNN(1, 16, batch_first=True)
        for parameter in self.rnn.parameters():
            torch.nn.init.normal_(parameter, std=0.001)
        self.linear = nn.Linear(16, 1)

    def forward(
        self, x: torch.Tensor, hidden_prev: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        outputs, hidden = self.rnn(x, hidden_prev)
        return self.linear(outputs), hidden

    def predict(self, x: torch.Tensor, steps: int) -> torch.Tensor:
        """The next ``steps`` points (N, steps, 1) after those of ``x``, one at a time, each made of
        the ones that were predicted before."""
        outputs, hidden = self(x)
        points = [outputs[:, -1:]]
        while len(points) < steps:
            output, hidden = self(points[-1], hidden)
            points.append(output)
        return torch.cat(points, 1)
