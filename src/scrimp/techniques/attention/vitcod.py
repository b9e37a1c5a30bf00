"""Attention over fixed places that matter on average, with fewer heads of queries and keys to move.

    always        q' = D E q,  k' likewise      E [h', H] and D [H, h'] mix the heads of each number of each token
                  loss + reconstruct * sum over layers of the mean over samples of |q - q'| + |k - k'|
    to `until`    the softmax of all scores is averaged over the batches of training
    then          kept:  of each row of the average, the largest entries until their sum is `theta`; and the first
                         column with the first row, or with the diagonal where attention is causal
    reordered     columns that more than `dense` of the rows keep come first: a dense part, and a sparse rest

Here and not there: E and D have no biases, so that export folds them into the layer before; |q - q'| is a mean over the
samples, not that of a batch; averages are of the first part of training, with mixed heads. Hardware moves the h' mixed
heads, E q, and makes the H heads of them on the chip. A trace has their share (`ratio`), and, as a fixed mask is known
before anything is computed, the order of the columns (`order`, `dense`), which changes no number.

Paper: You et al., "ViTCoD: Vision Transformer Acceleration via Dedicated Algorithm and Accelerator Co-Design", HPCA
2023, arXiv 2210.09573, for vision Transformers, after training. Here it is one run in two stages, and goes for all
models whose tokens keep their places. What is exported attends to all of them.

Saves: on such hardware, scores outside of the mask, and traffic of queries and keys. Costs: here all of it is computed
in full; the average, [heads, tokens, tokens] numbers a layer until the masks are drawn. Not for: training time on any
CPU or GPU; packed documents, which begin anywhere; attention to another sequence, whose rows have no places while it is
written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from scrimp.clock import Duration
from scrimp.cores import SparseCore, choosing, in_backward, sparse_cores, wide, with_due, without
from scrimp.errors import UserError
from scrimp.technique import Card, Technique, at_least

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import Loss, State


@dataclass(frozen=True, kw_only=True)
class ViTCoD(Technique):
    """Attention over fixed places that matter on average."""

    card = Card(
        paper="arXiv:2210.09573",
        section="Hardware/algorithm co-design",
        claim="86.0x the speed of attention of a GPU with 90% of the pairs left out (arXiv 2210.09573)",
        saves="on its hardware, scores outside of a fixed mask, and traffic",
        costs="here, averages and masks of all pairs, and capacity",
        sets=("attention core",),
        scope="targets",
        needs=("core",),
        refuses={
            "frozen weights": "Its mixtures of heads train with the weights.",
            "length schedule": "Its masks are of places, which must stay what they are.",
            "shared blocks": "Its masks are those of one layer, and shared blocks are several.",
            "tokens of a layer": "Its masks are of places, and tokens that are left out move the others.",
            "tokens that are read": "Its masks are of places, and tokens that are left out move the others.",
            "width schedule": "Its masks and mixtures are of heads, which come and go.",
        },
        phase={"model": "seams", "carry": "measured", "loss": "auxiliary", "export": "whole"},
        emulated=("cpu", "cuda"),
        alone="attention is averaged over the samples of one rank.",
        example={"until": "4 step"},
        neutral={"theta": 1.0, "heads": 1.0},
    )
    targets: str = "attention|cross"
    """Pattern of the attentions whose core is replaced; those to another sequence keep all pairs."""
    theta: float = 0.58
    """Part of each row's average weight that is kept; 1 keeps all places."""
    until: str | float = 0.2
    """End of the averaging, when the masks are drawn."""
    heads: float = 0.5
    """Mixed heads, as a share of the heads; 1 mixes none."""
    reconstruct: float = 1.0
    """Factor of what mixing loses in the loss."""
    dense: float = 0.25
    """Share of the rows above which a column belongs to the dense part; it is told in traces only."""
    when: Literal["evaluation", "always"] = "always"
    """Whether training uses the masks as well."""

    def __post_init__(self) -> None:
        for name in ("theta", "heads", "dense"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"{name} must be above 0 and at most 1, not {getattr(self, name)}.")
        at_least(0, self, "reconstruct")
        if not Duration.parse(self.until, "until").value:
            raise UserError("until must be more than 0.")

    def stages(self) -> tuple[str | float, ...]:
        """When the masks are drawn."""
        return (self.until,) if self.theta < 1 else ()

    def decide(self, last: Run) -> dict[str, Any]:
        """That the masks are drawn, when this technique's stage is what ended."""
        key, clock = last.order.key(self), last.clock
        ended = self.theta < 1 and clock.position >= clock.at(self.until)
        return last.decisions.get(key) or ({"at": clock.position} if ended else {})

    def model(self, model: nn.Module, run: Run) -> nn.Module:
        """Replace the cores: they average at first, and have masks later."""
        if getattr(model, "drop", False):
            what = "hidden patches are left out of the encoder, so that the others have no fixed places."
            raise UserError(what, run.where(self), "Set `model.drop: false`, or drop it.")
        drawn = bool(run.decisions.get(run.order.key(self)))
        found = dict(model.named_modules())

        def make(path: str, attention: Any) -> SparseCore:
            if not hasattr(attention, "qkv"):
                return SparseCore(self.name, details=lambda mask: {"ratio": 1.0})
            if self.heads < 1 and attention.q_norm is not None:
                what = f"`{path}` has norms of queries and keys, behind which mixed heads cannot be folded."
                raise UserError(what, run.where(self, "heads"), "Set it to 1, or `model.qk_norm: false`.")
            watch, select, like, heads = None, None, attention.proj.weight, attention.heads
            if self.theta < 1:
                size = places(found, path, run.where(self))
                select = Fixed(heads, size, attention.causal, like) if drawn else None
                watch = None if drawn else Averages(heads, size, like)
            before = Mixed(self, attention, like) if self.heads < 1 else None
            ratio = {"ratio": math.ceil(self.heads * heads) / heads}
            return SparseCore(
                self.name, select, self.when, before, watch, lambda m: ratio | reordered(m[0], self.dense)
            )

        cores = choosing(self, model, run, make)
        self._say(found, cores, run)
        return model

    def _say(self, found: dict[str, Any], cores: dict[str, Any], run: Run) -> None:
        """What is left as it is."""
        whole = [path for path in cores if not hasattr(found[path], "qkv")]
        what = "rows of attention to another sequence have no places while they are written"
        if len(whole) == len(cores):
            raise UserError(f"{what}.", run.where(self, "targets"), "Take in an attention to the same sequence.")
        if whole:
            run.remarks.append(f"vitcod leaves `{whole[0]}` and its like as they are: {what}.")

    def carry(self, state: State, run: Run) -> State:
        """The last stage's averages become masks."""
        given = dict(state.get("model", {}))
        for path, core in sparse_cores(run.model, self.name).items():
            names = [f"{path}.watch.{leaf}" for leaf in ("average", "rows")]
            if isinstance(core.select, Fixed) and names[0] in given:
                average, rows = (given.pop(name) for name in names)
                given[f"{path}.select.mask"] = drawn_mask(average, rows, self.theta, core.select.causal)
        return {**state, "model": given} if "model" in state else state

    def loss(self, loss: Loss, run: Run) -> Loss:
        """What mixing loses."""
        return with_due(loss, sparse_cores(run.model, self.name), self.reconstruct, run)

    @torch.no_grad()
    def export(self, named: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        """Mixtures folded into the layers before."""
        plain = without(named, run.model, self.name)
        for path, core in sparse_cores(run.model, self.name).items():
            before = f"{path.removesuffix('.core')}.qkv"
            for name in (f"{before}.weight", f"{before}.bias") if isinstance(core.before, Mixed) else ():
                if name in plain:
                    plain[name] = core.before.folded(plain[name])  # type: ignore[union-attr, operator]
        return plain


def places(modules: dict[str, nn.Module], path: str, where: str) -> int:
    """How many tokens an attention may see: those that the model around it has positions for.

    Raises:
        UserError: if nothing around it says so.
    """
    while path:
        path = path.rpartition(".")[0]
        around: Any = modules[path]
        if isinstance(getattr(around, "patches", None), nn.Module):
            return len(around.positions.weight)
        if getattr(getattr(around, "config", None), "context", 0):
            return int(around.config.context)
    raise UserError("the model does not say how many tokens it sees.", where, "Use a model of the house.")


class Averages(nn.Module):
    """(q, k, seen); adds up the softmax of all scores.

    Attributes:
        average: sums over samples, [H, N, N] for N places.
        rows: how many samples had a row, [N].
    """

    average: Tensor
    rows: Tensor

    def __init__(self, heads: int, size: int, like: Tensor) -> None:
        super().__init__()
        self.register_buffer("average", like.new_empty(heads, size, size))
        self.register_buffer("rows", like.new_empty(size))

    def refill(self) -> None:
        """Nothing seen yet."""
        self.average.zero_()
        self.rows.zero_()

    @torch.no_grad()
    def forward(self, q: Tensor, k: Tensor, seen: Tensor) -> None:
        if in_backward():  # it has been counted
            return
        scores = (q @ k.mT) * q.shape[-1] ** -0.5
        some = seen.any(-1, keepdim=True).expand(len(q), -1, q.shape[2], -1)  # rows of padding see nothing
        weights = scores.masked_fill_(~seen & some, float("-inf")).softmax(-1) * some
        self.average[:, : q.shape[2], : k.shape[2]] += weights.sum(0)
        self.rows[: q.shape[2]] += some[:, 0, :, 0].sum(0)


class Fixed(nn.Module):
    """(q, k, seen) -> the pairs of a mask, [1, H, T, S]. Of a cache's rows, the last ones are asked for.

    Attributes:
        mask: bool [H, N, N].
    """

    mask: Tensor

    def __init__(self, heads: int, size: int, causal: bool, like: Tensor) -> None:
        super().__init__()
        self.causal = causal
        self.register_buffer("mask", like.new_empty(heads, size, size, dtype=torch.bool))

    def refill(self) -> None:
        """Everything, until it is drawn."""
        self.mask.fill_(True)

    def forward(self, q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
        first = k.shape[2] - q.shape[2] if self.causal else 0
        return self.mask[None, :, first : first + q.shape[2], : k.shape[2]]


@torch.no_grad()
def drawn_mask(average: Tensor, rows: Tensor, theta: float, causal: bool) -> Tensor:
    """The places to keep, bool [H, N, N], of sums [H, N, N] over so many samples a row, [N]."""
    share = average / average.sum(-1, keepdim=True).clamp(min=torch.finfo(average.dtype).tiny)
    value, place = share.sort(-1, descending=True)
    before = value.cumsum(-1) - value
    keep = torch.zeros_like(share, dtype=torch.bool).scatter(-1, place, before < theta) | (rows == 0)[:, None]
    count = torch.arange(len(rows), device=rows.device)
    keep |= count == 0
    return keep | (count[:, None] == count if causal else count[:, None] == 0)


def reordered(mask: Tensor, dense: float) -> dict[str, Tensor]:
    """Columns of a mask [H, T, S] in the order in which dense ones come first, [H, S], and how many these are, [H]."""
    full = mask.sum(1) > dense * mask.shape[1]
    return {"order": full.logical_not().int().argsort(dim=-1, stable=True), "dense": full.sum(-1)}


class Mixed(nn.Module):
    """(q, k, v) -> (q', k', v) and, in training, what mixing loses.

    Attributes:
        encode_q, encode_k, decode_q, decode_k: E and D of both, [h', H] and [H, h'].
    """

    def __init__(self, how: ViTCoD, attention: Any, like: Tensor) -> None:
        super().__init__()
        self.heads, self.width = (attention.heads, attention.kv_heads), attention.width
        for letter, count in zip("qk", self.heads, strict=True):
            few = max(1, math.ceil(how.heads * count))
            self.register_parameter(f"encode_{letter}", nn.Parameter(like.new_empty(few, count)))
            self.register_parameter(f"decode_{letter}", nn.Parameter(like.new_empty(count, few)))

    def initialize(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """E is drawn, and D, which comes after it, brings back what it can."""
        if name.startswith("encode"):
            value.normal_(0.0, value.shape[1] ** -0.5, generator=generator)
        else:
            encode = self.get_parameter(name.replace("decode", "encode"))
            if not isinstance(encode, FakeTensor):
                value.copy_(torch.linalg.pinv(encode.detach().double()))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        mixed = [self.mixture(letter, x) for letter, x in zip("qk", (q, k), strict=True)]
        if not (self.training and torch.is_grad_enabled()):
            return *mixed, v
        lost = [wide(x - y).flatten(1).norm(dim=1).mean() for x, y in zip((q, k), mixed, strict=True)]
        return *mixed, v, lost[0] + lost[1]

    def mixture(self, letter: str, x: Tensor) -> Tensor:
        """D E x for x [B, H, T, D]."""
        encode, decode = (self.get_parameter(f"{side}_{letter}").to(x.dtype) for side in ("encode", "decode"))
        return torch.einsum("hm,mg,bgtd->bhtd", decode, encode, x)

    def folded(self, weight: Tensor) -> Tensor:
        """The weight [rows, C] or bias [rows] of the layer before, with mixed heads."""
        q, kv = self.heads[0] * self.width, self.heads[1] * self.width
        parts = list(weight.split([q, kv, kv]))
        for i, letter in enumerate("qk"):
            encode, decode = (self.get_parameter(f"{side}_{letter}").to(weight.dtype) for side in ("encode", "decode"))
            by_head = parts[i].unflatten(0, (self.heads[i], self.width))
            parts[i] = torch.tensordot(decode @ encode, by_head, 1).flatten(0, 1)
        return torch.cat(parts)
