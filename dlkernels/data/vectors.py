"""Random sequences of vectors, that can be told apart."""

import torch

CLASSES, STEPS, SIZE = 20, 10, 100


def load() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each sequence is one of twenty random vectors, at each step under noise of its size.

    Returns ``(train_inputs, train_targets, test_inputs, test_targets)``: float32 (N, 10, 100), and
    int64 (N,), which of the twenty it is.
    """
    generator = torch.Generator().manual_seed(0)
    vectors = 0.3 * torch.randn(CLASSES, 1, SIZE, generator=generator)

    def drawn(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        which = torch.randint(CLASSES, (count,), generator=generator)
        return vectors[which] + torch.randn(count, STEPS, SIZE, generator=generator), which

    return *drawn(2000), *drawn(500)
