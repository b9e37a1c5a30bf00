# pyright: strict
"""Memory on disk: blocks of bytes go to a file and come back, in the background, through a bounded buffer.

The file has no name: the system frees it when the process ends, however it ends, so that no run leaves anything for
the next. It is read and written around the system's page cache where the file system allows that, since cached pages
are memory too; else they are dropped once they are written. Every piece has a checksum.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import tempfile
import weakref
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import RLock
from typing import Any, Final

from scrimp.errors import UserError

PIECE: Final = 1 << 20
"""Bytes that are read or written at once."""
SECTOR: Final = 4096
"""Places and lengths of reads and writes around the page cache are multiples of it."""
READERS: Final = 2
"""Threads that read; one writes, so that a place that is used again is written in order."""


@dataclass
class Piece:
    """A part of a block, and where it is."""

    place: int
    """In the file."""
    size: int
    written: Future[int]
    """Its checksum, once it is on disk."""
    buffer: mmap.mmap | None = None
    """Where it is read to in advance."""
    read: Future[None] | None = None


@dataclass(eq=False)
class Block:
    """Bytes on disk, for as long as somebody holds this."""

    size: int
    pieces: list[Piece] = field(default_factory=list[Piece])

    @property
    def fetched(self) -> bool:
        """Whether all of it was asked for in advance."""
        return all(piece.read is not None for piece in self.pieces)


class Spill:
    """A file of blocks.

    Args:
        folder: on the disk to use.
        buffer: bytes of memory between tensors and disk, half for writing and half for reading in advance.
    Raises:
        UserError: if no file can be made there.
    """

    def __init__(self, folder: Path, buffer: int) -> None:
        self.folder = folder
        try:
            with tempfile.TemporaryFile(dir=folder, prefix="scrimp-") as file:
                self.fd = os.dup(file.fileno())
        except OSError as error:
            raise self._failed(error) from None
        weakref.finalize(self, os.close, self.fd)
        self.direct = _around_the_cache(self.fd)
        self.end, self.live, self.lock = 0, 0, RLock()
        self.left: dict[int, list[int]] = {}
        """size -> places that are free again."""
        self.writing, self.reading = SimpleQueue[mmap.mmap](), SimpleQueue[mmap.mmap]()
        for queue in (self.writing, self.reading):
            for _ in range(max(1, buffer // PIECE // 2)):
                queue.put(mmap.mmap(-1, PIECE))
        self.spare = mmap.mmap(-1, PIECE)
        self.writer = ThreadPoolExecutor(1, "spill-write")
        self.readers = ThreadPoolExecutor(READERS, "spill-read")

    def put(self, address: int, size: int) -> Block:
        """Copy memory, to be written; waits while the buffer is full.

        Raises:
            UserError: if an earlier write has failed; `take` raises for this one.
        """
        block = Block(size)
        for start in range(0, size, PIECE):
            length = min(PIECE, size - start)
            buffer = self.writing.get()
            ctypes.memmove(_address(buffer), address + start, length)
            place = self._place(length)
            block.pieces.append(Piece(place, length, self.writer.submit(self._write, buffer, place, length)))
        weakref.finalize(block, self._free, block.pieces).atexit = False
        if block.pieces and (first := block.pieces[0].written).done():
            self._done(first)
        return block

    def fetch(self, block: Block) -> bool:
        """Read a block in advance, as far as the buffer has room; returns whether it had."""
        for piece in block.pieces:
            if piece.read is None:
                try:
                    piece.buffer = self.reading.get_nowait()
                except Empty:
                    return False
                piece.read = self.readers.submit(self._read, piece, piece.buffer)
        return True

    def take(self, block: Block, address: int) -> None:
        """Copy a block into memory; waits for what was read in advance, and reads the rest.

        Raises:
            UserError: if the disk was full, or does not give back what was written.
        """
        for number, piece in enumerate(block.pieces):
            buffer, read = piece.buffer, piece.read
            if buffer is None or read is None:
                self._read(piece, self.spare)
                ctypes.memmove(address + number * PIECE, _address(self.spare), piece.size)
                continue
            try:
                self._done(read)
                ctypes.memmove(address + number * PIECE, _address(buffer), piece.size)
            finally:
                piece.buffer = piece.read = None
                self.reading.put(buffer)

    def _write(self, buffer: mmap.mmap, place: int, size: int) -> int:
        try:
            check = zlib.crc32(memoryview(buffer)[:size])
            whole, done = _sectors(size), 0
            while done < whole:
                done += os.pwrite(self.fd, memoryview(buffer)[done:whole], place + done)
            self._forget(place, whole, written=True)
            return check
        finally:
            self.writing.put(buffer)

    def _read(self, piece: Piece, buffer: mmap.mmap) -> None:
        check = self._done(piece.written)
        whole, done = _sectors(piece.size), 0
        while done < whole:
            try:
                count = os.preadv(self.fd, [memoryview(buffer)[done:whole]], piece.place + done)
            except OSError as error:
                raise self._failed(error) from None
            done += count
            if count == 0 or done % SECTOR:
                break
        self._forget(piece.place, whole, written=False)
        if done < whole or zlib.crc32(memoryview(buffer)[: piece.size]) != check:
            what = "the disk gave back other bytes than were written, so the step is lost."
            raise UserError(what, str(self.folder), "Resume from the last checkpoint, with another disk in `path`.")

    def _done(self, future: Future[Any]) -> Any:
        try:
            return future.result()
        except OSError as error:
            raise self._failed(error) from None

    def _failed(self, error: OSError) -> UserError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        fix = "Free some space, or set `path` to another disk; a run resumes from its last checkpoint."
        return UserError(f"cannot hold what is offloaded: {error.strerror or error}.", str(self.folder),
                         fix if full else "Set `path` to a folder on a local disk.")  # fmt: skip

    def _forget(self, place: int, size: int, written: bool) -> None:
        """Take a piece out of the page cache; what is not on disk yet cannot be taken out."""
        if not self.direct and hasattr(os, "posix_fadvise"):
            if written:
                os.fdatasync(self.fd)
            os.posix_fadvise(self.fd, place, size, os.POSIX_FADV_DONTNEED)

    def _place(self, size: int) -> int:
        """Where to write so many bytes. Sizes recur every step, so that each place is used again for the same."""
        whole = _sectors(size)
        with self.lock:
            self.live += 1
            left = self.left.get(whole)
            if left:
                return left.pop()
            place, self.end = self.end, self.end + whole
            return place

    def _free(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            if piece.buffer is not None and piece.read is not None:
                _when_done(piece.read, self.reading, piece.buffer)
        with self.lock:
            for piece in pieces:
                self.left.setdefault(_sectors(piece.size), []).append(piece.place)
            self.live -= len(pieces)
            if self.live == 0:
                self.left, self.end = {}, 0


def _when_done(read: Future[None], queue: SimpleQueue[mmap.mmap], buffer: mmap.mmap) -> None:
    """Give a buffer back that nobody has taken."""
    give: Callable[[Future[None]], None] = lambda _: queue.put(buffer)  # noqa: E731
    read.add_done_callback(give)


def _around_the_cache(fd: int) -> bool:
    """Ask that reads and writes pass the page cache by; returns whether they do."""
    try:
        import fcntl

        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
        buffer = mmap.mmap(-1, SECTOR)
        os.pwrite(fd, buffer, 0)
        os.preadv(fd, [buffer], 0)
    except (ImportError, AttributeError, OSError):
        return False
    return True


def _sectors(size: int) -> int:
    return -(-size // SECTOR) * SECTOR


def _address(buffer: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


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
