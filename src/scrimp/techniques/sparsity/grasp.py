"""GraSP: prune once, before training, so that the gradient keeps its norm.

    S = -w * (H g),   g = dL/dw,  H its Hessian;   REMOVE the weights with the largest S

as 2 S is, to first order, how much ||g||^2 rises when the weight goes. S has a sign: no magnitude is taken. Paper: Wang
et al., "Picking Winning Tickets Before Training by Preserving Gradient Flow", ICLR 2020, arXiv 2002.07376.

H g is exact, by differentiating twice, of the loss of the logits divided by a temperature, with dropout off. The
paper's code draws its linear layers anew for scoring, so that it scores other weights than it trains; here it is those
that are trained. Biases are not pruned. Every layer keeps at least `floor` weights.

Saves: FLOPs and bytes on hardware with sparse products; no seconds on a CPU or GPU, where masks are stored dense.
Costs: once, a backward pass through a backward pass, which keeps the activations of both and the matrices of attention;
`parts` scores a batch in parts. Not for: branches that begin at zero.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch.nn.attention import SDPBackend, sdpa_kernel

from scrimp.errors import UserError
from scrimp.models.seams import matching
from scrimp.sparse.masks import masked_evaluate, masked_export, masked_step, prunable
from scrimp.sparse.once import pruned_once
from scrimp.sparse.patterns import Pattern
from scrimp.sparse.scores import grasp, scored_batches
from scrimp.splitting import split
from scrimp.technique import Card, Technique, above_zero, at_least

if TYPE_CHECKING:
    from torch import Tensor, nn

    from scrimp.run import Run
    from scrimp.technique import Backward, Batch, Evaluate, Step


@dataclass(frozen=True, kw_only=True)
class GraSP(Technique):
    """Prune at the start, keeping the flow of the gradient."""

    card = Card(
        paper="arXiv:2002.07376",
        section="Sparse training",
        claim="80 % of VGG-16's weights pruned at the start for 1.6 % of top-1 on ImageNet (abstract of 2002.07376)",
        saves="FLOPs on sparse hardware; no seconds on a CPU or GPU: masks are stored dense",
        costs="a backward pass through a backward pass, once",
        sets=("sparsity",),
        phase={"backward": "masked", "step": "masked", "evaluate": "masked", "export": "merged"},
        refuses={
            "frozen weights": "masks are of weights that are trained, and tuning freezes them.",
            "width schedule": "masks have the shapes of their weights, which it changes.",
            "closed branches": "the weights of a branch that begins at zero have no gradient to keep.",
            "compilation": "compiled code cannot be differentiated twice.",
            "head loss": "a loss joined with its head cannot be differentiated twice.",
            "matrix product": "rounded products cannot be differentiated twice.",
        },
        entire="it differentiates gradients, and what ranks send each other has none.",
        whole="masks are of whole weights.",
        undivided="it compares the weights of all blocks to choose which to drop.",
        example={"density": 0.5},
        neutral={"density": 1.0},
    )
    density: float = 0.2
    """Share of all prunable weights together that remains; not read by a pattern such as 2:4, which is 1/2."""
    temperature: float = 200.0
    """Logits are divided by it while scoring."""
    head: str = "head"
    """Pattern of the modules whose outputs are logits; not read at a temperature of 1."""
    batches: int = 1
    """Batches that are scored: the run's first ones."""
    parts: int = 1
    """Parts of a batch, of which one at a time has its activations in memory."""
    floor: int = 1
    """Weights, or blocks of a pattern, that every layer keeps."""
    pattern: str = "weights"
    """What is pruned together: `weights` one by one, blocks such as `4x4`, or the worst of each group: `2:4`."""
    params: str = "blocks.*"
    """Pattern of the linear layers' weights to prune."""

    def __post_init__(self) -> None:
        at_least(1, self, "batches", "floor", "parts")
        Pattern.parse(self.pattern)
        if not self.temperature > 0:
            raise UserError(f"temperature must be above 0, not {self.temperature}.")
        above_zero(self, "density")

    def backward(self, backward: Backward, run: Run) -> Backward:
        """Score and prune before the run's first backward pass; mask the gradients."""
        weights, heads = prunable(run, self, self.params), self._heads(run)
        fix = "Use bfloat16, a lower temperature, or another initialization."
        return pruned_once(backward, run, self, weights, lambda batch: self._scores(run, batch, weights, heads), fix)

    def _heads(self, run: Run) -> list[nn.Module]:
        """The modules whose outputs are logits."""
        if self.temperature == 1:
            return []
        modules = dict(run.model.named_modules())
        try:
            return [modules[n] for n in matching(self.head, [n for n in modules if n], "module")]
        except UserError as error:
            fix = f"{error.fix} Or set temperature to 1."
            raise UserError(error.what, run.where(self, "head"), fix.strip()) from None

    def _scores(
        self, run: Run, batch: Batch, weights: dict[str, nn.Parameter], heads: list[nn.Module]
    ) -> dict[str, Tensor]:
        with sdpa_kernel(SDPBackend.MATH), cooled(heads, self.temperature):
            found = grasp(self._losses(run, batch), list(weights.values()), run.world.total)
        return {name: -s for name, s in zip(weights, found, strict=True)}

    def _losses(self, run: Run, first: Batch) -> list[Callable[[], Tensor]]:
        """The mean loss of every part of every scoring batch."""

        def loss(part: Batch, count: Tensor) -> Tensor:
            assert run.loss is not None
            return run.loss(run.model, part) / count

        found: list[Callable[[], Tensor]] = []
        for batch in scored_batches(run, first, self.batches, run.where(self, "batches")):
            count = run.world.total(run.task.count(batch))
            found += [partial(loss, piece, count) for piece in split(batch, self.parts)]
        return found

    def step(self, step: Step, run: Run) -> Step:
        """Mask the weights."""
        return masked_step(step, run, self, prunable(run, self, self.params))

    def evaluate(self, evaluate: Evaluate, run: Run) -> Evaluate:
        """Mask averaged weights."""
        return masked_evaluate(evaluate, run, self, prunable(run, self, self.params))

    def export(self, named: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        """Masked."""
        return masked_export(named, run, self)


@contextmanager
def cooled(heads: list[nn.Module], temperature: float) -> Generator[None]:
    """Inside, the outputs of some modules are divided by a temperature."""

    def divided(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out / temperature

    hooks = [head.register_forward_hook(divided) for head in heads]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
