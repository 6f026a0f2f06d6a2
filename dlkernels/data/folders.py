"""Image folders: ``root/<class>/*.png``, ``.jpg`` or ``.jpeg``, and their index ``images.csv``.

A line of the index is a path below ``root``, with ``/`` between its parts, and a class, the number
of its folder in the order of their names. Where there is none it is written, in an order that is
shuffled once: the first 60 % of it are for the training, the next 20 % for the validation, the last
for the test. An index that is not of these images is an error that names its line.
"""

import csv
import io
import random
from pathlib import Path, PurePosixPath

import torch

from dlkernels.data import images
from dlkernels.files import write_atomically

INDEX = "images.csv"
SUFFIXES = (".png", ".jpg", ".jpeg")
SHUFFLE_SEED = 0
MARGIN = 1.25  # of the size that the network takes: what is resized to, for rotations


def load(
    root: Path, size: int, classes: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first 80 % and the last 20 % of the index; of the former the last quarter is meant for
    the validation.

    Returns ``(train_images, train_labels, test_images, test_labels)``: images float32
    (N, 3, s, s) in 0 to 1, s = 1.25 ``size``, labels int64 (N,) below ``classes``. Raises
    FileNotFoundError; ValueError naming file and line and what is wrong with it;
    ModuleNotFoundError without Pillow.
    """
    root = Path(root)
    rows = read_index(root, classes)
    pixels = torch.empty(len(rows), 3, *2 * (int(size * MARGIN),))
    for row, (path, _) in zip(pixels, rows, strict=True):
        row.copy_(images.read(root / path, row.shape[1]))
    pixels /= 255
    labels = torch.tensor([label for _, label in rows])
    count = int(0.8 * len(rows))
    return pixels[:count], labels[:count], pixels[count:], labels[count:]


def find(root: Path, classes: int) -> dict[str, int]:
    """Path below ``root`` -> class, of all its images. Raises FileNotFoundError, ValueError."""
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}")
    folders = sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] != ".")
    if len(folders) != classes:
        raise ValueError(f"{root}: {len(folders)} folders, one for each class, wanted {classes}")
    found = {
        path.relative_to(root).as_posix(): label
        for label, folder in enumerate(folders)
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in SUFFIXES
    }
    for label, folder in enumerate(folders):
        if label not in found.values():
            raise ValueError(f"{folder}: no images ({', '.join(SUFFIXES)})")
    if len(found) < 5:
        raise ValueError(f"{root}: {len(found)} images, wanted 5 at least: a fifth is for the test")
    return found


def read_index(root: Path, classes: int) -> list[tuple[str, int]]:
    """(path, class) of each image in the order of the index, which is written if there is none."""
    found, index = find(root, classes), root / INDEX
    if not index.exists():
        rows = list(found.items())
        random.Random(SHUFFLE_SEED).shuffle(rows)
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        write_atomically(index, text.getvalue().encode())
        return rows
    rows = []
    with open(index, encoding="utf-8", errors="replace", newline="") as lines:
        reader = csv.reader(lines, strict=True)
        try:
            for cells in reader:
                rows += [parse(cells, found, f"{index}:{reader.line_num}")] if cells else []
        except csv.Error as error:
            raise ValueError(f"{index}:{reader.line_num}: {error}") from None
    listed = {path for path, _ in rows}
    if len(listed) != len(rows):
        twice = next(path for at, (path, _) in enumerate(rows) if path in dict(rows[:at]))
        raise ValueError(f"{index}: {twice} is listed twice")
    if missing := sorted(found.keys() - listed):
        raise ValueError(
            f"{index}: does not list {missing[0]} (of {len(missing)}): delete it, and it is written"
        )
    return rows


def parse(cells: list[str], found: dict[str, int], where: str) -> tuple[str, int]:
    """Path and class of a line of the index. Raises ValueError."""
    if len(cells) != 2:
        raise ValueError(f"{where}: {len(cells)} columns, wanted a path and a class")
    path, label = PurePosixPath(cells[0].replace("\\", "/")).as_posix(), cells[1].strip()
    if path not in found:
        raise ValueError(f"{where}: no image {cells[0]!r}")
    if label != str(found[path]):
        raise ValueError(f"{where}: class {label} for {path}, whose folder is {found[path]}")
    return path, found[path]
