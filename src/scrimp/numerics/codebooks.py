# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Codebooks for optimizer states, whose numbers in one block differ by many powers of ten.

    x' = scale book[q],   scale = max |x| of the block,   q: the nearest entry of the book

    dynamic    decades 10^-6 .. 1 (10^-2 .. 1 at 4 bits): each has twice as many entries as the one below
    positive   the same for moments that are never negative, with the sign's bit spent on precision
    linear     (i + 1) / 2^bits: no zero, so that nothing that was positive is divided by as zero

Dettmers et al., "8-bit Optimizers via Block-wise Quantization", ICLR 2022, arXiv 2110.02861; the book without zero:
Li et al., "Memory Efficient Optimizers with 4-bit States", NeurIPS 2023, arXiv 2309.01507.
"""

from __future__ import annotations

from functools import cache
from typing import Final, Literal

import torch
from torch import Tensor

from scrimp.numerics.packing import packed, unpacked

Book = Literal["dynamic", "positive", "linear"]
BLOCK: Final = {8: 256, 4: 128}
"""Bits -> numbers of a block, which share a scale in float32."""


@cache
def entries(book: Book, bits: int) -> tuple[float, ...]:
    """The 2^bits values of a book, in order; the largest is 1."""
    if book == "linear":
        return tuple((i + 1) / 2**bits for i in range(2**bits))
    decades = bits - 1
    found = [0.0, 1.0]
    for i in range(decades):
        count = 2**i if book == "dynamic" else 2 ** (i + 1)
        middles = [0.1 + 0.9 * (j + 0.5) / count for j in range(count)]
        scaled = [m * 10.0 ** (i - decades + 1) for m in middles]
        found += scaled + ([-m for m in scaled] if book == "dynamic" else [])
    return tuple(sorted(found))


@torch.no_grad()
def encode(x: Tensor, bits: int, book: Book) -> tuple[Tensor, Tensor]:
    """(codes, scales): uint8 [blocks, block bits / 8], float32 [blocks, 1]; the last block is filled up with zeros."""
    block = BLOCK[bits]
    flat = x.detach().reshape(-1)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % block)).to(torch.float32).view(-1, block)
    scales = flat.abs().amax(1, keepdim=True)
    values = torch.tensor(entries(book, bits), dtype=torch.float32, device=x.device)
    relative = flat / torch.where(scales > 0, scales, 1.0)
    codes = torch.bucketize(relative, (values[1:] + values[:-1]) / 2, out_int32=True)
    return packed(codes.to(torch.uint8), bits), scales


@torch.no_grad()
def decode(codes: Tensor, scales: Tensor, bits: int, book: Book, like: Tensor) -> Tensor:
    """A tensor of the shape, type and device of `like`."""
    values = torch.tensor(entries(book, bits), dtype=torch.float32, device=codes.device)
    flat = values[unpacked(codes, bits).to(torch.int32)].mul_(scales).view(-1)
    return flat[: like.numel()].to(like.dtype).reshape(like.shape)
