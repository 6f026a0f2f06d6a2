"""Memory that a call keeps."""

import ctypes

import pytest


class _Mallinfo(ctypes.Structure):
    """glibc's, of <malloc.h>."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    ]  # fmt: skip


def _allocated() -> int:
    """Bytes of malloc in use, in all arenas and mapped."""
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError):
        pytest.skip("no mallinfo2 in this C library")
    mallinfo.restype = _Mallinfo
    info = mallinfo()
    return info.uordblks + info.hblkhd


def assert_nothing_is_kept(call, times=4000) -> None:
    """Of many calls not even a few bytes each."""
    for _ in range(200):
        call()
    before = _allocated()
    for _ in range(times):
        call()
    kept = (_allocated() - before) / times
    assert kept < 8, f"{kept:.1f} bytes a call"
