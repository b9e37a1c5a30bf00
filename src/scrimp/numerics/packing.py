# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Codes of 1, 2, 4 or 8 bits, packed into bytes.

A row is cut into 8 / bits equal parts, and a byte holds one code of each: so both ways are a few passes over whole
parts, without a gather.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., n] with values below 2^bits -> uint8 [..., n bits / 8]; 8 / bits must divide n."""
    per = 8 // bits
    if per == 1:
        return codes
    parts = codes.unflatten(-1, (per, -1)).unbind(-2)
    out = parts[0].clone()
    for i, part in enumerate(parts[1:], 1):
        out.bitwise_or_(part << (bits * i))
    return out


def unpacked(bytes_: Tensor, bits: int) -> Tensor:
    """And back: uint8 [..., n bits / 8] -> uint8 [..., n]."""
    per = 8 // bits
    if per == 1:
        return bytes_
    return torch.cat([(bytes_ >> (bits * i)).bitwise_and_((1 << bits) - 1) for i in range(per)], dim=-1)
