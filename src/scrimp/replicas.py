# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Ranks that hold the same weights and see different parts of a batch: torch's DistributedDataParallel around a loss.

The wrapped module is the loss, not the model, so that the model keeps its names and every task its own way of calling
it. Each rank's loss is its part of the whole batch's sum over the whole batch's count, and gradients are summed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer

from scrimp.stopwatch import Stopwatch
from scrimp.world import PARTS, World

if TYPE_CHECKING:
    from scrimp.groups import Group
    from scrimp.run import Run
    from scrimp.technique import Backward, Batch


class Summed(nn.Module):
    """(batch, count) -> the loss of this rank's samples over the count of all ranks'."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.model, self.run = run.model, run

    def forward(self, batch: Batch, count: Tensor) -> Tensor:
        """The loss, a scalar."""
        assert self.run.loss is not None
        return self.run.loss(self.model, batch) / count


def summed(backward: Backward, run: Run, bucket: float) -> Backward:
    """A backward that leaves on every rank the gradient of the whole batch.

    Args:
        backward: what computes gradients where ranks hold stages of a pipeline: there the loss is not one pass that
            torch could watch, and sums follow when it is through.
        bucket: megabytes of gradients that are sent together, while those of earlier layers are computed.
    """
    if run.world.ranks("pipeline") > 1:
        return _followed(backward, run)
    from torch.nn.parallel import DistributedDataParallel

    if any(isinstance(p, FakeTensor) for p in run.model.parameters()):
        return _planned(run)
    with warnings.catch_warnings():
        # Its successor cannot be told to leave buffers alone, which are the same on all ranks by construction.
        warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
        reducer = DistributedDataParallel(
            Summed(run), process_group=_group(run), bucket_cap_mb=bucket, broadcast_buffers=False,
            init_sync=False, gradient_as_bucket_view=True, find_unused_parameters=True,
        )  # fmt: skip
    # Where ranks share tokens or layers as well, they wait for each other within the passes.
    stopwatch = run.stopwatch if run.world.ranks("context", "tensor") == 1 else Stopwatch()
    reducer.register_comm_hook((_group(run), stopwatch), _mean)
    ranks = run.world.ranks(*PARTS)

    def reduced(batch: Batch, count: Tensor) -> Tensor:
        stopwatch.resume()
        later = _later(run)
        with reducer.no_sync() if later else nullcontext():
            loss: Any = reducer(batch, count)
            # A mean over ranks leaves what parts of the batch have summed before as it is: all ranks have the same.
            (loss * ranks).backward()
        if later:
            stopwatch.pause()
        return loss.detach()

    return reduced


def _later(run: Run) -> bool:
    """Whether gradients wait for those of the batch's other parts, and are sent together with the last one's.

    Those of the first part are sent, since this puts them into buckets: others are added there, and need no memory.
    """
    return run.more_parts and any(p.grad is not None for p in run.model.parameters())


def _followed(backward: Backward, run: Run) -> Backward:
    """A backward whose gradients are summed over the ranks that see other parts of a batch once it is through."""
    group = _group(run)

    def backward_and_sum(batch: Batch, count: Tensor) -> Tensor:
        with apart(run.model):
            loss = backward(batch, count)
            _sum_gradients([p for p in run.model.parameters() if p.requires_grad], group)
        return loss

    return backward_and_sum


def _sum_gradients(weights: Sequence[nn.Parameter], group: Any) -> None:
    """Sum gradients over ranks that hold the same weights; what has none on any rank gets none."""
    if not weights:
        return
    moving = [p for p, some in zip(weights, _held_anywhere(weights, group), strict=True) if some]
    for p in moving:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    for grads in same_kind([p.grad for p in moving if p.grad is not None]):
        flat = torch.cat([grad.flatten() for grad in grads])
        torch.distributed.all_reduce(flat, group=group)
        for grad, piece in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(piece.view_as(grad))


def _held_anywhere(weights: Sequence[nn.Parameter], group: Any) -> list[bool]:
    """Which weights have a gradient on some rank; tensors without values say so for this one only."""
    mine = [p.grad is not None for p in weights]
    if isinstance(weights[0], FakeTensor):
        return mine
    held = torch.tensor(mine, device=weights[0].device).int()
    torch.distributed.all_reduce(held, torch.distributed.ReduceOp.MAX, group=group)
    return [bool(some) for some in held.tolist()]


@contextmanager
def apart(model: nn.Module) -> Generator[None]:
    """Gradients that are there already are added afterwards, so that what is sent inside is not sent twice."""
    before = {p: p.grad for p in model.parameters() if p.grad is not None}
    for p in before:
        p.grad = None
    yield
    for p, grad in before.items():
        p.grad = grad if p.grad is None else grad.add_(p.grad)


def same_kind(grads: Sequence[Tensor], most: int = 1 << 23) -> Iterator[list[Tensor]]:
    """Gradients of one type at a time, so many weights that few messages go and the copy stays small."""
    chunk: list[Tensor] = []
    for grad in grads:
        if chunk and (grad.dtype != chunk[0].dtype or sum(g.numel() for g in chunk) + grad.numel() > most):
            yield chunk
            chunk = []
        chunk.append(grad)
    if chunk:
        yield chunk


def _planned(run: Run) -> Backward:
    """The same for tensors without values, which torch's engine cannot take: buckets that stay, and what is sent."""
    held: list[Tensor] = [p for p in run.model.parameters() if p.requires_grad]
    buckets = {p: torch.empty_like(p) for p in held}

    def arrive(p: Tensor) -> None:
        assert p.grad is not None
        p.grad = buckets[p].copy_(p.grad)

    for p in held:
        p.register_post_accumulate_grad_hook(arrive)
    job, group = Summed(run), _group(run)

    def backward(batch: Batch, count: Tensor) -> Tensor:
        loss: Any = job(batch, count)
        later = _later(run)
        loss.backward()
        for bucket in () if later else buckets.values():
            torch.distributed.all_reduce(bucket, group=group)
        return loss.detach()

    return backward


