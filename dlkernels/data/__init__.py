"""The documented data sets, ready for a network."""

from pathlib import Path
from typing import NamedTuple

import torch

from dlkernels.data import (
    augment,
    cifar10,
    diabetes,
    digits,
    folders,
    mnist,
    points,
    sine,
    text,
    vectors,
)

_FILES = {"images": ("MNIST", mnist.load), "cifar10": ("CIFAR-10", cifar10.load)}


class Examples(NamedTuple):
    name: str
    # (N, ...) float32; of images (N, C, H, W), normalised; words (N, T) int64
    train_inputs: torch.Tensor
    train_targets: torch.Tensor  # (N,) int64 classes, or (N, ...) float32
    test_inputs: torch.Tensor
    test_targets: torch.Tensor
    words: dict[str, int] | None = None  # of texts: the number of each word

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self[1:5]

    def to(self, device: torch.device) -> "Examples":
        return Examples(self.name, *(tensor.to(device) for tensor in self.tensors), self.words)


def load_for(recipe, path: Path | None = None, margin: bool = False) -> Examples:
    """The data set that a ``dlkernels.models.Recipe`` names; from ``path`` where it is given.

    With ``margin``, training images may be larger than the network takes, for ``augment``.

    Raises FileNotFoundError, or ValueError naming the file and what is wrong with it.
    """
    if recipe.data in _FILES:
        examples = load(recipe.image_size, recipe.mean, recipe.std, path, recipe.data)
        return aimed(examples, recipe.target)
    if recipe.data == "folders":
        if path is not None:
            return load_folders(recipe, path, margin)
        return load(recipe.image_size, recipe.mean, recipe.std, classes=recipe.classes)
    if recipe.data == "diabetes":
        name = "scikit-learn diabetes" if path is None else f"diabetes file of {path}"
        return Examples(name, *diabetes.load(path))
    if recipe.data == "text":
        name = "the standard library's documentation" if path is None else f"reviews of {path}"
        return Examples(name, *text.load(path))
    if path is not None and recipe.data in ("sine", "vectors"):
        raise ValueError(f"no --data for this network: it makes its own, not {path}")
    if recipe.data == "sine":
        return Examples("the sine", *sine.load())
    if recipe.data == "vectors":
        return Examples("noisy copies of 20 vectors", *vectors.load())
    if path is not None:
        raise ValueError(f"no --data for this network: it has three points of its own, not {path}")
    if recipe.data == "line":
        return Examples("y = 2x at 1, 2, 3", *points.line())
    return Examples("0, 0, 1 at 1, 2, 3", *points.step())


def load_folders(recipe, path: Path, margin: bool) -> Examples:
    """The image folders in ``path``; as ``load_for``."""
    size = recipe.image_size, recipe.image_size
    x, y, test_x, test_y = folders.load(path, recipe.image_size, recipe.classes)
    x, test_x = x if margin else augment.crop(x, size), augment.crop(test_x, size)
    x, test_x = (
        prepare(images, images.shape[2], recipe.mean, recipe.std) for images in (x, test_x)
    )
    return Examples(f"image folders of {path}", x, y, test_x, test_y)


def aimed(examples: Examples, target: str) -> Examples:
    """The examples with other targets: "inputs", themselves as rows; "real", ones (N, 1)."""
    if target == "label":
        return examples
    x, _, test_x, _ = examples.tensors
    if target == "inputs":
        y, test_y = x.flatten(1), test_x.flatten(1)
    else:
        y, test_y = (torch.ones(len(inputs), 1) for inputs in (x, test_x))
    return Examples(examples.name, x, y, test_x, test_y)


def load(
    size: int,
    mean: float | tuple[float, ...],
    std: float | tuple[float, ...],
    folder: Path | None = None,
    files: str = "images",
    classes: int | None = None,
) -> Examples:
    """The embedded digits, or the files in ``folder``, resized to ``size`` x ``size``.

    ``files`` are MNIST's ("images") or CIFAR-10's ("cifar10"). Of ``classes``, if given, only those
    below that. ``mean`` and ``std`` have a number
    for each channel; grey images are the same in all of them.

    Raises FileNotFoundError, or ValueError naming the file and what is wrong with it.
    """
    if folder is None:
        name, arrays = "scikit-learn digits", digits.load()
    else:
        of, read = _FILES[files]
        name, arrays = f"{of} files of {folder}", read(folder)
    train_images, train_labels, test_images, test_labels = arrays
    if classes is not None:
        train, test = train_labels < classes, test_labels < classes
        train_images, train_labels = train_images[train], train_labels[train]
        test_images, test_labels = test_images[test], test_labels[test]
    return Examples(
        name,
        prepare(train_images, size, mean, std),
        train_labels,
        prepare(test_images, size, mean, std),
        test_labels,
    )


def prepare(
    images: torch.Tensor, size: int, mean: float | tuple[float, ...], std: float | tuple[float, ...]
) -> torch.Tensor:
    """(N, H, W) or (N, C, H, W) in 0 to 1 as (N, C, size, size): bilinear, then
    ``(x - mean) / std``, which makes C equal channels of grey where ``mean`` has C numbers."""
    if images.dim() == 3:
        images = images[:, None]
    if images.shape[2:] != (size, size):
        images = torch.nn.functional.interpolate(
            images, size=(size, size), mode="bilinear", align_corners=False
        )
    mean, std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (mean, std))
    return (images - mean) / std
