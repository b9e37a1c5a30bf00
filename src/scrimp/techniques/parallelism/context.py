# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Context parallelism: ranks share the tokens of each sample, and every rank holds all weights.

    ring       rank r has the stretches r and 2 n - 1 - r of 2 n of each sample. Keys and values go round the ranks, and
               o = sum_j exp(L_j - L) o_j,  L = log sum_j exp L_j,  joins the attention o_j to each rank's, exactly
    ulysses    rank r has the stretch r of n. Before attention, all tokens of H / n heads go to each rank; behind it,
               all heads of its own tokens come back
    both       g = sum over ranks of grad(summed loss of the rank's tokens) / count of the whole batch

The gradient is that of one process, to float error. Places, rotations and dropout are those of the whole sample, and
each token's target is the next one, whoever has it. Under a causal mask all ranks of a ring compute as many pairs.

Papers: Li et al., "Sequence Parallelism", arXiv 2105.13120; Liu et al., "Ring Attention with Blockwise Transformers",
arXiv 2310.01889; Jacobs et al., "DeepSpeed Ulysses", arXiv 2309.14509.

Saves: activations, to 1/n of theirs, scores among them; time, where a rank's tokens keep its device busy. Costs: the
ring sends keys and values n - 1 times a block forward, and twice as much and more backward, while it computes; it
computes attention in torch's own products, in at least float32, and keeps scores of a tile only. Ulysses sends queries,
keys, values and outputs once each way, waits for them, and attends by the ordinary kernel, whose heads, and heads of
keys, the ranks must be able to share. Gradients are summed as in data parallelism. Not for: short samples, which
`replicate` shares better.

Beside `zero`, weights and states are sharded over these ranks too. Where each rank has the whole sample, as in
validation, in generation and in scores before training, all compute the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from scrimp.cores import replace_cores
from scrimp.errors import UserError
from scrimp.lanes import Ranks
from scrimp.models.dropout import Dropout
from scrimp.models.layers import Attention
from scrimp.models.transformer import Transformer
from scrimp.replicas import summed
from scrimp.technique import Card, Technique
from scrimp.tokenwise import Shared, SharedCore

if TYPE_CHECKING:
    from torch import Tensor, nn

    from scrimp.run import Run
    from scrimp.technique import Backward, Batch, Loss


@dataclass(frozen=True, kw_only=True)
class Context(Technique):
    """Ranks share the tokens of each sample, and every rank holds all weights."""

    card = Card(
        paper="arXiv:2105.13120",
        section="Parallelism",
        saves="activations, to 1/ranks of them",
        costs="keys and values go round all ranks in every block, forward and backward",
        sets=("context parallelism",),
        refuses={
            "attention core": "Ranks that share tokens see each other's in a core of its own.",
            "pipeline": "Stages would hand on parts of samples.",
            "prefixes": "They stand before the tokens of one rank only.",
            "prompts": "They stand before the tokens of one rank only.",
            "tokens of a layer": "It chooses among all tokens of a sample, of which each rank has a part.",
        },
        axes=("context",),
        breaks=True,
        phase={"wrap": "shard", "loss": "items", "backward": "summed"},
        example={},
        neutral={},
    )
    kind: Literal["ring", "ulysses"] = "ring"
    """Keys and values go round the ranks, or tokens are exchanged for heads."""

    def wrap(self, model: nn.Module, run: Run) -> nn.Module:
        """Give the model a rank's tokens, and its attention those of all; a single rank has nothing to share."""
        if run.world.ranks("context") == 1:
            return model
        where = run.where(self)
        if not isinstance(model, Transformer) or model.config.head not in ("", "lm", "mlm"):
            what = f"{type(model).__name__} sums no loss over tokens of one sequence, which ranks could share."
            raise UserError(what, where, "Train it with `replicate` or `zero` instead.")
        shared = Shared(Ranks.of(run.world, "context"), self.kind == "ring")
        shared.dropouts += [m for m in model.modules() if isinstance(m, Dropout)]
        if self.kind == "ulysses":
            self._check_heads(model, shared.ranks.count * run.world.ranks("tensor"), where)
        replace_cores(model, "*", where, lambda path, attention: SharedCore(attention.core, shared))
        model.forward = shared.around(model)  # type: ignore[method-assign]
        run.plans[self.name] = shared
        return model

    def loss(self, loss: Loss, run: Run) -> Loss:
        """Of a rank's tokens, times the ranks: each counts all tokens of its samples, n times what is there."""
        if run.world.ranks("context") == 1:
            return loss
        shared: Shared = run.plans[self.name]

        def of_own(model: nn.Module, batch: Batch) -> Tensor:
            with shared.sharing():
                total = loss(model, batch)
            return total if shared.sight is None else total * shared.ranks.count

        return of_own

    def backward(self, backward: Backward, run: Run) -> Backward:
        """Gradients summed over the ranks, unless data parallelism does it with those of other samples."""
        others = any("data parallelism" in t.card.sets for t in run.order.techniques)
        return backward if others or run.world.ranks("context") == 1 else summed(backward, run, bucket=25.0)

    def _check_heads(self, model: nn.Module, ranks: int, where: str) -> None:
        """Whether the ranks can share all heads evenly."""
        for path, layer in model.named_modules():
            if isinstance(layer, Attention) and (layer.heads % ranks or layer.kv_heads % ranks):
                what = f"`{path}` has {layer.heads} heads of queries and {layer.kv_heads} of keys for {ranks} ranks."
                raise UserError(what, f"{where}.kind", "Use `kind: ring`, which shares any number.")
