"""A model that runs in several depths: which there are, which blocks each runs, which one is worth its time.

    loss = a2 time^a1                    fitted to all candidates, in logarithms, by least squares
    choice = argmin loss time^(-a1)      the candidate farthest below that curve

Everything but `marked` and `elastic` is a function of numbers and names.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from scrimp.draws import generator
from scrimp.errors import UserError
from scrimp.growth import added, block_names, deepened, empty_outputs, lists_of_blocks, origins
from scrimp.meter import flops_per_token
from scrimp.models.seams import wrap_forward

if TYPE_CHECKING:
    from scrimp.technique import State

WIDEST: Final = 3
"""Depths, and lengths, that a search compares at most."""

Choice = tuple[int, int]
"""(depth, length); a length of 0 where there are no sequences."""


def grid(start: float, count: int, full: int, multiple: int = 1) -> list[int]:
    """`count` sizes from a share of the full one to all of it, evenly, rounded up to a multiple; equal ones once."""
    shares = [start + (1 - start) * n / (count - 1) for n in range(count)] if count > 1 else [1.0]
    return sorted({min(full, -(-max(1, round(share * full)) // multiple) * multiple) for share in shares})


def candidates(depths: Sequence[int], lengths: Sequence[int], before: Choice | None) -> list[Choice]:
    """What is compared: the next few depths and lengths that are no less than before. The last one is the largest."""
    least = before or (0, 0)
    deep = [d for d in depths if d >= least[0]][:WIDEST]
    return [(d, n) for d in deep for n in [n for n in lengths if n >= least[1]][:WIDEST]]


def turn(count: int, seed: int, begun: int, step: int) -> int:
    """Which of `count` candidates a step of a search trains.

    Each round visits all, the last one first, so that a plan of the first step is one of the largest.
    """
    place = (step - begun) % count
    rest = list(range(count - 1))
    name = f"search.{begun}.{(step - begun) // count}"
    random.Random(generator(seed, name).initial_seed()).shuffle(rest)
    return [count - 1, *rest][place]


def slope(losses: Sequence[float], times: Sequence[float]) -> float:
    """a1 of loss = a2 time^a1; nan where the times do not differ or a loss is not positive."""
    if len(losses) < 2 or min(losses) <= 0 or min(times) <= 0:
        return math.nan
    x, y = [math.log(t) for t in times], [math.log(value) for value in losses]
    mean, level = sum(x) / len(x), sum(y) / len(y)
    spread = sum((v - mean) ** 2 for v in x)
    return sum((v - mean) * (u - level) for v, u in zip(x, y, strict=True)) / spread if spread > 1e-12 else math.nan


def choose(losses: Sequence[float], times: Sequence[float]) -> tuple[int, float]:
    """(the best of some candidates, w): that with the least loss time^w, of equals the fastest.

    w = -a1 of the fit. It is 0, hence the least loss chosen, where the fit says nothing: with two candidates or fewer
    (a line through two points calls them equal), and where more time does not lower the loss.
    """
    a1 = slope(losses, times) if len(losses) > 2 else math.nan
    w = -a1 if a1 < 0 else 0.0
    best = min(range(len(losses)), key=lambda i: (losses[i] * times[i] ** w, times[i]))
    return best, w


def active(small: int, whole: int, depth: int, order: str) -> list[int]:
    """Which blocks of a supernet run at a depth: the small model's own, and as many of the others as it takes, evenly.

    With `stack` these are the first ones.
    """
    more, wanted = added(small, whole, order), depth - small
    spread = more[:wanted] if order == "stack" else [more[n * len(more) // wanted] for n in range(wanted)]
    return sorted({*range(whole)} - {*more} | {*spread})


def flops(model: nn.Module, layers: Sequence[nn.Module], depth: int, length: int) -> float:
    """FLOPs of training on one sequence with some of the blocks. Of images, as if each were one token."""
    tokens = max(length, 1)
    whole = flops_per_token(model, tokens)
    block = sum(p.numel() for p in layers[0].parameters() if p.ndim >= 2)
    outer = sum(p.numel() for layer in layers for p in layer.parameters() if p.ndim >= 2)
    attention = (whole - flops_per_token(model, 0)) / len(layers)
    rest = flops_per_token(model, 0) - 6 * outer
    return tokens * (rest + depth * (6 * block + attention))


def mark(model: nn.Module, where: str) -> tuple[str, int]:
    """Mark the list that the blocks are in, so that it is found again once it is cut to a few: its path and length.

    Raises:
        UserError: if there are several lists, or blocks that are not numbered.
    """
    lists = lists_of_blocks(model, "*", where)
    if len(lists) > 1:
        raise UserError("the model has several lists of blocks.", where, "Use a model with one, such as a decoder.")
    [(path, depth)] = lists.items()
    model.get_submodule(path).whole_depth = depth  # type: ignore[assignment]
    return path, depth


def marked(model: nn.Module) -> tuple[str, Sequence[nn.Module], int]:
    """The marked list: its path, the blocks that are in it, and how many it had."""
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and hasattr(module, "whole_depth"):
            return path, list(module), module.whole_depth  # type: ignore[return-value]
    raise AssertionError("no list of blocks is marked")


def elastic(layers: Sequence[nn.Module], running: Callable[[], frozenset[int]]) -> None:
    """Let a training step skip the blocks that it does not run; others run them all."""

    def around(forward: Callable[..., object], block: nn.Module, number: int) -> Callable[..., object]:
        def either(x: Any, *args: Any, **kwargs: Any) -> object:
            return x if block.training and number not in running() else forward(x, *args, **kwargs)

        return either

    for i, block in enumerate(layers):
        wrap_forward(block, lambda forward, block=block, i=i: around(forward, block, i))


def depth_of(names: Mapping[str, Tensor], path: str) -> int:
    """How many blocks of a list some names belong to."""
    return len({match[1] for name in names if (match := block_names(path).match(name))})


def in_copies(tensors: Mapping[str, Tensor], path: str, copies: Sequence[int]) -> dict[str, str]:
    """Names of what is in some blocks -> the rest of the name within the block."""
    found = block_names(path)
    return {name: m[2] for name in tensors if (m := found.match(name)) and int(m[1]) in copies}


@torch.no_grad()
def follow(averages: Mapping[str, Tensor], weights: Mapping[str, Tensor], decay: float) -> None:
    """a <- d a + (1 - d) w."""
    for name, average in averages.items():
        average.lerp_(weights[name].detach().to(average.dtype), 1 - decay)


def grown(state: State, path: str, old: int, new: int, how: Growth) -> State:
    """A state with copies of blocks: of their moving averages where there are any.

    Weights that are zero stay zero: averages remember what was pruned.
    """
    if old >= new:
        return state
    origin, copies = origins(old, new, how.order), added(old, new, how.order)
    made = {kind: deepened(tensors, path, origin) for kind, tensors in state.items()}
    averages = made.get(how.averages, {})
    for kind, tensors in made.items():
        moments = kind.startswith("optimizer.")
        for name, rest in in_copies(tensors, path, copies).items():
            if kind == "model" and name in averages:
                tensors[name] = averages[name].to(tensors[name].dtype) * (tensors[name] != 0)
            if how.reset if moments else (how.zero and empty_outputs(rest, tensors[name])):
                tensors[name] = torch.zeros_like(tensors[name])
    return dict(made)


def now(device: torch.device) -> float:
    """The time, once the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclass(frozen=True)
class Stage:
    """What a stage trains."""

    searching: bool
    path: Sequence[Choice]
    """What the searches so far chose."""
    options: Sequence[Choice]
    """Candidates of a search, else what is trained; the last one is the largest."""
    done: int
    """How many of the choices were made when this stage began."""
    least: int
    """The least depth."""

    def small(self) -> int:
        """Depth of the smallest candidate: the supernet's other blocks are additions to it."""
        return self.path[-1][0] if self.path else self.least

    def ended(self) -> tuple[int, int]:
        """(what the search that ended last chose, the smallest candidate of that search), depths."""
        return self.path[self.done - 1][0], self.path[self.done - 2][0] if self.done > 1 else self.least


@dataclass(frozen=True)
class Growth:
    """How blocks are added to a state."""

    order: str
    averages: str
    """The kind of the state that holds moving averages of weights."""
    reset: bool
    """Whether copies begin with states of the optimizer that are zero."""
    zero: bool
    """Whether they begin as the identity."""