def _mean(state, bucket):  # pyright: ignore
    """The mean of a bucket of gradients over the ranks, as torch's own: that one cannot be planned.

    Without annotations, which are texts here: torch compares them with its own class.
    """
    group, stopwatch = state
    stopwatch.pause()  # Behind its last bucket a rank has nothing to do but wait.
    buffer = bucket.buffer().div_(group.size())
    sent: Any = torch.distributed.all_reduce(buffer, group=group, async_op=True)

    def arrived(_: Any) -> Tensor:
        return buffer

    return sent.get_future().then(arrived)


def _group(run: Run) -> Any:
    """The ranks that see other parts of a batch with the same weights."""
    return run.world.group(*PARTS)


class Owned(Optimizer):
    """An update rule over the parameters that this rank owns; afterwards each owner sends its own to the others.

    Torch's ZeroRedundancyOptimizer does the same for a single rule; this one takes whatever `make` makes.

    Args:
        groups: all parameters. Large ones are given out first, each to the rank that has least.
        make: groups -> optimizer.
        world: the ranks; those of the axes `data` and `context` share the parameters.
    """

    def __init__(self, groups: Sequence[Group], make: Callable[[list[Group]], Optimizer], world: World) -> None:
        axes = ("data", "context")
        self.group, ranks, place = world.group(*axes), world.ranks(*axes), world.place(*axes)
        named = {name: p for group in groups for name, p in group.params.items()}
        held, self.owner = [0] * ranks, dict[str, int]()
        for name, p in sorted(named.items(), key=lambda item: (-item[1].numel(), item[0])):
            self.owner[name] = held.index(min(held))
            held[self.owner[name]] += p.numel()
        self.named = named
        mine = [replace(g, params={n: p for n, p in g.params.items() if self.owner[n] == place}) for g in groups]
        self.parts = [make(mine)]
        others = [p for name, p in named.items() if self.owner[name] != place]
        super().__init__(list(named.values()), {})
        rest = {"params": others, "lr": 0.0, "base_lr": 0.0, "weight_decay": 0.0}
        self.param_groups = [*self.parts[0].param_groups, *([rest] if others else [])]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step this rank's parameters, then send and receive."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.parts[0].step()
        sent = [torch.distributed.broadcast(p, group=self.group, group_src=self.owner[name], async_op=True)
                for name, p in self.named.items()]  # fmt: skip
        for job in sent:
            job.wait()  # pyright: ignore[reportOptionalMemberAccess]
        return loss
