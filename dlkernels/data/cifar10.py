"""CIFAR-10 as PNG files: ``train/`` and ``test/`` of ``<n>_<label name>.png``, and ``labels.txt``.

``labels.txt`` has the ten names, one a line, in the order of the classes. Every way in which the
folder can be wrong is an error that names the file.
"""

from pathlib import Path

import torch

CLASSES = 10


def load(folder: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training and test set of ``folder``, each in the order of its files' numbers.

    Returns ``(train_images, train_labels, test_images, test_labels)``: images float32 (N, 3, H, W)
    in 0 to 1, labels int64 (N,) in 0 to 9. Raises FileNotFoundError; ValueError naming the file and
    what is wrong with it; ModuleNotFoundError without Pillow.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    names = read_names(folder / "labels.txt")
    train, test = (read_images(folder / part, names) for part in ("train", "test"))
    if train[0].shape[1:] != test[0].shape[1:]:
        sizes = ["x".join(map(str, images.shape[2:])) for images, _ in (train, test)]
        raise ValueError(f"{folder}: images of {sizes[0]} in train, of {sizes[1]} in test")
    return *train, *test


def read_names(path: Path) -> dict[str, int]:
    """Label name -> class. Raises FileNotFoundError, ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}")
    lines = path.read_text("utf-8", "replace").splitlines()
    names = [line.strip() for line in lines if line.strip()]
    if len(names) != CLASSES or len(set(names)) != CLASSES:
        raise ValueError(
            f"{path}: {len(names)} names, {len(set(names))} different ones, wanted {CLASSES}"
        )
    return {name: at for at, name in enumerate(names)}


def read_images(folder: Path, names: dict[str, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 3, H, W) in 0 to 1 and labels (N,) of a folder. Raises as ``load``."""
    from PIL import Image

    if not folder.is_dir():
        raise FileNotFoundError(f"{folder.parent} has no folder {folder.name}")
    numbered = sorted(number_and_class(path, names) for path in folder.glob("*.png"))
    if not numbered:
        raise ValueError(f"{folder}: no PNG files")
    images = torch.empty(0)
    for at, (_, _, path) in enumerate(numbered):
        try:
            with Image.open(path) as file:
                width, height, pixels = *file.size, file.convert("RGB").tobytes()
        except (OSError, SyntaxError, ValueError) as error:  # SyntaxError: a broken PNG chunk
            raise ValueError(f"{path}: broken PNG file: {error}") from error
        if at == 0:
            images = torch.empty((len(numbered), height, width, 3), dtype=torch.uint8)
        if (height, width) != images.shape[1:3]:
            raise ValueError(
                f"{path}: {height}x{width}, {numbered[0][2].name} has "
                f"{images.shape[1]}x{images.shape[2]}"
            )
        # bytearray: a tensor on immutable bytes makes torch warn.
        values = torch.frombuffer(bytearray(pixels), dtype=torch.uint8)
        images[at] = values.view(height, width, 3)
    labels = torch.tensor([label for _, label, _ in numbered])
    return images.permute(0, 3, 1, 2).contiguous().float() / 255, labels


def number_and_class(path: Path, names: dict[str, int]) -> tuple[int, int, Path]:
    """Of a file ``<n>_<label name>.png``, with the path again. Raises ValueError."""
    number, _, name = path.stem.partition("_")
    if not (number.isascii() and number.isdecimal()) or not name:
        raise ValueError(f"{path}: wanted a name as 1_frog.png")
    if name not in names:
        raise ValueError(f"{path}: label {name!r} is not in labels.txt")
    return int(number), names[name], path
