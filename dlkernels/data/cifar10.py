"""CIFAR-10, as it is published (an archive or its folder, binary or pickled) or as PNG files.

Binary: ``data_batch_1.bin`` to ``_5.bin`` and ``test_batch.bin`` of records of 1 byte, the class,
and 3,072, the red, green and blue planes. Pickled: the same names without ``.bin``, each a dict of
``data`` and ``labels``; nothing but arrays, lists, strings and numbers is unpickled. Archives are
read, never unpacked. PNG: ``train/`` and ``test/`` of ``<n>_<label name>.png``, and ``labels.txt``,
which has the ten names, one a line, in the order of the classes. Every way in which the files can
be wrong is an error that names the file.
"""

import io
import lzma
import pickle
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import torch

from dlkernels.data import images
from dlkernels.files import first_line

CLASSES = 10
SIDE = 32
RECORD = 1 + 3 * SIDE * SIDE
TRAIN = tuple(f"data_batch_{k}" for k in range(1, 6))
ARCHIVES = ("cifar-10-binary.tar.gz", "cifar-10-python.tar.gz")
FOLDERS = ("cifar-10-batches-bin", "cifar-10-batches-py")
# What numpy of any version writes for an array.
ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


def load(path: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training and test set of the archive ``path``, or of the folder, in the order of the files.

    Returns ``(train_images, train_labels, test_images, test_labels)``: images float32 (N, 3, H, W)
    in 0 to 1, labels int64 (N,) in 0 to 9. Raises FileNotFoundError; ValueError naming the file and
    what is wrong with it; ModuleNotFoundError without Pillow (PNG) or numpy (pickles).
    """
    path = Path(path)
    if path.is_dir():
        names = (*ARCHIVES, *FOLDERS)
        inside = [path / name for name in names if (path / name).exists()]
        path = inside[0] if inside and not (path / "labels.txt").is_file() else path
    if path.is_file():
        return from_batches(*read_archive(path))
    if not path.is_dir():
        raise FileNotFoundError(f"no folder {path}")
    if any((path / f"test_batch{suffix}").is_file() for suffix in ("", ".bin")):
        return from_batches(*read_folder(path))
    return load_png(path)


def read_archive(path: Path) -> tuple[dict[str, bytes], Callable[[str], str]]:
    """The batch files in the archive, and how to say where one is. Raises ValueError."""
    wanted, found = {*TRAIN, "test_batch"}, {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                if member.isreg() and name.removesuffix(".bin") in wanted:
                    found[name] = archive.extractfile(member).read()
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{path}: broken archive: {first_line(error)}") from error
    return found, lambda name: f"{path}: {name}"


def read_folder(folder: Path) -> tuple[dict[str, bytes], Callable[[str], str]]:
    """The same of an unpacked archive."""
    names = [f"{stem}{suffix}" for suffix in (".bin", "") for stem in (*TRAIN, "test_batch")]
    found = {n: (folder / n).read_bytes() for n in names if (folder / n).is_file()}
    return found, lambda name: str(folder / name)


def from_batches(
    files: dict[str, bytes], where: Callable[[str], str]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sets in these batch files; returns and raises as ``load``."""
    suffix = ".bin" if "test_batch.bin" in files else ""
    read = read_binary if suffix else read_pickle
    parts = []
    for names in (TRAIN, ("test_batch",)):
        batches = []
        for name in (f"{stem}{suffix}" for stem in names):
            if name not in files:
                raise FileNotFoundError(f"{where(name)} is missing")
            batches.append(read(files[name], where(name)))
        pixels, labels = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
        parts += [pixels.float() / 255, labels]
    return tuple(parts)


def read_binary(content: bytes, where: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels uint8 (N, 3, 32, 32) and labels int64 (N,) of records. Raises ValueError."""
    if not content or len(content) % RECORD:
        raise ValueError(f"{where}: {len(content)} bytes, wanted records of {RECORD}")
    # bytearray: a tensor on immutable bytes makes torch warn.
    records = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, RECORD)
    return records[:, 1:].reshape(-1, 3, SIDE, SIDE), checked(records[:, 0].long(), where)


def read_pickle(content: bytes, where: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of a pickled dict, in which nothing can run code. Raises ValueError."""
    import numpy as np

    try:
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
        batch = {k.decode() if isinstance(k, bytes) else k: v for k, v in batch.items()}
        pixels, labels = batch["data"], torch.tensor([int(n) for n in batch["labels"]])
    except pickle.UnpicklingError as error:
        raise ValueError(f"{where}: broken pickle: {error}") from error
    except Exception as error:  # a damaged pickle can raise whatever its instructions lead to
        raise ValueError(f"{where}: broken pickle: {type(error).__name__}") from error
    shape = (len(labels), RECORD - 1)
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape != shape:
        raise ValueError(f"{where}: data is no uint8 array of {len(labels)} x {RECORD - 1}")
    if len(labels) == 0:
        raise ValueError(f"{where}: no images")
    pixels = torch.from_numpy(pixels.copy()).view(-1, 3, SIDE, SIDE)
    return pixels, checked(labels, where)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def checked(labels: torch.Tensor, where: str) -> torch.Tensor:
    """The labels. Raises ValueError where one is no class."""
    wrong = ((labels < 0) | (labels >= CLASSES)).nonzero()
    if len(wrong):
        at = int(wrong[0])
        raise ValueError(f"{where}: image {at + 1}: label {int(labels[at])}, wanted 0 to 9")
    return labels


def load_png(
    folder: Path,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training and test set of PNG files, each in the order of their numbers; as ``load``."""
    names = read_names(folder / "labels.txt")
    train, test = (read_images(folder / part, names) for part in ("train", "test"))
    if train[0].shape[1:] != test[0].shape[1:]:
        sizes = ["x".join(map(str, pixels.shape[2:])) for pixels, _ in (train, test)]
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
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder.parent} has no folder {folder.name}")
    numbered = sorted(number_and_class(path, names) for path in folder.glob("*.png"))
    if not numbered:
        raise ValueError(f"{folder}: no PNG files")
    first = images.read(numbered[0][2])
    pixels = torch.empty((len(numbered), *first.shape), dtype=torch.uint8)
    for at, (_, _, path) in enumerate(numbered):
        image = images.read(path)
        if image.shape != first.shape:
            raise ValueError(
                f"{path}: {image.shape[1]}x{image.shape[2]}, {numbered[0][2].name} has "
                f"{first.shape[1]}x{first.shape[2]}"
            )
        pixels[at] = image
    labels = torch.tensor([label for _, label, _ in numbered])
    return pixels.float() / 255, labels


def number_and_class(path: Path, names: dict[str, int]) -> tuple[int, int, Path]:
    """Of a file ``<n>_<label name>.png``, with the path again. Raises ValueError."""
    number, _, name = path.stem.partition("_")
    if not (number.isascii() and number.isdecimal()) or not name:
        raise ValueError(f"{path}: wanted a name as 1_frog.png")
    if name not in names:
        raise ValueError(f"{path}: label {name!r} is not in labels.txt")
    return int(number), names[name], path
