"""NF4: four bits a weight, for weights that are normally distributed, with scales that are quantized in turn.

    w[i] ~ s[b] CODE[c[i]]        s[b] = max |w| of block b of 64        c[i] in 0 .. 15, two a byte

CODE are 16 values in [-1, 1] with equal shares of a normal distribution between them, and an exact 0. Scales in float32
would cost half a bit a weight; in 8 bits, over groups of 256 of them, they cost an eighth:

    s[b] ~ mean + f[g] e[b]       e in float8 (e4m3), f[g] = max |s - mean| of the group / 448

4 + 8 / 64 + 32 / (64 * 256) = 4.127 bits a weight. Paper: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized
LLMs", NeurIPS 2023, arXiv 2305.14314, section 3 and appendix E.

All is kept as bytes, so that no change of a model's type reaches it.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK: Final = 64
"""Weights that share a scale."""
GROUP: Final = 256
"""Scales that share a factor."""
LARGEST: Final = 448.0
"""Of float8, e4m3."""
CODE: Final = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def sizes(count: int, double: bool) -> tuple[int, int]:
    """Bytes of the scales of so many weights, and of their mean and factors; the codes take count / 2."""
    blocks = -(-count // BLOCK)
    return (blocks, 4 * (1 - (-blocks // GROUP))) if double else (4 * blocks, 0)


def pack(weight: Tensor, double: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [out, in / 2], scales and factors of a weight [out, in], all uint8; `in` is even."""
    flat = weight.detach().float().flatten()
    blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(1)
    code = torch.tensor(CODE, device=weight.device)
    between = (code[1:] + code[:-1]) / 2
    unit = blocks / largest.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    found = torch.bucketize(unit, between, out_int32=True).to(torch.uint8).flatten()[: len(flat)]
    codes = (found[0::2] << 4 | found[1::2]).view(len(weight), -1)
    if not double:
        return codes, largest.view(torch.uint8), codes.new_empty(0)
    mean = largest.mean()
    groups = F.pad(largest - mean, (0, -len(largest) % GROUP)).view(-1, GROUP)
    factor = groups.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / LARGEST
    eighth = (groups / factor[:, None]).flatten()[: len(largest)].to(torch.float8_e4m3fn)
    return codes, eighth.view(torch.uint8), torch.cat([mean[None], factor]).view(torch.uint8)


def unpack(codes: Tensor, scales: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] that was packed, in `dtype`."""
    code = torch.tensor(CODE, device=codes.device, dtype=dtype)
    # Both values of a byte at once: a quarter of the indices that one a value would need.
    pairs = torch.stack([code.repeat_interleave(16), code.repeat(16)], 1)
    flat = F.embedding(codes.flatten().int(), pairs).flatten()
    scale = scale_of(scales, factors).to(dtype)
    whole = len(flat) // BLOCK * BLOCK
    flat[:whole].view(-1, BLOCK).mul_(scale[: whole // BLOCK, None])
    if whole < len(flat):
        flat[whole:].mul_(scale[-1])
    return flat.view(len(codes), -1)


def scale_of(scales: Tensor, factors: Tensor) -> Tensor:
    """The scale of each block, float32."""
    if not len(factors):
        return scales.view(torch.float32)
    mean, factor = factors.view(torch.float32).split([1, len(factors) // 4 - 1])
    return scales.view(torch.float8_e4m3fn).float() * factor.repeat_interleave(GROUP)[: len(scales)] + mean
