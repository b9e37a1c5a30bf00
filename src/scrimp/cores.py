# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Attention over a part of the pairs: what the techniques that choose the pairs share.

    seen = what the model lets a query see (causal, padding, documents)
    keep = select(q, k, seen), at least one pair a row
    y    = softmax(q k^T / sqrt(D) where keep, else -inf) v

The choice is a constant to the gradient. It is emulated: all scores are computed, and what is not kept is masked, so
that the numbers are those of hardware that skips the others, and the time and the memory are not.

Legend of shapes: B batch, T tokens, S tokens that are attended to, H heads, K key/value heads, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from scrimp.errors import UserError
from scrimp.models.layers import AttentionCore
from scrimp.models.masks import added
from scrimp.models.seams import matching

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import Batch, Loss


@dataclass
class CoreTrace:
    """What one call of a core computed, for who wants to know what hardware would do with it."""

    predictor: str
    """Name of the technique that chose."""
    mask: Tensor
    """The pairs that were computed, bool [B, H, T, S]."""
    seen: Tensor
    """The pairs that the model lets be seen, bool and broadcasting to `mask`."""
    details: dict[str, Any] = field(default_factory=dict[str, Any])
    """What the technique says of its own work."""


class SparseCore(nn.Module):
    """Attention over the pairs that `select` keeps. Shapes: as `AttentionCore`.

    Args:
        name: of the technique.
        select: (q, k with H heads, seen) -> the pairs to keep, bool [B or 1, H, T, S]; None keeps all.
        when: "always", or "evaluation": all pairs in training.
        before: (q, k, v) -> those that are used, in every call.
        watch: (q, k with H heads, seen without rows of padding); sees each call of training, whatever `when` says.
        details: mask -> what a trace says beside it.

    Attributes:
        itself: whether queries and keys are of the same tokens, so that padding of the ones is that of the others.
        tracing: whether calls without gradients leave a `trace`.
        kept: pairs that the last call of training kept and those that it saw, [2].
        due: losses that a training call leaves for the technique's `loss`.
    """

    def __init__(
        self,
        name: str,
        select: nn.Module | None = None,
        when: str = "always",
        before: nn.Module | None = None,
        watch: Callable[[Tensor, Tensor, Tensor], Tensor | None] | None = None,
        details: Callable[[Tensor], dict[str, Any]] = lambda mask: {},
    ) -> None:
        super().__init__()
        self.name, self.when = name, when
        self.select, self.before = select, before
        self.watch, self.details = watch, details
        self.itself = True
        self.tracing = False
        self.trace: CoreTrace | None = None
        self.kept: Tensor | None = None
        self.due: list[Tensor] = []

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None = None) -> Tensor:
        learns = self.training and torch.is_grad_enabled()
        if self.before is not None:
            q, k, v, *rest = self.before(q, k, v)
            if learns and not in_backward():
                self.due += rest
        chooses = self.select is not None and not (self.training and self.when == "evaluation")
        watch = self.watch if learns else None
        if not chooses and watch is None and not self.tracing:
            return attended(q, k, v, causal, mask)
        seen, keys = visible(q, k, causal, mask), spread(k, q.shape[1])
        if watch is not None:
            loss = watch(q.detach(), keys.detach(), real(seen) if self.itself and mask is not None else seen)
            self.due += [] if loss is None or in_backward() else [loss]
        keep = seen
        if chooses:
            assert self.select is not None
            keep = nonempty(self.select(q.detach(), keys.detach(), seen) & seen, seen)
            del keys
            if learns:
                self.kept = torch.stack([keep.sum() * (len(q) // len(keep)), whole(seen, q, k).sum()])
        if self.tracing and not learns:
            every = whole(keep, q, k)
            self.trace = CoreTrace(self.name, every, seen, self.details(every))
        return attended_some(q, k, v, keep, mask) if chooses else attended(q, k, v, causal, mask)


def attended(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
    """What a core gives that no technique has changed."""
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=k.shape[1] != q.shape[1])


def attended_some(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, mask: Tensor | None) -> Tensor:
    """Attention over the pairs that are kept, [B or 1, H, T, S]; a mask's own values are added to their scores."""
    kind = q.device.type
    if torch.is_autocast_enabled(kind) and q.dtype != torch.float64:
        q, k, v = (t.to(torch.get_autocast_dtype(kind)) for t in (q, k, v))
    with torch.autocast(kind, enabled=False):
        return Attended.apply(q, k, v, keep, None if mask is None or mask.dtype == torch.bool else mask)  # type: ignore


class Attended(Function):
    """q [B, H, T, D], k and v [B, K, S, D], keep -> [B, H, T, D].

    What is kept for the backward pass is the choice, a byte a pair, where torch's kernels keep numbers, zero and minus
    infinity. The weights are computed a second time.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, keep: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, k, v, keep, mask)
        bias = added(keep, q) if mask is None else torch.where(keep, mask, float("-inf"))
        return F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype), enable_gqa=k.shape[1] != q.shape[1])

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, keep, mask = ctx.saved_tensors
        heads, scale = (k.shape[1], q.shape[1] // k.shape[1]), q.shape[-1] ** -0.5
        many, g = (wide(t).unflatten(1, heads) for t in (q, grad[0]))  # [B, K, G, T, D]
        keys, values = (wide(t)[:, :, None] for t in (k, v))  # [B, K, 1, S, D]
        scores = ((many @ keys.transpose(-1, -2)) * scale).flatten(1, 2)
        scores = (scores if mask is None else scores + mask).masked_fill(~keep, float("-inf"))
        weights = scores.softmax(-1).unflatten(1, heads)
        back = g @ values.transpose(-1, -2)
        ds = weights * (back - (weights * back).sum(-1, keepdim=True)) * scale
        dv, dk = ((t.transpose(-1, -2) @ x).sum(2) for t, x in ((weights, g), (ds, many)))
        return (ds @ keys).flatten(1, 2).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def in_backward() -> bool:
    """Whether autograd runs now: what is computed is computed for the second time."""
    return torch._C._current_graph_task_id() != -1  # pyright: ignore[reportPrivateUsage]


def visible(q: Tensor, k: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
    """Which keys a query may see, bool, broadcasting to [B, H, T, S]."""
    square = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    if causal:
        square = square.tril()
    if mask is None:
        return square[None, None]
    allowed = mask if mask.dtype == torch.bool else mask > float("-inf")
    return allowed & square if causal else allowed.expand(*allowed.shape[:2], *square.shape)


def real(seen: Tensor) -> Tensor:
    """What is seen [.., T, S] without the rows of padding: of queries that do not see their own token."""
    own = seen.diagonal(seen.shape[-1] - seen.shape[-2], -2, -1)
    return seen & own[..., None]


def whole(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """A mask that broadcasts, as a view [B, H, T, S]."""
    return mask.expand(*q.shape[:3], k.shape[2])


def spread(k: Tensor, heads: int) -> Tensor:
    """Keys of grouped heads [B, K, S, D], one for each head of queries [B, H, S, D]."""
    return k if k.shape[1] == heads else k.repeat_interleave(heads // k.shape[1], 1)


def wide(x: Tensor) -> Tensor:
    """In at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def nonempty(keep: Tensor, seen: Tensor) -> Tensor:
    """What is kept; all that is seen in rows of which nothing would be left."""
    return torch.where(keep.any(-1, keepdim=True), keep, seen)


def best(scores: Tensor, seen: Tensor, count: int = 1, each: Tensor | None = None) -> Tensor:
    """The highest scores of each row among the pairs seen: bool [B, H, T, S]; fewer in rows that see fewer.

    Args:
        count: how many, or the most of `each`, which has how many of each sample, [B or 1, 1, 1].
    """
    count = min(count, scores.shape[-1])
    top = scores.masked_fill(~seen, float("-inf")).topk(count, -1).indices
    take = torch.ones_like(top, dtype=torch.bool)
    if each is not None:
        take &= torch.arange(count, device=top.device) < each[..., None]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, top, take) & seen


def share_of(seen: Tensor, share: float) -> tuple[int, Tensor]:
    """A share of the keys, rounded up, at least one: the most of any sample, and that of each, [B or 1, 1, 1].

    A sample's keys are those that its widest row sees: the same, however long others in the batch are.
    """
    table = [max(1, math.ceil(share * count)) for count in range(seen.shape[-1] + 1)]
    widest = seen.sum(-1).amax(-1, keepdim=True)
    return table[-1], torch.tensor(table, device=seen.device)[widest]


def replace_cores(model: nn.Module, pattern: str, where: str, make: Callable[[str, Any], nn.Module]) -> dict[str, Any]:
    """Give the attentions that a pattern matches another core; returns the new ones by path of the attention.

    Args:
        make: (path of the attention, the attention) -> its core.
    Raises:
        UserError: if the pattern matches none, or a core has been replaced already.
    """
    found = {n: m for n, m in model.named_modules() if isinstance(getattr(m, "core", None), nn.Module)}
    made: dict[str, Any] = {}
    for name in matching(pattern, list(found), "attention", where):
        attention: Any = found[name]
        if type(attention.core) is not AttentionCore:
            fix = "Give the two techniques disjoint patterns."
            raise UserError(f"`{name}` has another attention core already.", where, fix)
        made[name] = attention.core = make(name, attention)
    return made


def choosing(technique: Any, model: nn.Module, run: Run, make: Callable[[str, Any], nn.Module]) -> dict[str, Any]:
    """As `replace_cores`, of a technique's `targets`; logs what share of the pairs seen each training step keeps."""
    cores = replace_cores(model, technique.targets, run.where(technique, "targets"), make)
    for path, core in cores.items():
        core.itself = hasattr(model.get_submodule(path), "qkv")

    def tell(module: nn.Module, args: Any, out: Any) -> None:
        counts = [core.kept for core in cores.values() if core.kept is not None]
        if counts and module.training and torch.is_grad_enabled():
            kept, seen = torch.stack(counts).sum(0).double().unbind()
            run.log(technique, kept=run.read(kept / seen, worst=1.0))

    model.register_forward_hook(tell)
    return cores


def collected(cores: dict[str, SparseCore]) -> Tensor | None:
    """The sum over cores of the losses that they are due, each the mean of its calls; they are due no more."""
    means = [torch.stack(core.due).mean() for core in cores.values() if core.due]
    for core in cores.values():
        core.due.clear()
    return torch.stack(means).sum() if means else None


def with_due(loss: Loss, cores: dict[str, SparseCore], factor: float, run: Run) -> Loss:
    """A loss with what cores are due, times a factor."""

    def joint(model: nn.Module, batch: Batch) -> Tensor:
        collected(cores)
        total, due = loss(model, batch), collected(cores)
        # The loss is a sum over what is counted, and divided by the count later.
        return total if due is None else total + factor * due * run.task.count(batch)

    return joint


def sparse_cores(model: nn.Module, name: str) -> dict[str, SparseCore]:
    """The cores that a technique has put into a model, by path."""
    return {path: m for path, m in model.named_modules() if isinstance(m, SparseCore) and m.name == name}


def without(named: dict[str, Tensor], model: nn.Module, name: str) -> dict[str, Tensor]:
    """Named tensors without those of a technique's cores."""
    paths = tuple(f"{path}." for path in sparse_cores(model, name))
    return {n: t for n, t in named.items() if not n.startswith(paths)}


@contextmanager
def traced(model: nn.Module) -> Generator[dict[str, Any]]:
    """Cores leave a `trace` of each call without gradients, which stays; gives the cores by path."""
    cores: dict[str, Any] = {n: m for n, m in model.named_modules() if hasattr(m, "tracing")}
    for core in cores.values():
        core.tracing = True
    try:
        yield cores
    finally:
        for core in cores.values():
            core.tracing = False
