# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false
"""Layer to layer: weights and gradients on disk, one block of the model in memory at a time.

    forward:   for block in blocks:            for part of the batch: x <- block(x), keeping x only
    backward:  for block in reversed blocks:   for part of the batch: run it again, then its gradient

Blocks are the outer loop and parts of a batch the inner one, so that each block comes into memory once a pass, for all
parts. While a block computes, its neighbor is read. Weights keep their names and their meaning; their memory is a file.

Paper: Pudipeddi et al., "Training Large Neural Networks with Constant Memory using a New Execution Algorithm", arXiv
2002.05645, which keeps them in the memory of the host; ZeRO-Infinity (arXiv 2104.07857) keeps them on disk.

Saves: weights and gradients: memory hardly depends on depth; with offload_states, optimizer states as well.
Costs: each weight is read twice a step and written once, each gradient written and read; a second forward pass.
Not for: models that fit; a folder in memory (tmpfs); rules that keep their states in memory, unless that suffices.

`eager` updates each block as soon as its gradient is there, which then never goes to disk. What needs all gradients
first (clip, accumulate, sam) does not go with it. Results are bitwise those of a run in memory; with `parts`, those of
accumulate up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from scrimp.disk import Extent, Imagined, Scratch, extent_of, fetch, scratch, settle
from scrimp.errors import UserError
from scrimp.models.seams import blocks, wrap_forward
from scrimp.technique import Card, Cost, Technique, at_least, overrides

if TYPE_CHECKING:
    from scrimp.run import Run


@dataclass(frozen=True, kw_only=True)
class LayerToLayer(Technique):
    """Weights and gradients on disk, one block of the model in memory at a time."""

    card = Card(
        paper="arXiv:2002.05645",
        section="Offloading",
        claim="45 % less memory and 40 % more throughput than the state of the art (abstract of 2002.05645)",
        saves="weights and gradients, but those of two blocks",
        costs="disk traffic: weights twice a step, gradients once; a second forward pass",
        sets=("recomputation", "place of weights"),
        refuses={"sharding": "Shards of weights are not offloaded.", "compilation": "Compiled code keeps its weights."},
        micro_batches=True,
        phase={"wrap": "recompute"},
        example={"parts": 2},
        remedies=({},),
        neutral={"parts": 1},
    )
    parts: int = 1
    """Parts of a batch that go through a block one after the other."""
    eager: bool = False
    """Update each block as soon as its gradient is there, instead of writing gradients to disk."""
    folder: str = ""
    """Where the file shall be; empty means where the run's folder is. A fast local disk."""

    def __post_init__(self) -> None:
        at_least(1, self, "parts")

    def wrap(self, model: nn.Module, run: Run) -> nn.Module:
        """Memory of weights is a file, and blocks come and go."""
        if run.task is None:
            what = "updates and saves by the trainer's hand, which your own loop does not have."
            raise UserError(f"`{self.name}` {what}", run.where(self), "Use scrimp.train.")
        if run.device.type != "cpu":
            raise UserError("weights on disk are computed with on a CPU only.", run.where(self), "Set `device: cpu`.")
        found = list(blocks(model, run.where(self)).values())
        if self.parts > 1 and any(type(block).__module__.partition(".")[0] != "scrimp" for block in found):
            what = f"{type(found[0]).__name__} does not say which of its inputs have a row for each sample."
            raise UserError(what, run.where(self, "parts"), "Set it to 1, and use accumulate.")
        real = detect_fake_mode() is None
        file = scratch(self, self.folder, run) if real else None
        to_disk(model, file)
        for i, block in enumerate(found):
            before, after = found[i - 1 : i] if i else [], found[i + 1 : i + 2]
            wrap_forward(block, partial(self._streamed, block=block, before=before, after=after))
        if self.eager:
            self._check_eager(run)
            update_early(found, run)
        else:
            for p in model.parameters():
                if p.requires_grad:
                    p.register_post_accumulate_grad_hook(partial(to_file, extent=room(file, p)))
        return model

    def price(self, cost: Cost, run: Run) -> Cost:
        """The weights of two neighbors, which a count of tensors in memory leaves out."""
        held = max(sum(p.nbytes for p in block.parameters()) for block in blocks(run.model).values())
        inside = {id(p) for block in blocks(run.model).values() for p in block.parameters()}
        outer = sum(p.nbytes for p in run.model.parameters() if id(p) not in inside)
        return replace(cost, bytes=cost.bytes + 2 * held + outer)

    def _check_eager(self, run: Run) -> None:
        for other in run.order.techniques:
            late = overrides(other, "step") and other.card.phase.get("step") != "averaged"
            if late or overrides(other, "backward"):
                what = f"an eager update leaves `{other.name}` no gradients to work on."
                raise UserError(what, run.where(self, "eager"), "Set it to false, or drop the other.")

    def _streamed(
        self, forward: Callable[..., Any], block: nn.Module, before: list[nn.Module], after: list[nn.Module]
    ) -> Callable[..., Any]:
        """A block's forward, part by part, with its weights brought in before and let go after."""

        def computed(*args: Any, **kwargs: Any) -> Any:
            if in_backward():
                # The neighbor behind is done with, the one in front is next.
                arrive(block, *before)
                leave(*after)
            return forward(*args, **kwargs)

        def streamed(*args: Any, **kwargs: Any) -> Any:
            arrive(block, *after)
            if torch.is_grad_enabled():
                shares = divided((args, kwargs), self.parts)
                rows = [checkpoint(computed, *a, use_reentrant=False, preserve_rng_state=False, **k) for a, k in shares]
                y: Any = rows[0] if len(rows) == 1 else torch.cat(rows)
            else:
                y = forward(*args, **kwargs)
            leave(block)
            return y

        return streamed


