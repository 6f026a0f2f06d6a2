"""Files that are whole, or not there; and what is wrong with one, in one line."""

import os
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Writes beside ``path``, then renames: ``path`` is the old file or the whole new one."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def remove_parts(path: Path) -> None:
    """Removes what ``write_atomically(path, ...)`` left where it was killed."""
    for part in path.parent.glob(f".{path.name}.*.part"):
        part.unlink(missing_ok=True)


def first_line(error: Exception) -> str:
    """Of what it says; its class where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
