"""The three points on which the documents teach regression."""

import torch

X = ((1.0,), (2.0,), (3.0,))


def line() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y = 2x at 1, 2 and 3, asked for 4.

    Returns ``(train_inputs, train_targets, test_inputs, test_targets)``, float32 (N, 1).
    """
    x, asked = torch.tensor(X), torch.tensor([[4.0]])
    return x, 2 * x, asked, 2 * asked


def step() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """0, 0 and 1 at 1, 2 and 3; the test is on the same points. Shapes as of ``line``."""
    x, y = torch.tensor(X), torch.tensor([[0.0], [0.0], [1.0]])
    return x, y, x, y