def to_disk(model: nn.Module, file: Scratch | None) -> None:
    """Give every parameter memory in a file. Shared parameters stay shared."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if id(p) not in made:
                made[id(p)] = nn.Parameter(room(file, p).mapped(), p.requires_grad)
            module.register_parameter(name, made[id(p)])


def room(file: Scratch | None, p: Tensor) -> Extent | Imagined:
    """Room for a tensor like another."""
    return Imagined(p.shape, p.dtype) if file is None else file.extent(p.shape, p.dtype)


@torch.no_grad()
def to_file(p: Tensor, extent: Extent | Imagined) -> None:
    """Move a gradient from memory to disk; one that is there was added to in place."""
    assert p.grad is not None
    if extent_of(p.grad) is not extent:
        place = extent.mapped()
        place.copy_(p.grad)
        p.grad = place
    extent.settle()


def update_early(found: list[nn.Module], run: Run) -> None:
    """Update each block when its last gradient arrives.

    The first block's is the last to come: it is left to the trainer's own update, as are weights outside of blocks.
    """
    seen: set[int] = set()
    groups = [[p for p in block.parameters() if p.requires_grad] for block in found]
    for own in [group for group in groups if group][1:]:
        mine = [p for p in own if id(p) not in seen]
        seen |= {id(p) for p in mine}

        def arrived(p: Tensor, mine: list[nn.Parameter] = mine) -> None:
            if any(q.grad is None for q in mine):
                return
            assert run.optimizer is not None
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)
            for q in mine:
                settle(q)

        for p in mine:
            p.register_post_accumulate_grad_hook(arrived)


def divided(arguments: Any, parts: int) -> list[Any]:
    """A block's arguments for each part of a batch.

    Tensors with a row for each sample are split. Those of two dimensions have none: they are tables of angles.
    """
    tensors = [t for t in tree_leaves(arguments) if isinstance(t, Tensor)]
    size = len(tensors[0])
    count = min(parts, size)
    if count == 1:
        return [arguments]

    def share(t: Tensor, i: int) -> Tensor:
        return t.tensor_split(count)[i] if t.ndim != 2 and t.ndim and len(t) == size else t

    return [tree_map_only(Tensor, partial(share, i=i), arguments) for i in range(count)]


def in_backward() -> bool:
    """Whether autograd runs now: a block is then computed for the second time."""
    return torch._C._current_graph_task_id() != -1


def arrive(*near: nn.Module) -> None:
    """Begin to read blocks."""
    for block in near:
        for p in block.parameters():
            fetch(p)


def leave(*near: nn.Module) -> None:
    """Free the memory of blocks."""
    for block in near:
        for p in block.parameters():
            settle(p)
