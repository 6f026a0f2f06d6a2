"""TwoCellRNN and TwoCellLSTM: two cells, 100 to 30 to 20, stepped over time by hand."""

from types import ModuleType

import torch

import dlkernels.nn
from dlkernels.models.recipe import Recipe

_RECIPE = Recipe(
    data="vectors",
    epochs=10,
    optimiser="Adam",
    lr=1e-3,
    momentum=None,
    batch_size=64,
)


class TwoCellRNN(torch.nn.Module):
    """The second cell's last state (N, 20) of sequences (N, T, 100), taken as logits; 5,000
    parameters."""

    recipe = _RECIPE

    def __init__(self, nn: ModuleType = dlkernels.nn) -> None:
        super().__init__()
        self.cell1 = nn.RNNCell(100, 30)
        self.cell2 = nn.RNNCell(30, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h1, h2 = x.new_zeros(len(x), 30), x.new_zeros(len(x), 20)
        for step in x.unbind(1):
            h1 = self.cell1(step, h1)
            h2 = self.cell2(h1, h2)
        return h2


class TwoCellLSTM(torch.nn.Module):
    """The same of LSTM cells; 20,000 parameters."""

    recipe = _RECIPE

    def __init__(self, nn: ModuleType = dlkernels.nn) -> None:
        super().__init__()
        self.cell1 = nn.LSTMCell(100, 30)
        self.cell2 = nn.LSTMCell(30, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h1 = c1 = x.new_zeros(len(x), 30)
        h2 = c2 = x.new_zeros(len(x), 20)
        for step in x.unbind(1):
            h1, c1 = self.cell1(step, (h1, c1))
            h2, c2 = self.cell2(h1, (h2, c2))
        return h2
