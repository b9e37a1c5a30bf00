"""Tensors that live in a file: what states, weights and gradients on disk share.

A `Scratch` is one unnamed file. No other process can open it, no later run can mistake it for its own, and the system
frees it when the process ends, even by kill -9. Space is claimed when it is asked for, so that a full disk shows early.
An `Extent` is a piece of it for one tensor, beginning on a page. There are two ways to its bytes:

    read, write    past the page cache (O_DIRECT) where the file system allows, into page-aligned buffers
    mapped         as an ordinary tensor whose pages come and go; `fetch` and `settle` say when

The system keeps both in step; a write past the page cache drops what the cache holds of it.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import weakref
import zlib
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from scrimp.errors import UserError
from scrimp.pages import Pages, written

PAGE: Final = 4096
"""Bytes to which addresses, offsets and lengths are aligned."""
SMALL: Final = 1 << 16
"""Bytes below which a tensor's pages are left to the system: waiting for a disk costs more than they do."""


class Scratch:
    """An unnamed file of this process.

    Args:
        folder: where it shall be.
        where: path in the recipe of the technique that wants it, for errors.
    Raises:
        UserError: if no file can be made there.
    """

    def __init__(self, folder: Path, where: str) -> None:
        self.folder, self.where, self.size = folder, where, 0
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}.", where, "Make it, or name one on a local disk.")
        try:
            with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
                self.fd = os.dup(file.fileno())
        except OSError as error:
            raise self.error(f"no file can be made: {error.strerror}") from None
        # What is read and written past the page cache has a descriptor of its own: mapping wants the other.
        self.direct = self._direct()
        descriptors = {self.fd, self.direct}
        weakref.finalize(self, lambda: [os.close(fd) for fd in descriptors])

    def _direct(self) -> int:
        try:
            return os.open(f"/proc/self/fd/{self.fd}", os.O_RDWR | os.O_DIRECT)
        except (OSError, AttributeError):
            return self.fd

    def error(self, what: str) -> UserError:
        """A fault of the disk as a user's error."""
        fix = "Set `folder` to a folder on a disk with room; the last checkpoint is intact."
        return UserError(f"{what} ({self.folder}).", self.where, fix)

    def read(self, view: memoryview, place: int) -> None:
        """Fill memory from a byte of the file on; it begins on a page and is of whole pages.

        Raises:
            UserError: if the file is shorter than it must be, or the disk fails.
        """
        self._move(os.preadv, "read", view, place)
        self._drop(place, len(view))

    def write(self, view: memoryview, place: int) -> None:
        """Write memory to a byte of the file on; it begins on a page and is of whole pages.

        Raises:
            UserError: if the disk is full or fails.
        """
        self._move(os.pwritev, "write", view, place)
        if self.direct == self.fd:
            # What is not on disk yet cannot be taken out of the page cache.
            written(self.fd, place, len(view))
        self._drop(place, len(view))

    def _move(self, move: Callable[[int, list[memoryview], int], int], verb: str, view: memoryview, place: int) -> None:
        done = 0
        while done < len(view):
            try:
                count = move(self.direct, [view[done:]], place + done)
            except OSError as error:
                if error.errno == errno.EINVAL and self._leave_direct():
                    continue
                raise self.error(f"cannot {verb}: {error.strerror}") from None
            if count == 0:
                raise self.error("the file is truncated")
            done += count

    def _leave_direct(self) -> bool:
        """A file system may open a file for direct access and then refuse it."""
        if self.direct == self.fd:
            return False
        self.direct = self.fd
        return True

    def _drop(self, place: int, length: int) -> None:
        if self.direct == self.fd and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.fd, place, length, os.POSIX_FADV_DONTNEED)

    def extent(self, shape: torch.Size, dtype: torch.dtype) -> Extent:
        """Room for a tensor, all zeros.

        Raises:
            UserError: if the disk is full.
        """
        extent = Extent(self, self.size, shape, dtype)
        self.size += extent.room
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self.fd, extent.offset, extent.room)
            else:
                os.ftruncate(self.fd, self.size)
        except OSError as error:
            short = error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
            what = f"the disk has no room for {self.size:,} bytes" if short else f"cannot write: {error.strerror}"
            raise self.error(what) from None
        return extent


