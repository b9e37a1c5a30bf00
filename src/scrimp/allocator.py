"""Let the C library give freed memory back to the system at once.

By default glibc keeps freed blocks in the heap and raises its threshold for doing so as it goes, so that a process on a
CPU holds a fifth to a third more than its live tensors. With fixed thresholds each block above `THRESHOLD` is a mapping
of its own, which is returned when it is freed; the price is fresh pages for each such block.
`SCRIMP_ALLOCATOR=default` leaves the C library alone: measure both when every second counts.
"""

from __future__ import annotations

import ctypes
import os
import platform
from typing import Final

THRESHOLD: Final = 1 << 20
"""Bytes from which a block is a mapping of its own. Smaller ones stay in the heap, where reuse is free."""
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # from malloc.h


def can_be_lean() -> bool:
    """Whether there are thresholds to set, and the user has not forbidden it."""
    return os.environ.get("SCRIMP_ALLOCATOR") != "default" and platform.libc_ver()[0] == "glibc"


def lean() -> bool:
    """Set the thresholds for this process; returns whether there was something to set."""
    if not can_be_lean():
        return False
    libc = ctypes.CDLL(None)
    return all(
        libc.mallopt(ctypes.c_int(option), ctypes.c_int(value)) == 1
        for option, value in ((M_MMAP_THRESHOLD, THRESHOLD), (M_TRIM_THRESHOLD, THRESHOLD), (M_TOP_PAD, 0))
    )
