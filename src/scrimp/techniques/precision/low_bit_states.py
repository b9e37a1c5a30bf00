"""Optimizer states in 8 or 4 bits, in blocks with a scale each.

    x' = scale book[q],   scale = max |x| of a block,   q: the nearest entry of a codebook of 2^bits values
    bytes a state:  1 + 4 / 256 at 8 bits,  1 / 2 + 4 / 128 at 4 bits,  against 4 in float32

The states of one parameter at a time are decoded, the update rule takes its own step on it, and they are encoded again,
so that any rule works. Moments that have a sign use a book whose decades each have twice as many entries as the one
below; second moments use the same without a sign at 8 bits, and a linear one without zero at 4 bits, since nothing that
was positive may be divided by as zero. Papers: Dettmers et al., "8-bit Optimizers via Block-wise Quantization",
ICLR 2022, arXiv 2110.02861; 4 bits: Li et al., "Memory Efficient Optimizers with 4-bit States", NeurIPS 2023,
arXiv 2309.01507 (whose second moments share scales of rows and columns; here they are of blocks).

Saves: 3/4 of the bytes of states in float32, 7/8 at 4 bits. Costs: a pass of encoding and decoding over each state, and
each parameter updated by itself. Not for: small tensors, which stay as they are; models whose memory is taken by
activations. While a step runs, the states of the largest parameter are whole. When a stage ends, all are, until the
next stage's first step: growth and pruning reshape numbers, not codes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from scrimp.groups import Group, Several, parts
from scrimp.numerics.codebooks import Book, decode, encode
from scrimp.technique import Card, Technique, at_least

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from scrimp.run import Run
    from scrimp.technique import State

CODES: Final = ".codes"
SCALES: Final = ".scales"
"""Follow a moment's name."""


@dataclass(frozen=True, kw_only=True)
class LowBitStates(Technique):
    """Optimizer states in 8 or 4 bits, in blocks with a scale each."""

    card = Card(
        paper="arXiv:2110.02861",
        section="Quantized training",
        saves="3/4 of the optimizer's states at 8 bits, 7/8 at 4 bits",
        costs="passes over the states, and each parameter updated by itself",
        sets=("storage of optimizer states",),
        phase={"optimizer": "states", "carry": "decoded"},
        refuses={"place of optimizer states": "it moves states whole, and these are codes between steps."},
        whole="blocks of a part are not those of the whole, so that numbers would depend on the mesh.",
        example={"smallest": 64},
        neutral={"smallest": 1_000_000_000},
        remedies=({"bits": 8}, {"bits": 4}),
    )
    bits: Literal[8, 4] = 8
    """Of each number."""
    smallest: int = 4096
    """Tensors with fewer numbers keep their states whole."""

    def __post_init__(self) -> None:
        at_least(1, self, "smallest")

    def optimizer(self, make: Callable[[list[Group]], Optimizer], run: Run) -> Callable[[list[Group]], Optimizer]:
        """The same rules, one parameter at a time."""
        return lambda groups: Coded(make(groups), self.bits, self.smallest)

    def carry(self, state: State, run: Run) -> State:
        """Into another stage go numbers. Within one, as on resuming, codes stay codes."""
        if run.clock.position != run.clock.begun:
            return state
        kinds = {kind: tensors for kind, tensors in state.items() if not kind.endswith((CODES, SCALES))}
        for kind in [k.removesuffix(CODES) for k in state if k.endswith(CODES)]:
            scales, book = state[kind + SCALES], book_of(kind, self.bits)
            whole = {name: decode(codes, scales[name], self.bits, book, state["model"][name])
                     for name, codes in state[kind + CODES].items()}  # fmt: skip
            kinds[kind] = {**kinds.get(kind, {}), **whole}
        return kinds


class Coded(Several):
    """Update rules whose moments are codes between steps.

    The state of a parameter has, in place of a moment of its shape, `<moment>.codes` and `<moment>.scales`.

    Args:
        rule: the rules.
        bits: 8 or 4.
        smallest: parameters with fewer numbers are left alone.
    """

    def __init__(self, rule: Optimizer, bits: int, smallest: int) -> None:
        super().__init__(parts(rule))
        self.bits, self.smallest = bits, smallest

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step each rule on one parameter after another."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for rule in self.parts:
            groups = rule.param_groups
            try:
                for group in groups:
                    for p in group["params"]:
                        rule.param_groups = [{**group, "params": [p]}]
                        with self.whole(p):
                            rule.step()
            finally:
                rule.param_groups = groups
        return loss

    @contextmanager
    def whole(self, p: Tensor) -> Generator[None]:
        """Inside, the states of a parameter are numbers."""
        rule = next((r for r in self.parts if p in r.state), None)
        if rule is not None:
            self._decode(rule.state[p], p)
        yield
        for part in self.parts:
            if p in part.state:
                self._encode(part.state[p], p)

    def _decode(self, state: dict[str, Any], p: Tensor) -> None:
        for moment in [key.removesuffix(CODES) for key in state if key.endswith(CODES)]:
            codes, scales = state.pop(moment + CODES), state.pop(moment + SCALES)
            state[moment] = decode(codes, scales, self.bits, book_of(moment, self.bits), p)

    def _encode(self, state: dict[str, Any], p: Tensor) -> None:
        for moment, value in list(state.items()):
            if value.shape == p.shape and p.numel() >= self.smallest and not is_traceable_wrapper_subclass(p):
                del state[moment]
                state[moment + CODES], state[moment + SCALES] = encode(value, self.bits, book_of(moment, self.bits))


def book_of(moment: str, bits: int) -> Book:
    """The codebook of a moment: squares have no sign."""
    if not moment.endswith("_sq"):
        return "dynamic"
    return "positive" if bits == 8 else "linear"
