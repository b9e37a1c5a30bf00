"""Dropout whose mask is a function of (layer, sample, position, channel), and of nothing else.

No generator is involved, so that recomputation, another layout, another micro-batch size or a resumed run drops the
same activations. `sample` numbers samples over the whole run, hence it stands for (seed, step, place in the batch).
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

# Multipliers of a 32-bit mixing function (Steele and Vigna, "Computationally easy, spectrally good multipliers").
MIX = (0x2C1B3C6D, 0x297A2D39)


class Dropout(nn.Module):
    """x -> x * mask / (1 - p). Shapes: x [B, T, C], sample [B].

    Args:
        p: share of activations that become zero.
        site: number of this place in the model; every place has its own mask.

    Attributes:
        before: a seam: how many tokens of each sample stand before those that it gets.
        places: a seam: the places in their samples of all tokens that a model gets, [T], if they are not the first.
    """

    def __init__(self, p: float, site: int) -> None:
        super().__init__()
        self.p, self.site, self.before = p, site, 0
        self.places: Tensor | None = None
        # Not in `forward`: compiled, the product would be symbolic, for which inductor makes invalid C++.
        self.key = site * 0x9E3779B1 & 0xFFFFFFFF

    def forward(self, x: Tensor, sample: Tensor | None = None) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        if sample is None:
            raise ValueError("dropout needs the samples' numbers: pass `sample` to the model.")
        behind = self.before + x.shape[1]
        places = torch.arange(self.before, behind, device=x.device)
        if self.places is not None:
            places = self.places[self.before : behind]
        return x * keep(x.shape, sample, self.key, self.p, places).to(x.dtype) / (1 - self.p)


class Samples:
    """Numbers of the samples that a block works on, for what is inside of it and is not given them.

    Put around a block's forward pass before anything that runs it again, so that it knows them then as well.
    """

    def __init__(self) -> None:
        self.now: Tensor | None = None

    def around(self, forward: Callable[..., object]) -> Callable[..., object]:
        """The forward pass, whose argument `sample` is known while it runs.

        Raises:
            ValueError: if it has no such argument.
        """
        at = list(signature(forward).parameters).index("sample")

        def known(*args: Any, **kwargs: Any) -> object:
            before = self.now
            self.now = kwargs["sample"] if "sample" in kwargs else args[at] if at < len(args) else None
            try:
                return forward(*args, **kwargs)
            finally:
                self.now = before

        return known


def keep(shape: torch.Size, sample: Tensor, key: int, p: float, places: Tensor) -> Tensor:
    """Boolean mask [B, T, C], True with probability 1 - p, of the tokens at some places [T] of the samples."""
    row = mixed(mixed(sample.to(places.device) & 0xFFFFFFFF) ^ key)[:, None, None]
    token = mixed(row ^ places[:, None])
    bits = mixed(token ^ (torch.arange(shape[2], device=places.device) * 0x85EBCA6B & 0xFFFFFFFF))
    return bits >= int(p * 2**32)


def mixed(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers (held in int64) that scatters them."""
    for multiplier in MIX:
        x = (x ^ (x >> 16)) * multiplier & 0xFFFFFFFF
    return x ^ (x >> 15)
