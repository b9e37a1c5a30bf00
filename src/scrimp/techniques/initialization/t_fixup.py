"""T-Fixup: an initialization with which a Transformer trains without layer norms and without warm-up.

    all matrices: Xavier uniform;  embeddings, positions: normal with standard deviation d^(-1/2)
    value, output and MLP matrices:  times (9 N)^(-1/4) in a decoder, 0.67 N^(-1/4) in an encoder, of N blocks
    input embedding:                 times (9 N)^(-1/4)

Queries, keys and positions keep their scale. The paper's model multiplies what it looks up by sqrt(d) and ours does
not, hence this technique adds the factor. Paper: Huang et al., "Improving Transformer Optimization Through Better
Initialization", ICML 2020, PMLR 119.

Saves: layer norms (their time and activations) and warm-up. Costs: an architecture without norms, which no other
library loads. Not for: fine-tuning, growth of depth (N is fixed at the start), factorized embeddings (`embed_width`),
for which nothing is derived; mixed precision without care. The 9 counts three branches of a decoder block,
cross-attention among them; for a decoder-only model it lies outside the derivation, and `constants: encoder` is the
alternative. A tied head gets the embedding's scale, as in the paper's code.

Of two stacks each has its own N; an embedding that both read is scaled once, by the deeper one. Patches are an input
embedding too: they are drawn by their number of values, so that they need no factor sqrt(d), and so are class and
mask tokens, with standard deviation 1. Norms of queries and keys, and the norm in BERT's head, stay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from scrimp.errors import UserError
from scrimp.normless import Stack, fill, refuse_norms, stacks, take_out_norms
from scrimp.technique import Card, Technique

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import State

TOKENS = ("class_token", "mask_token")
"""Parts of a model's inputs that are looked up and not multiplied by sqrt(d)."""
INPUTS = ("embed", "patches", *TOKENS)
"""What gives a stack its inputs; positions and segments are added to it unscaled."""


@dataclass(frozen=True, kw_only=True)
class TFixup(Technique):
    """Train without layer norms and without warm-up."""

    card = Card(
        paper="ICML 2020, PMLR 119",
        section="Initialization",
        saves="layer norms and warm-up",
        costs="an architecture that no other library loads",
        sets=("initialization", "normalization"),
        needs=("attention_norm", "mlp_norm", "attention_scale", "mlp_scale"),
        phase={"model": "architecture", "init": "fill"},
        undivided="it counts the model's blocks to choose their first weights, and a rank has only some of them.",
        example={"constants": "decoder"},
    )
    constants: Literal["auto", "decoder", "encoder"] = "auto"
    """Which of the two derived scales; auto takes the decoder's for blocks in which a token sees none after it."""

    def model(self, model: nn.Module, run: Run) -> nn.Module:
        """No norms; looked-up embeddings times sqrt(d)."""
        take_out_norms(model, run.where(self))
        for module in list(model.modules()):
            if isinstance(getattr(module, "embed_scale", None), nn.Module):
                if getattr(module.config, "embed_width", 0):
                    what = "the scale of the first embedding is derived for one table, not for a product of two."
                    raise UserError(what, run.where(self), "Leave `model.embed_width` at 0, or take fixup or rezero.")
                module.embed_scale = Times(math.sqrt(module.config.width))  # type: ignore[union-attr]
        return model

    def init(self, model: nn.Module, run: Run) -> nn.Module:
        """Draw every matrix anew, each from a generator of its own."""
        if any(t.card.phase.get("carry") == "grow" for t in run.order.techniques):
            run.remarks.append(
                "t_fixup scales the first weights for the first stage's depth: blocks that are added later are copies, "
                "which nothing scales anew."
            )
        found = stacks(model)
        branch = {f"{b.path}.{b.kind}.": self._branch(stack) for stack in found for b in stack.branches}

        def factor(name: str, part: str) -> float:
            inside = next((value for path, value in branch.items() if name.startswith(path)), None)
            if inside is not None:
                return 1.0 if part in ("q", "k") else inside
            module, _, _ = name.removesuffix(".weight").rpartition(".")
            last = name.removesuffix(".weight").rpartition(".")[2]
            if last not in INPUTS:
                return 1.0
            shrink = (9 * _depth(found, module)) ** -0.25
            return shrink * math.sqrt(model.get_parameter(name).shape[-1]) if last in TOKENS else shrink

        fill(model, run.seed, self.name, factor)
        return model

    def carry(self, state: State, run: Run) -> State:
        """Refuse weights that were trained with norms."""
        return refuse_norms(state, run, run.where(self))

    def _branch(self, stack: Stack) -> float:
        decoder = stack.causal if self.constants == "auto" else self.constants == "decoder"
        return (9 * stack.depth) ** -0.25 if decoder else 0.67 * stack.depth**-0.25


def _depth(found: list[Stack], path: str) -> int:
    """Blocks of the stack that a module's inputs go to, or of the deepest, where several read them."""
    own = [stack.depth for stack in found if stack.path == path]
    return max(own or [stack.depth for stack in found if stack.path.startswith(f"{path}." if path else "")], default=1)


class Times(nn.Module):
    """x -> factor x."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor
