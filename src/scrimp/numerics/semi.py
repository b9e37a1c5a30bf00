# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Matrices of which 2 of every 4 neighbors in a row remain, packed: their numbers, and where they stood.

    4 weights of b bits become 2 numbers and 2 indices of 2 bits:  2 b + 4 of 4 b bits
    16 bits: 56.25 %      8 bits: 62.5 %      32 bits: 53.125 %

The product reads 2 of every 4 inputs. It is written to be right, and is slower than the dense product: no CPU has an
instruction for it, and a GPU wants a layout of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from scrimp.errors import UserError
from scrimp.numerics.packing import packed, unpacked


@dataclass(frozen=True, eq=False)
class Semi:
    """A packed matrix [rows, columns]."""

    values: Tensor
    """[rows, columns / 2]: what remains, from left to right."""
    index: Tensor
    """uint8 [rows, ceil(columns / 8)]: where each stood among its 4, 2 bits each."""

    @classmethod
    def pack(cls, weight: Tensor, mask: Tensor) -> Semi:
        """The numbers of a matrix where a mask is.

        Raises:
            UserError: if the mask does not have 2 of every 4.
        """
        rows, columns = weight.shape
        if columns % 4 or not bool((mask.view(rows, -1, 4).sum(-1) == 2).all()):
            raise UserError("a mask of 2 of every 4 neighbors in a row is needed.", "Semi.pack", "Make it by 2:4.")
        # As many in each row, so that all of them are rows of one length.
        places = mask.nonzero()[:, 1].view(rows, -1)
        # A byte holds 4 codes; what is missing in the last one is 0.
        codes = F.pad((places % 4).to(torch.uint8), (0, -places.shape[1] % 4))
        return cls(weight.gather(1, places), packed(codes, 2))

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.values.nbytes + self.index.nbytes

    def places(self) -> Tensor:
        """int64 [rows, columns / 2]: the column of each number."""
        half = self.values.shape[1]
        within = unpacked(self.index, 2)[:, :half].long()
        return within + torch.arange(half, device=within.device).div(2, rounding_mode="floor") * 4

    def dense(self) -> Tensor:
        """[rows, columns], with zeros."""
        rows, half = self.values.shape
        return self.values.new_zeros(rows, 2 * half).scatter_(1, self.places(), self.values)


def linear(x: Tensor, weight: Semi, rows: int = 64) -> Tensor:
    """y = x W^T, from 2 of every 4 inputs. Shapes: x [..., columns] -> [..., rows of W].

    The two products of each group are added first, and then the groups. A dense product that adds the four of each
    group first has the same bits, since zeros change no sum.

    Args:
        rows: of W that are handled at once: they gather x's length times half of it.
    """
    flat, places = x.reshape(-1, x.shape[-1]), weight.places()
    parts: list[Tensor] = []
    for values, columns in zip(weight.values.split(rows), places.split(rows), strict=True):
        # [B, rows, columns / 2]
        products = flat[:, columns] * values
        parts.append((products[..., 0::2] + products[..., 1::2]).sum(-1))
    return torch.cat(parts, 1).view(*x.shape[:-1], -1)
