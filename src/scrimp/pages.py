# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Pages of a file as memory, and when they are on disk: what Python's own `mmap` and `os` do not offer."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from typing import Any, Final

LIBC: Final = ctypes.CDLL(None, use_errno=True)


class Pages:
    """Pages of a file as memory, until nobody holds `memory`.

    Python's own mapping holds a descriptor each, and a large model has more tensors than a process may have those.

    Raises:
        OSError: if the system refuses.
    """

    def __init__(self, fd: int, offset: int, length: int) -> None:
        access, place = mmap.PROT_READ | mmap.PROT_WRITE, ctypes.c_int64(offset)
        LIBC.mmap.restype = ctypes.c_void_p
        found: int = LIBC.mmap(None, ctypes.c_size_t(length), access, mmap.MAP_SHARED, fd, place)
        if found == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self.memory = (ctypes.c_char * length).from_address(found)
        self.span = ctypes.c_void_p(found), ctypes.c_size_t(length)
        weakref.finalize(self.memory, LIBC.munmap, *self.span).atexit = False

    def advise(self, what: int) -> None:
        """Tell the system what comes next."""
        LIBC.madvise(*self.span, what)


def written(fd: int, offset: int, length: int) -> int:
    """Wait until changed pages of a file are on disk, without the journal, which nobody will read; 0 if they are."""
    whole: Any = getattr(LIBC, "sync_file_range", None)
    if whole is None:
        os.fsync(fd)
        return 0
    return whole(ctypes.c_int(fd), ctypes.c_int64(offset), ctypes.c_int64(length), ctypes.c_uint(7))
