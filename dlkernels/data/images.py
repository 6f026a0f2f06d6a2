"""One image from a file."""

import struct
import zlib
from pathlib import Path

import torch

from dlkernels.files import first_line


def read(path: Path, size: int | None = None) -> torch.Tensor:
    """The image as uint8 (3, H, W), or resized to (3, size, size), antialiased bilinear.

    Raises ValueError naming a broken file; ModuleNotFoundError without Pillow.
    """
    from PIL import Image

    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error,
            Image.DecompressionBombError) as error:  # SyntaxError: a broken PNG chunk  # fmt: skip
        kind = path.suffix[1:].upper()
        raise ValueError(f"{path}: broken {kind} file: {first_line(error)}") from error
    if size is not None:
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    # bytearray: a tensor on immutable bytes makes torch warn.
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1)