class Extent:
    """Room for one tensor in a file."""

    def __init__(self, file: Scratch, offset: int, shape: torch.Size, dtype: torch.dtype) -> None:
        self.file, self.offset, self.shape, self.dtype = file, offset, shape, dtype
        self.bytes = prod(shape) * dtype.itemsize
        self.room = max(-(-self.bytes // PAGE), 1) * PAGE
        self.sums: dict[int, tuple[int, int]] = {}
        """Start of each piece that was written -> (its length, its checksum)."""
        self._map: Pages | None = None

    def read(self, buffer: Tensor, start: int) -> None:
        """Fill a buffer of bytes, aligned as `aligned` makes it, from byte `start` on.

        Raises:
            UserError: if the file is shorter than it must be, or not what was written.
        """
        view = memoryview(cast(Any, buffer.numpy()))
        self.file.read(view, self.offset + start)
        length, sum_ = self.sums.get(start, (0, 0))
        if length == len(view) and zlib.crc32(view) != sum_:
            raise self.file.error("the file is not what was written (a checksum differs)")

    def write(self, buffer: Tensor, start: int) -> None:
        """Write a buffer of bytes, aligned as `aligned` makes it, from byte `start` on.

        Raises:
            UserError: if the disk is full or fails.
        """
        view = memoryview(cast(Any, buffer.numpy()))
        self.sums[start] = len(view), zlib.crc32(view)
        self.file.write(view, self.offset + start)

    def mapped(self) -> Tensor:
        """The tensor itself, whose memory is the file. What is written to it is in the file."""
        # Whoever gets it may write, so that no checksum holds any more.
        self.sums.clear()
        if self._map is None:
            try:
                self._map = Pages(self.file.fd, self.offset, self.room)
            except OSError as error:
                raise self.file.error(f"cannot map: {error.strerror}") from None
        flat = marked(torch.frombuffer(self._map.memory, dtype=self.dtype, count=max(prod(self.shape), 1)), self)
        return flat[: prod(self.shape)].view(self.shape)

    def fetch(self) -> None:
        """Begin to read its pages, without waiting."""
        if self._map is not None and hasattr(mmap, "MADV_WILLNEED"):
            self._map.advise(mmap.MADV_WILLNEED)

    def settle(self) -> None:
        """Write its changed pages and take none of the memory any more; the next use reads them again."""
        if self._map is None or self.bytes < SMALL:
            return
        if written(self.file.fd, self.offset, self.room) != 0:
            raise self.file.error("cannot write")
        if hasattr(mmap, "MADV_DONTNEED") and hasattr(os, "posix_fadvise"):
            self._map.advise(mmap.MADV_DONTNEED)
            os.posix_fadvise(self.file.fd, self.offset, self.room, os.POSIX_FADV_DONTNEED)


class Imagined:
    """An extent of a plan: tensors without values, and no file."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self._tensor: Tensor | None = None

    def mapped(self) -> Tensor:
        """A tensor that a plan counts as no memory."""
        if self._tensor is None:
            # Marked while it is empty: what makes it larger is then seen as what it is.
            empty = marked(torch.empty(0, dtype=self.dtype), self)
            self._tensor = empty.resize_(self.shape)
        return self._tensor

    def fetch(self) -> None:
        """Nothing."""

    def settle(self) -> None:
        """Nothing."""


def home(folder: str, out: str | Path) -> Path:
    """Where a file shall be: in the folder of the settings, else in the nearest to the run's that exists."""
    if folder:
        return Path(folder).absolute()
    place = Path(out).absolute()
    return next(p for p in (place, *place.parents) if p.is_dir())


def in_memory(folder: Path) -> bool:
    """Whether a folder's disk is memory itself, as a tmpfs is."""
    try:
        wanted, mounts = os.stat(folder).st_dev, Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return False
    for line in mounts:
        before, _, after = line.partition(" - ")
        major, minor = before.split()[2].split(":")
        if os.makedev(int(major), int(minor)) == wanted:
            return after.split()[0] in ("tmpfs", "ramfs")
    return False


def aligned(size: int) -> Tensor:
    """A buffer of at least so many bytes, a whole number of pages, beginning on one."""
    size = -(-size // PAGE) * PAGE
    raw = torch.empty(size + PAGE, dtype=torch.uint8)
    skip = 0 if detect_fake_mode() is not None else -raw.data_ptr() % PAGE
    return raw[skip : skip + size]


def marked(tensor: Tensor, extent: Extent | Imagined) -> Tensor:
    """A tensor whose storage knows that it lies on disk."""
    tensor.untyped_storage().extent = extent  # type: ignore[attr-defined]
    return tensor


def extent_of(tensor: Tensor) -> Extent | Imagined | None:
    """Where on disk a tensor lies; None if it is in memory."""
    return getattr(tensor.untyped_storage(), "extent", None)


def fetch(tensor: Tensor) -> None:
    """Begin to read a tensor that lies on disk; nothing for others."""
    if (extent := extent_of(tensor)) is not None:
        extent.fetch()


def settle(tensor: Tensor) -> None:
    """Free the memory of a tensor that lies on disk, once it is written; nothing for others."""
    if (extent := extent_of(tensor)) is not None:
        extent.settle()
