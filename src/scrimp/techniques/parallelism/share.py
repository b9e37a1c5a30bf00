"""Shared blocks: one block's weights applied again and again, as in ALBERT.

    x <- block(x; w[i mod distinct])  for i in 0 .. L-1                             (order: cycle)
    x <- block(x; w[floor(i distinct / L)])                                         (order: runs)
    gradient of w[g] = the sum of those of all blocks that use it

Paper: Lan et al., "ALBERT: A Lite BERT for Self-supervised Learning of Language Representations", ICLR 2020, arXiv
1909.11942, whose blocks share all weights (`distinct: 1`). Its other half, a table of tokens that is a product of two
small matrices, is an option of the model: `model.embed_width`.

Saves: parameters, gradients and optimizer states of all but `distinct` of the L blocks, and as much to send between
devices. Costs: quality at the same depth and width; activations and computation stay what they were. Not for:
activation memory or time; models whose trained blocks differ, since only the first block of a group is kept.

Blocks stay modules of their own, with dropout of their own, and hold the same tensors: names of parameters are those
of the first block that uses them. Export writes them under every block's name, so that the model loads anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from scrimp.errors import UserError
from scrimp.models.seams import blocks
from scrimp.technique import Card, Technique, at_least

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import State


@dataclass(frozen=True, kw_only=True)
class Share(Technique):
    """Blocks with the same weights."""

    card = Card(
        paper="arXiv:1909.11942",
        section="Parallelism",
        saves="parameters, gradients and states of the blocks",
        costs="quality at the same depth; activations and computation stay",
        sets=("shared blocks",),
        refuses={
            "depth schedule": "Blocks that share their weights cannot be copied or cut one by one.",
            "width schedule": "Widths change block by block, and the blocks are one.",
            "matrix product": "Scales and histories are a layer's, and the weights are many layers'.",
            "sparsity": "A mask is a layer's, and the weights are many layers'.",
            "frozen weights": "Shared blocks cannot have additions of their own each; train, export, tune the export.",
            "initialization": "It scales weights block by block, and would scale shared ones again and again.",
        },
        phase={"model": "architecture", "carry": "rewind", "export": "whole"},
        example={"distinct": 2},
        neutral={"distinct": 0},
        remedies=({"distinct": 1},),
    )
    distinct: int = 1
    """How many different blocks there are; 0 means as many as blocks, which shares nothing."""
    order: Literal["cycle", "runs"] = "cycle"
    """cycle: 0 1 0 1; runs: 0 0 1 1."""

    def __post_init__(self) -> None:
        at_least(0, self, "distinct")

    def model(self, model: nn.Module, run: Run) -> nn.Module:
        """Let blocks hold the tensors of the first one of their group."""
        for name, first in self._firsts(model, run).items():
            own, theirs = (_parameters(model.get_submodule(path)) for path in (name, first))
            if {path: p.shape for path, p in own.items()} != {path: p.shape for path, p in theirs.items()}:
                what = f"`{name}` has other parameters than `{first}`, or of other shapes, and cannot share them."
                raise UserError(what, run.where(self), "Use a model whose blocks are alike.")
            for path, p in theirs.items():
                parent, _, leaf = path.rpartition(".")
                model.get_submodule(f"{name}.{parent}".rstrip(".")).register_parameter(leaf, p)
        return model

    def carry(self, state: State, run: Run) -> State:
        """Of blocks that come with weights of their own, the first of each group."""
        firsts = self._firsts(run.model, run)
        given = state.get("model", {})
        lost = {name: first + name.removeprefix(owner) for name in given for owner, first in firsts.items()
                if name.startswith(f"{owner}.")}  # fmt: skip
        if not lost:
            return state
        if any(twin in given and not torch.equal(given[name], given[twin]) for name, twin in lost.items()):
            run.remarks.append("`share` keeps the weights of the first block of each group; the given blocks differ.")
        return {**state, "model": {name: tensor for name, tensor in given.items() if name not in lost}}

    def export(self, named: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        """The shared weights under every block's name."""
        plain = dict(named)
        for name, first in self._firsts(run.model, run).items():
            plain |= {name + n.removeprefix(first): t.clone() for n, t in named.items() if n.startswith(f"{first}.")}
        return plain

    def _firsts(self, model: nn.Module, run: Run) -> dict[str, str]:
        """Blocks that hold no weights of their own -> the block that has them.

        Raises:
            UserError: if there are fewer blocks than groups, or nothing to share.
        """
        if not self.distinct:
            return {}
        lists: dict[str, list[str]] = {}
        for name in blocks(model, run.where(self)):
            lists.setdefault(name.rpartition(".")[0], []).append(name)
        if max(len(names) for names in lists.values()) <= self.distinct:
            what = f"there are no more than {self.distinct} blocks, so that none would be shared."
            raise UserError(what, run.where(self, "distinct"), "Lower it.")
        found: dict[str, str] = {}
        for names in lists.values():
            groups = min(self.distinct, len(names))
            for i, name in enumerate(names):
                group = i % groups if self.order == "cycle" else i * groups // len(names)
                first = names[group if self.order == "cycle" else -(-group * len(names) // groups)]
                if first != name:
                    found[name] = first
        return found


def _parameters(block: nn.Module) -> dict[str, nn.Parameter]:
    """A block's parameters by all of their names."""
    return dict(block.named_parameters(remove_duplicate=False))
