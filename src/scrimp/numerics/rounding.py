# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Stochastic rounding: up or down with the probabilities that make it right on average.

    r(x) = floor(x + u),   u uniform in [0, 1):   r(x) is floor(x) + 1 with probability x - floor(x), so E[r(x)] = x

The noise u is a function of a key and of the place of a number, with no generator behind it, so that recomputation and
a resumed run round alike. Where no step counts, the key is made of the tensor's own contents (`contents`).
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

# Multipliers of a 32-bit mixing function (Steele and Vigna, "Computationally easy, spectrally good multipliers").
MIX: Final = (0x2C1B3C6D, 0x297A2D39)
BITS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of a number -> the integers that show its bits."""
SAMPLES: Final = 4096
"""Numbers of a tensor that its key is made of."""


def noise(count: int, key: Tensor | int, device: torch.device, offset: int = 0) -> Tensor:
    """Uniform numbers in [0, 1): float32 [count].

    Args:
        key: 32 bits; other keys, other numbers.
        offset: place of the first one, where a tensor is treated piece by piece.
    """
    place = torch.arange(offset, offset + count, dtype=torch.int32, device=device)
    if isinstance(key, int):
        key = torch.full((), _signed(key), dtype=torch.int32, device=device)
    bits = _mixed(place ^ _mixed(key.clone()))
    return (bits >> 8).bitwise_and_(0xFFFFFF).to(torch.float32).mul_(2.0**-24)


def stochastic(x: Tensor, key: Tensor | int, offset: int = 0) -> Tensor:
    """floor(x + u), of the same shape and type."""
    u = noise(x.numel(), key, x.device, offset).view(x.shape)
    return (x + u).floor()


def contents(x: Tensor, salt: int = 0) -> Tensor:
    """A key of a tensor's own bits: int32, a scalar. Equal tensors give equal keys, which recomputation needs."""
    flat = x.detach().reshape(-1)
    some = flat[:: max(1, flat.numel() // SAMPLES)]
    total = some.view(BITS[x.element_size()]).sum(dtype=torch.int64) + salt
    return (total ^ (total >> 32)).bitwise_and(0x7FFFFFFF).to(torch.int32)


def _mixed(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers that scatters them; changes its argument. Shifts are made unsigned by masks."""
    for multiplier in MIX:
        x = x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(multiplier)
    return x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF))


def _signed(key: int) -> int:
    """The low 32 bits as a signed integer."""
    low = key & 0xFFFFFFFF
    return low - (1 << 32) if low >> 31 else low
