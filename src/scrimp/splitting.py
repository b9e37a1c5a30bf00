# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""A batch in parts: shared by the techniques that compute it so, and by those that look at the parts' gradients.

With P parts whose gradients are g_i, and their mean g:

    variance of a part's gradient    v = P / (P - 1) (mean ||g_i||^2 - ||g||^2)
    square of the true gradient      m = ||g||^2 - v / P

Both are unbiased, so that a single value may be negative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from scrimp.errors import UserError
from scrimp.sharding import cut_of
from scrimp.world import SAMPLES

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import Backward, Batch


def split(batch: Batch, parts: int) -> list[Batch]:
    """A batch in parts along its first dimension, as even as possible; never an empty one."""
    size = len(next(iter(batch.values())))
    pieces = {name: value.tensor_split(min(parts, size)) for name, value in batch.items()}
    return [{name: piece[i] for name, piece in pieces.items()} for i in range(min(parts, size))]


def accumulated(backward: Backward, pieces: Sequence[Batch], count: Tensor, run: Run) -> Tensor:
    """The backward over every part, with the count of the whole batch. Returns the whole batch's loss."""
    loss: Tensor | None = None
    for i, piece in enumerate(pieces):
        run.more_parts = i + 1 < len(pieces)
        part = backward(piece, count)
        loss = part if loss is None else loss + part
    assert loss is not None
    return loss


def check_parts(parts: int, batch: int, where: str, even: bool = False) -> None:
    """Whether a batch can be split.

    Args:
        even: whether all parts must have as many samples.
    Raises:
        UserError: if it has too few samples, or does not divide.
    """
    if parts > batch:
        what = f"a batch of {batch} cannot be split into {parts} parts."
        raise UserError(what, where, "Raise `batch`, or lower `parts`.")
    if even and batch % parts:
        what = f"a batch of {batch} does not divide into {parts} parts of the same size, which are compared."
        raise UserError(what, where, "Choose a `parts` that divides `batch`.")


def own_parts(parts: int, run: Run, where: str) -> int:
    """How many of the parts of a batch fall to this rank.

    Raises:
        UserError: if the batch cannot be split so, or the parts cannot be shared evenly.
    """
    check_parts(parts, run.recipe.batch, where, even=True)
    ranks = run.world.ranks(*SAMPLES)
    if parts % ranks:
        fix = f"Choose a multiple of {ranks}."
        raise UserError(f"{parts} parts of a batch cannot be shared by {ranks} ranks.", where, fix)
    return parts // ranks


def compared(
    backward: Backward, pieces: Sequence[Batch], count: Tensor, weights: Sequence[nn.Parameter], run: Run
) -> tuple[Tensor, Tensor, Tensor]:
    """As `accumulated`, bitwise, and what the gradients of the parts tell, with those of other ranks.

    They are measured on their way into `.grad`, so that no copy of them is needed. A part's gradient counts as P times
    what it adds to the whole one: parts with more targets weigh more.

    Returns:
        the loss, the variance v of a part's gradient, and the square m of the true one; float64.
    """
    ranks = run.world.ranks(*SAMPLES)
    parts = len(pieces) * ranks
    cut = next((c for p in weights if (c := cut_of(p)) is not None), None)
    # Of weights that this rank has whole, and of its parts of others.
    total = torch.zeros(2, dtype=torch.float64, device=weights[0].device)

    def watched(p: nn.Parameter) -> Callable[[Tensor], None]:
        own = total[int(cut_of(p) is not None)]

        def arrived(grad: Tensor) -> None:
            own.add_(square(grad))

        return arrived

    hooks = [p.register_hook(watched(p)) for p in weights]
    try:
        loss = accumulated(backward, pieces, count, run)
    finally:
        for hook in hooks:
            hook.remove()
    # What arrives is a rank's own, times the ranks (`replicas.summed`); what is left in `.grad` is the sum of all.
    total = run.world.total(total) / ranks**2
    whole = torch.zeros_like(total)
    for p in weights:
        if p.grad is not None:
            whole[int(cut_of(p) is not None)] += square(p.grad)
    each, mean = (s[0] + (s[1] if cut is None else cut.sum(s[1])) for s in (total, whole))
    variance = parts / (parts - 1) * (parts * each - mean)
    return loss, variance, mean - variance / parts


@torch.no_grad()
def square(x: Tensor) -> Tensor:
    """||x||^2 in float64; the norm itself in at least float32."""
    return torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)).double().square()


def smooth(average: Tensor, value: Tensor, keep: float) -> Tensor:
    """keep average + (1 - keep) value, in a new tensor; a value that is not finite leaves the average as it is."""
    return torch.where(value.isfinite(), keep * average + (1 - keep) * value, average)
