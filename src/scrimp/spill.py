# pyright: strict
"""Memory on disk: blocks of bytes go to a file and come back, in the background, through a bounded buffer.

The file has no name: the system frees it when the process ends, however it ends, so that no run leaves anything for
the next. It is read and written around the system's page cache where the file system allows that (`scrimp.disk`), since
cached pages are memory too. Every piece has a checksum.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import RLock
from typing import Final

from scrimp.disk import PAGE, Scratch

PIECE: Final = 1 << 20
"""Bytes that are read or written at once."""
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

    pieces: list[Piece] = field(default_factory=list[Piece])


class Spill:
    """A file of blocks.

    Args:
        file: where they go.
        buffer: bytes of memory between tensors and disk, half for writing and half for reading in advance.
    """

    def __init__(self, file: Scratch, buffer: int) -> None:
        self.file = file
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
        block = Block()
        for start in range(0, size, PIECE):
            length = min(PIECE, size - start)
            buffer = self.writing.get()
            ctypes.memmove(_address(buffer), address + start, length)
            place = self._place(length)
            block.pieces.append(Piece(place, length, self.writer.submit(self._write, buffer, place, length)))
        weakref.finalize(block, self._free, block.pieces).atexit = False
        if block.pieces and (first := block.pieces[0].written).done():
            first.result()
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
                read.result()
                ctypes.memmove(address + number * PIECE, _address(buffer), piece.size)
            finally:
                piece.buffer = piece.read = None
                self.reading.put(buffer)

    def _write(self, buffer: mmap.mmap, place: int, size: int) -> int:
        try:
            check = zlib.crc32(memoryview(buffer)[:size])
            self.file.write(memoryview(buffer)[: _pages(size)], place)
            return check
        finally:
            self.writing.put(buffer)

    def _read(self, piece: Piece, buffer: mmap.mmap) -> None:
        check = piece.written.result()
        self.file.read(memoryview(buffer)[: _pages(piece.size)], piece.place)
        if zlib.crc32(memoryview(buffer)[: piece.size]) != check:
            raise self.file.error("the disk gave back other bytes than were written, so the step is lost")

    def _place(self, size: int) -> int:
        """Where to write so many bytes. Sizes recur every step, so that each place is used again for the same."""
        whole = _pages(size)
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
                self.left.setdefault(_pages(piece.size), []).append(piece.place)
            self.live -= len(pieces)
            if self.live == 0:
                self.left, self.end = {}, 0


def _when_done(read: Future[None], queue: SimpleQueue[mmap.mmap], buffer: mmap.mmap) -> None:
    """Give a buffer back that nobody has taken."""
    give: Callable[[Future[None]], None] = lambda _: queue.put(buffer)  # noqa: E731
    read.add_done_callback(give)


def _pages(size: int) -> int:
    return -(-size // PAGE) * PAGE


def _address(buffer: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
