"""Attention to the keys whose angle to the query, as signs of a random projection estimate it, promises a high score.

    h(x)  = sign(R x),  R orthogonal         angle = max(0, pi / bits * (bits in which h(q) and h(k) differ) - bias)
    kept:   |k| cos(angle) > t max |k|        (|q| would be on both sides); the best of a row, where there is none

R is a Kronecker product of three small orthogonal matrices, so that R x takes 3 D D^(1/3) products instead of D^2.
`bias` makes the angle an underestimate for four pairs in five: it is the 80th percentile of the error at 64 bits. The
error of other hashes goes with 1 / sqrt(bits), and so does what is taken from their angles.

Each head's threshold t comes from `p`, on the first `calibrate` batches of training, which see all keys: of the keys
whose weight is more than p / (number of keys), the one with the least has q k = t_q |q| max |k|, and t is the mean of
t_q over queries and batches. It is in the checkpoint. Heads that other techniques cut or add calibrate anew.
A head keeps all as long as none of its weights is above p / (number of keys): a p that is too large chooses nothing.

Paper: Ham, Lee et al., "ELSA: Hardware-Software Co-design for Efficient, Lightweight Self-Attention Mechanism in Neural
Networks", ISCA 2021, doi 10.1109/ISCA52012.2021.00060. Here and not there: the largest |k| is that of the keys that the
query sees, and the share of p is one of these, so that later tokens and padding change nothing; numbers are not of 9
bits.

Saves: on such hardware, the scores of the other keys. Costs: here all of it is computed in full, and a mask of all
pairs is kept for the backward pass. Not for: training time on any CPU or GPU; heads of few numbers, whose bits say
little of an angle. Gradients go through the keys that are kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from scrimp.cores import SparseCore, best, choosing, without
from scrimp.draws import generator
from scrimp.technique import Card, Technique, at_least

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import State

BITS: Final = 64
"""Of the hash that `bias` is for."""
NONE: Final = -2.0
"""Stands for no threshold, as all of them are cosines or less."""


@dataclass(frozen=True, kw_only=True)
class Elsa(Technique):
    """Attention to keys at a small estimated angle."""

    card = Card(
        paper="doi:10.1109/ISCA52012.2021.00060",
        section="Hardware/algorithm co-design",
        claim="58.1x the speed of attention of a GPU, geometric mean, at less than 1% loss (abstract, ISCA 2021)",
        saves="on its hardware, the scores of unlikely keys",
        costs="here, a mask of all pairs and the work of choosing",
        sets=("attention core",),
        scope="targets",
        needs=("core",),
        refuses={"shared blocks": "Thresholds are those of one layer, and shared blocks are several."},
        phase={"model": "seams", "carry": "measured", "export": "folded"},
        emulated=("cpu", "cuda"),
        alone="thresholds are calibrated on the samples of one rank.",
        example={"p": 1.0, "calibrate": 2},
        neutral={"p": 0.0},
    )
    targets: str = "attention|cross"
    """Pattern of the attentions whose core is replaced."""
    p: float = 1.0
    """How much less than an equal share a key's weight may be for the key to matter; more keeps fewer, 0 keeps all."""
    bits: int = 0
    """Signs of a hash; 0 means as many as a head has numbers."""
    bias: float = 0.127
    """What is taken from an estimated angle of 64 bits, in radians; of fewer bits, more: sqrt(64 / bits) times."""
    calibrate: int = 8
    """Batches of training from which thresholds come; until then all keys are kept."""
    when: Literal["evaluation", "always"] = "always"
    """Whether training chooses as well."""

    def __post_init__(self) -> None:
        at_least(0, self, "p", "bits", "bias")
        at_least(1, self, "calibrate")

    def model(self, model: nn.Module, run: Run) -> nn.Module:
        """Replace the cores."""

        def make(path: str, attention: Any) -> SparseCore:
            if self.p == 0:
                return SparseCore(self.name)
            like = attention.proj.weight.new_empty(attention.heads, attention.width)
            angles = Angles(self, like, run.seed)
            return SparseCore(self.name, angles, self.when, watch=angles.watch)

        cores = choosing(self, model, run, make)
        chosen = [core.select for core in cores.values() if isinstance(core.select, Angles)]

        def begin(module: nn.Module, args: Any) -> None:
            if module.training and torch.is_grad_enabled():
                for angles in chosen:
                    if angles.calibrating:
                        angles.begin()
                        angles.calibrating = run.read(angles.count.min(), worst=0.0) < self.calibrate

        model.register_forward_pre_hook(begin)
        return model

    def carry(self, state: State, run: Run) -> State:
        """Heads that are no more, or new, have no threshold yet."""
        given = dict(state.get("model", {}))
        for path, module in run.model.named_modules():
            if isinstance(module, Angles):
                mine = dict(module.named_buffers(path))
                if any(name in given and given[name].shape != t.shape for name, t in mine.items()):
                    given |= {name: t for name, t in mine.items() if name in given}
        return {**state, "model": given} if "model" in state else state

    def export(self, named: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        """Without thresholds."""
        return without(named, run.model, self.name)


class Angles(nn.Module):
    """(q, k, seen) -> the pairs at a small estimated angle. Shapes: q [B, H, T, D], k [B, H, S, D].

    Attributes:
        threshold: t of each head, [H]: a mean over `count` batches, [H], in which some query had a key that matters.
        newest: t of the newest batch, [H]. It joins the mean when the next batch begins, so that a layer that is
            computed twice in a step chooses the same pairs twice.
    """

    threshold: Tensor
    count: Tensor
    newest: Tensor
    projection: Tensor

    def __init__(self, how: Elsa, like: Tensor, seed: int) -> None:
        super().__init__()
        self.how, self.seed, self.calibrating = how, seed, True
        heads, self.width = like.shape
        self.bits = how.bits or self.width
        self.register_buffer("threshold", like.new_empty(heads))
        self.register_buffer("count", like.new_empty(heads))
        self.register_buffer("newest", like.new_empty(heads))
        self.register_buffer("projection", like.new_empty(self.bits, self.width), persistent=False)
        self.refill()

    def refill(self) -> None:
        """Nothing is calibrated yet; the projection is the same in all layers."""
        self.threshold.zero_()
        self.count.zero_()
        self.newest.fill_(NONE)
        if not (isinstance(self.projection, FakeTensor) or self.projection.is_meta):
            chance = generator(self.seed, "elsa")
            parts = [dense(kronecker_factors(self.width, chance)) for _ in range(-(-self.bits // self.width))]
            self.projection.copy_(torch.cat(parts)[: self.bits])

    @torch.no_grad()
    def begin(self) -> None:
        """A new batch: the last one's threshold joins the mean."""
        new = (self.newest > NONE) & (self.count < self.how.calibrate)
        total = self.threshold * self.count + self.newest
        self.count += new
        self.threshold.copy_(torch.where(new, total / self.count.clamp(min=1), self.threshold))
        self.newest.fill_(NONE)

    @torch.no_grad()
    def watch(self, q: Tensor, k: Tensor, seen: Tensor) -> None:
        """Find the newest threshold, while calibrating."""
        if self.calibrating:
            self.newest.copy_(calibrated(q, k, seen, self.how.p))

    @torch.no_grad()
    def forward(self, q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
        size = k.norm(dim=-1)[:, :, None]  # [B, H, 1, S]
        promise = size * self.angle(q, k).cos()
        keep = promise > self.threshold[:, None, None] * largest(size, seen)
        return keep | best(promise, seen) | (self.count < self.how.calibrate)[:, None, None]

    def angle(self, q: Tensor, k: Tensor) -> Tensor:
        """Estimated angles [B, H, T, S]."""
        a, b = (torch.where(x @ self.projection.t().to(x.dtype) < 0, -1.0, 1.0).to(x.dtype) for x in (q, k))
        apart = (self.bits - a @ b.transpose(-1, -2)) / 2
        bias = self.how.bias * math.sqrt(BITS / self.bits)
        return (math.pi / self.bits * apart - bias).clamp(min=0)


def largest(size: Tensor, seen: Tensor) -> Tensor:
    """The largest of sizes [B, H, 1, S] that each row sees."""
    return size.masked_fill(~seen, 0.0).amax(-1, keepdim=True)


def calibrated(q: Tensor, k: Tensor, seen: Tensor, p: float) -> Tensor:
    """Each head's threshold, [H]; NONE where no query has a key that matters."""
    scores = q @ k.transpose(-1, -2)  # [B, H, T, S]
    weights = (scores * q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf")).softmax(-1)
    matters = weights > p / seen.sum(-1, keepdim=True)
    least = scores.masked_fill(~matters, float("inf")).amin(-1)
    size = largest(k.norm(dim=-1)[:, :, None], seen)[..., 0]
    each = least / (q.norm(dim=-1) * size).clamp(min=torch.finfo(q.dtype).tiny)
    some = matters.any(-1)
    count = some.sum((0, 2))
    return torch.where(count > 0, each.masked_fill(~some, 0.0).sum((0, 2)) / count, NONE)


def kronecker_factors(width: int, chance: torch.Generator) -> list[Tensor]:
    """Three random orthogonal matrices whose sizes multiply to the width and are as equal as can be."""
    sizes = min(
        ((a, b, width // (a * b)) for a in range(1, width + 1) if width % a == 0
         for b in range(1, width // a + 1) if width // a % b == 0),
        key=lambda three: (sum(three), three),
    )  # fmt: skip
    drawn = [torch.empty(n, n, dtype=torch.float64, device="cpu").normal_(generator=chance) for n in sizes]
    found: list[Tensor] = []
    for matrix in drawn:
        q, r = torch.linalg.qr(matrix)
        found.append(q * r.diagonal().sign())  # uniform over all orthogonal matrices
    return found


def dense(factors: list[Tensor]) -> Tensor:
    """Their Kronecker product."""
    a, b, c = factors
    return torch.kron(torch.kron(a, b), c)


def by_modes(factors: list[Tensor], x: Tensor) -> Tensor:
    """R x for x [..., D], factor by factor, as the hardware has it: D (a + b + c) products instead of D^2."""
    cube = x.unflatten(-1, tuple(len(f) for f in factors))
    return torch.einsum("ia,jb,kc,...abc->...ijk", *factors, cube).flatten(-3)
