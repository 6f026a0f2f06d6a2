"""MNIST's four IDX files, gzipped or not.

An IDX file is 0, 0, a dtype code, the number of dimensions, each dimension as a big-endian 32-bit
integer, then the values. Every way in which a file can be wrong is an error that names the file.
"""

import gzip
import struct
import zlib
from pathlib import Path

import torch

UINT8 = 0x08
FILES = (
    ("train-images", "idx3-ubyte", 3),
    ("train-labels", "idx1-ubyte", 1),
    ("t10k-images", "idx3-ubyte", 3),
    ("t10k-labels", "idx1-ubyte", 1),
)


def load(folder: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training and test set of the MNIST files in ``folder``.

    Returns ``(train_images, train_labels, test_images, test_labels)``: images float32 (N, H, W)
    in 0 to 1, labels int64 (N,) in 0 to 9. Raises FileNotFoundError for a missing folder or file,
    ValueError for a file that is not what its name says.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    paths = [find(folder, stem, suffix) for stem, suffix, _ in FILES]
    arrays = [read_idx(path, ndim) for path, (_, _, ndim) in zip(paths, FILES, strict=True)]
    for k in (0, 2):
        if len(arrays[k]) != len(arrays[k + 1]):
            raise ValueError(
                f"{paths[k]} has {len(arrays[k])} images, {paths[k + 1]} has "
                f"{len(arrays[k + 1])} labels"
            )
        if int(arrays[k + 1].max()) > 9:
            raise ValueError(f"{paths[k + 1]}: label {int(arrays[k + 1].max())}, wanted 0 to 9")
    train_images, train_labels, test_images, test_labels = arrays
    return (
        train_images.float() / 255,
        train_labels.long(),
        test_images.float() / 255,
        test_labels.long(),
    )


def find(folder: Path, stem: str, suffix: str) -> Path:
    """The file ``stem-suffix`` or ``stem.suffix``, with or without ``.gz``; the plain one first."""
    names = [f"{stem}{dot}{suffix}{gz}" for gz in ("", ".gz") for dot in ("-", ".")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} has no {names[0]} (nor {', '.join(names[1:])})")


def read_idx(path: Path, ndim: int) -> torch.Tensor:
    """The uint8 array of ``ndim`` dimensions, none of them 0, in an IDX file.

    Whether it is gzipped is read from its first bytes, not from its name. Raises ValueError.
    """
    content = Path(path).read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path}: broken gzip file: {error}") from error
    header = 4 + 4 * ndim
    if len(content) < header:
        raise ValueError(f"{path}: {len(content)} bytes, an IDX header has {header}")
    zeros, code, dimensions = struct.unpack(">HBB", content[:4])
    if zeros != 0:
        raise ValueError(f"{path}: not an IDX file: starts with 0x{content[:4].hex()}")
    if code != UINT8:
        raise ValueError(f"{path}: dtype code 0x{code:02x}, wanted 0x{UINT8:02x} (unsigned bytes)")
    if dimensions != ndim:
        raise ValueError(f"{path}: {dimensions} dimensions, wanted {ndim}")
    shape = struct.unpack(f">{ndim}I", content[4:header])
    count = 1
    for size in shape:
        count *= size
    if count == 0:
        raise ValueError(f"{path}: no values: dimensions {shape}")
    if len(content) != header + count:
        raise ValueError(
            f"{path}: {len(content) - header} bytes of values, dimensions {shape} want {count}"
        )
    # bytearray: a tensor on immutable bytes makes torch warn.
    values = torch.frombuffer(bytearray(content[header:]), dtype=torch.uint8)
    return values.reshape(shape)
