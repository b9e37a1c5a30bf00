"""Which sets of weights are kept or pruned together.

    weights   every weight by itself
    4x4       square blocks of a matrix, whose score is the sum of their weights' scores
    2:4       the 2 best of every 4 neighbors along the inputs: the density is 1/2

`transposable` is 2:4 along the inputs and along the outputs at once. Masks are stored dense, whatever their pattern.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from scrimp.errors import UserError


@dataclass(frozen=True)
class Pattern:
    """A pattern, read from its text."""

    block: int = 1
    """Side of the blocks."""
    keep: int = 0
    """Kept of every `group` neighbors; 0 for none of that kind."""
    group: int = 0

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read `weights`, `4x4` or `2:4`.

        Raises:
            UserError: if it is neither.
        """
        if text == "weights":
            return cls()
        block = re.fullmatch(r"(\d+)x(\d+)", text)
        if block and block[1] == block[2] and int(block[1]) > 0:
            return cls(block=int(block[1]))
        groups = re.fullmatch(r"(\d+):(\d+)", text)
        if groups and 0 < int(groups[1]) < int(groups[2]):
            return cls(keep=int(groups[1]), group=int(groups[2]))
        raise UserError(f"`{text}` is no pattern.", "pattern", "Write weights, 4x4 for blocks, or 2:4 for groups.")

    def check(self, name: str, shape: tuple[int, int], where: str) -> None:
        """Whether a matrix divides.

        Raises:
            UserError: if it does not.
        """
        side = self.group or self.block
        if shape[1] % side or (not self.group and shape[0] % side):
            what = f"`{name}` of {shape[0]} x {shape[1]} does not divide into parts of {side}."
            raise UserError(what, where, "Choose other sizes, or a pattern of layers without it.")


def pooled(score: Tensor, side: int) -> Tensor:
    """Sums over square blocks: [rows, columns] -> [rows / side, columns / side]."""
    if side == 1:
        return score
    rows, columns = score.shape
    return score.view(rows // side, side, columns // side, side).sum((1, 3))


def spread(mask: Tensor, side: int) -> Tensor:
    """A mask of blocks -> a mask of weights."""
    return mask if side == 1 else mask.repeat_interleave(side, 0).repeat_interleave(side, 1)


def best(scores: Mapping[str, Tensor], keep: int, pattern: Pattern, floor: int = 1) -> dict[str, Tensor]:
    """Masks of the best-scored weights of all layers together.

    Args:
        keep: how many weights; not read for groups, which have a density of their own.
        floor: weights (or blocks) that every layer keeps at least, so that none is cut off.
    """
    if pattern.group:
        return {name: of_groups(score, pattern) for name, score in scores.items()}
    parts = {name: pooled(score, pattern.block) for name, score in scores.items()}
    flat = torch.cat([part.flatten() for part in parts.values()])
    start = 0
    for part in parts.values():
        top = part.flatten().topk(min(floor, part.numel())).indices
        flat[start + top] = torch.inf
        start += part.numel()
    units = max(floor * len(parts), round(keep / pattern.block**2))
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[flat.topk(min(units, len(flat))).indices] = True
    pieces = chosen.split([part.numel() for part in parts.values()])
    return {
        name: spread(piece.view(part.shape), pattern.block)
        for (name, part), piece in zip(parts.items(), pieces, strict=True)
    }


def of_groups(score: Tensor, pattern: Pattern) -> Tensor:
    """The mask of the best `keep` of every `group` neighbors along the inputs."""
    groups = score.reshape(-1, pattern.group)
    mask = torch.zeros_like(groups, dtype=torch.bool)
    return mask.scatter_(1, groups.topk(pattern.keep, 1).indices, True).view(score.shape)


def transposable(score: Tensor) -> Tensor:
    """The mask with 2 of every 4 along the inputs and along the outputs whose scores have the largest sum.

    Each block of 4 x 4 takes the best of the 90 ways there are. Rows and columns must divide by 4.
    """
    rows, columns = score.shape
    ways = both_ways(score.device)
    blocks = score.view(rows // 4, 4, columns // 4, 4).transpose(1, 2).reshape(-1, 16)
    best_ = (blocks @ ways.to(score.dtype).t()).argmax(1)
    return ways[best_].view(rows // 4, columns // 4, 4, 4).transpose(1, 2).reshape(rows, columns)


def both_ways(device: torch.device | None = None) -> Tensor:
    """bool [90, 16]: the blocks of 4 x 4 with two of every row and two of every column."""
    pairs = [[i in two for i in range(4)] for two in itertools.combinations(range(4), 2)]
    ways = [
        four
        for four in itertools.product(pairs, repeat=4)
        if all(sum(column) == 2 for column in zip(*four, strict=True))
    ]
    return torch.tensor(ways, device=device).view(-1, 16)
