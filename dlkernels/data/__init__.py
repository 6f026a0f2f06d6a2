"""The documented data sets, ready for a network."""

from pathlib import Path
from typing import NamedTuple

import torch

from dlkernels.data import digits, mnist


class Images(NamedTuple):
    name: str
    train_images: torch.Tensor  # (N, 1, H, W) float32, normalised
    train_labels: torch.Tensor  # (N,) int64
    test_images: torch.Tensor
    test_labels: torch.Tensor

    def to(self, device: torch.device) -> "Images":
        return Images(self.name, *(tensor.to(device) for tensor in self[1:]))


def load(size: int, mean: float, std: float, folder: Path | None = None) -> Images:
    """The embedded digits, or the MNIST files in ``folder``, resized to ``size`` x ``size``.

    Raises FileNotFoundError, or ValueError naming the file and what is wrong with it.
    """
    if folder is None:
        name, arrays = "scikit-learn digits", digits.load()
    else:
        name, arrays = f"MNIST files of {folder}", mnist.load(folder)
    train_images, train_labels, test_images, test_labels = arrays
    return Images(
        name,
        prepare(train_images, size, mean, std),
        train_labels,
        prepare(test_images, size, mean, std),
        test_labels,
    )


def prepare(images: torch.Tensor, size: int, mean: float, std: float) -> torch.Tensor:
    """(N, H, W) in 0 to 1 as (N, 1, size, size): bilinear, then ``(x - mean) / std``."""
    images = images[:, None]
    if images.shape[2:] != (size, size):
        images = torch.nn.functional.interpolate(
            images, size=(size, size), mode="bilinear", align_corners=False
        )
    return (images - mean) / std
