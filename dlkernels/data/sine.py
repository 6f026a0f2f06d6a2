"""Samples of the sine, and what comes after them."""

import torch

POINTS, SPAN = 50, 10.0
STARTS = (0.0, 1.0, 2.0)


def load(
    batches: int = 6000,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """sin over [t, t + 10] in 50 points, t drawn of 0, 1 and 2 for each batch.

    Returns ``(train_inputs, train_targets, test_inputs, test_targets)``, float32: (batches, 49, 1)
    points and the next ones; for the test, from starts between those, the first half of the points
    (N, 25, 1) and the second.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(STARTS), (batches,), generator=generator)
    waves = _waves(torch.tensor(STARTS))[drawn]
    test = _waves(torch.linspace(0, 2, 9))
    half = POINTS // 2
    return waves[:, :-1], waves[:, 1:], test[:, :half], test[:, half:]


def _waves(starts: torch.Tensor) -> torch.Tensor:
    return torch.sin(starts[:, None] + torch.linspace(0, SPAN, POINTS))[..., None]
