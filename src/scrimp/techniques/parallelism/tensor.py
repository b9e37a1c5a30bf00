# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Tensor parallelism: every rank holds a part of each layer, and all see the same samples.

    attention     rank r has heads r H / n ... of qkv (rows) and of proj (columns); the ranks' outputs are summed
    MLP           rank r has hidden units r F / n ... of up (rows) and of down (columns); likewise
    vocabulary    rank r has tokens r V / n ... of embedding, head and loss
    between       rank r has tokens r T / n ... of the residual stream (`sequence`)

Two sums of [B, T, C] a block and pass, into the layers backward and out of them forward; with `sequence` each is a
reduce-scatter and a gather, which send as much. A bias behind a sum is added once. Dropout is keyed by sample and
position, and drops the same activations on any mesh.

Papers: Shoeybi et al., "Megatron-LM", arXiv 1909.08053; Korthikanti et al., "Reducing Activation Recomputation in Large
Transformer Models", arXiv 2205.05198, for `sequence`.

Saves: weights, gradients, states and products of the split layers, to 1/n of them each; with `sequence` also what norms
and residual sums keep. Costs: four exchanges of activations a block and step, on which the ranks wait; so it is for
ranks that are connected fast. Not for: ranks in other machines (`replicate`, `zero`); heads fewer than ranks.

Norms, positions and biases behind sums stay whole on every rank, and are the same there. Where tokens cannot be shared
evenly, as in generation, the stream stays whole too. A token that is gathered is kept whole for the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from scrimp.cutting import Cutter, check
from scrimp.lanes import Lane, Ranks
from scrimp.models.layers import Embedding
from scrimp.models.seams import blocks
from scrimp.technique import Card, Technique

if TYPE_CHECKING:
    from torch import nn

    from scrimp.run import Run


@dataclass(frozen=True, kw_only=True)
class TensorParallel(Technique):
    """Every rank holds a part of each layer."""

    card = Card(
        paper="arXiv:1909.08053",
        section="Parallelism",
        saves="weights, gradients, states and products, to 1/ranks of them each",
        costs="four exchanges of activations a block and step",
        sets=("tensor parallelism",),
        axes=("tensor",),
        shards=True,
        phase={"wrap": "shard"},
        example={},
        neutral={},
    )
    sequence: bool = True
    """Share the tokens between layers too, while training."""
    vocabulary: bool = True
    """Share the vocabulary: the embedding, the head and the loss."""

    def wrap(self, model: nn.Module, run: Run) -> nn.Module:
        """Cut the layers; a single rank has nothing to share."""
        if run.world.ranks("tensor") == 1:
            return model
        check(model, self.sequence, self.vocabulary, run.where(self))
        cutter = Cutter(Ranks.of(run.world), run.where(self))
        stacks: dict[str, dict[str, nn.Module]] = {}
        for name, block in blocks(model, run.where(self)).items():
            stacks.setdefault(name.rpartition(".")[0], {})[name] = block
        for stack in stacks.values():
            cutter.stack(stack, Lane(cutter.ranks, self.sequence))
        for owner in list(model.modules()) if self.vocabulary else ():
            embed = getattr(owner, "embed", None)
            if isinstance(embed, Embedding) or (embed is None and hasattr(owner, "head_loss")):
                cutter.vocabulary(owner)
        return model
