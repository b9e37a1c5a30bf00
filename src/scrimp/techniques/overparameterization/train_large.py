"""Train large, then compress: begin with a wider or deeper model, cut it to the recipe's, and go on.

    wide stage:   MLPs `hidden` times as wide, `heads` times as many heads, `layers` more blocks
    the cut:      neurons by ||down[:, j]|| ||up[j, :]|| (times ||gate[j, :]||), heads by ||proj[:, h]|| ||v[h, :]||: as
                  many as the recipe has stay, and of the blocks every (L + layers - 1) / (L - 1)-th, the first and last
    after:        the recipe's own model; with `distill` w its loss is   loss + w KL(wide model || model)

Paper: Li et al., "Train Large, Then Compress", ICML 2020, arXiv 2002.11794. The paper prunes single weights and
quantizes; here whole neurons, heads and blocks go, so that what is left is the model that the recipe asks for and as
fast. Moments are cut like the weights they belong to.

For `distill` the wide model's weights are kept until the end of the run, and it is run forward, without dropout, in
each step. Logits are compared in places whose targets count.

Saves: steps, since larger models need fewer for the same loss; the paper's claim is about time, which depends on the
machine: compare at equal seconds. Costs: slower steps and more memory before the cut, a jump of the loss at it.
Not for: weights to start from, which have the recipe's size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from scrimp.clock import Duration
from scrimp.distilling import Teacher, divergence, refuse_joined_head, watched
from scrimp.errors import UserError
from scrimp.models.seams import blocks
from scrimp.slimming import (
    Choice,
    Cut,
    all_cuts,
    check,
    choice,
    cut_state,
    cut_table,
    largest,
    listed,
    neurons,
    unit_width,
    units,
)
from scrimp.technique import Card, Technique, at_least
from scrimp.weights import persistent

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import Batch, Loss, State

SIZES: Final = "sizes_after"
"""Attribute of the wide model: path of a block of the recipe's model -> its units and neurons."""
TEACHER: Final = "teacher/"
"""Prefix of the wide model's weights in memory."""


@dataclass(frozen=True, kw_only=True)
class TrainLarge(Technique):
    """Begin with a larger model and cut it to the recipe's."""

    card = Card(
        paper="arXiv:2002.11794",
        section="Overparameterization",
        claim="larger models converge in fewer steps, which outpaces the cost of each (abstract)",
        saves="steps",
        costs="slower steps and more memory before the cut",
        sets=("depth schedule", "width schedule", "sparsity"),
        needs=("qkv", "proj", "up", "down"),
        refuses={
            "frozen weights": "It begins with a larger model, for which there are no weights to freeze.",
        },
        phase={"model": "sizes", "carry": "widen", "loss": "auxiliary", "export": "whole"},
        whole="heads and neurons are ranked by whole weights.",
        undivided="its loss watches all blocks.",
        example={"hidden": 1.5, "heads": 2.0, "layers": 1, "until": "4 step"},
    )
    hidden: float = 2.0
    """Factor of the MLPs' width."""
    heads: float = 1.0
    """Factor of the number of heads, whose width stays."""
    layers: int = 0
    """Blocks on top of the recipe's; in each tower or side that has no number of its own."""
    until: str | float = 0.5
    """When the model is cut."""
    distill: float = 0.0
    """Weight of the divergence from the wide model's logits after the cut."""

    def __post_init__(self) -> None:
        at_least(1, self, "hidden", "heads")
        at_least(0, self, "layers", "distill")
        if not Duration.parse(self.until, "until").value:
            raise UserError("until must be more than 0.")
        if self.hidden == self.heads == 1 and not self.layers:
            raise UserError("nothing is larger.", "", "Raise hidden, heads or layers.")

    def stages(self) -> tuple[str | float, ...]:
        """The cut."""
        return (self.until,)

    def model(self, model: nn.Module, run: Run) -> nn.Module:
        """The wide model before the cut, the recipe's after it."""
        for path, block in blocks(model, run.where(self)).items():
            check(block, path, run.where(self))
        if self._decided(run):
            return model
        wide = self._widened(model, run)
        sizes, larger = _sizes(model), blocks(wide)
        if _sizes(wide) == sizes:
            what = "rounded down to whole heads and neurons, nothing is larger than the recipe's model."
            raise UserError(what, run.where(self), "Raise hidden, heads or layers.")
        wide.__dict__[SIZES] = sizes
        for path, block in blocks(model).items():
            if unit_width(block) != unit_width(larger[path]):
                what = f"with more heads those of `{path}` would be narrower."
                raise UserError(what, run.where(self, "heads"), "Leave it at 1 for this model.")
        return wide

    def _widened(self, model: nn.Module, run: Run) -> nn.Module:
        c: Any = getattr(model, "config", None)
        if not all(hasattr(c, name) for name in ("hidden", "kv_heads", "head_dim", "build")):
            raise UserError(f"{type(model).__name__} says no sizes.", run.where(self), "Use a model of the house.")
        c = replace(c, hidden=int(self.hidden * c.mlp), layers=c.layers + self.layers, head_width=c.head_dim,
                    heads=int(self.heads * (c.kv_heads or c.heads)) * (c.heads // (c.kv_heads or c.heads)),
                    kv_heads=int(self.heads * c.kv_heads))  # fmt: skip
        return c.build()

    def carry(self, state: State, run: Run) -> State:
        """Over the cut: blocks, heads and neurons that stay, and the wide weights for the teacher."""
        weights, chosen = state.get("model", {}), self._decided(run)
        own = dict(run.model.named_parameters()) | persistent(run.model)
        if not chosen:
            off = [name for name, t in weights.items() if name in own and own[name].shape != t.shape]
            if off:
                fix = "Begin with random weights, or drop it."
                raise UserError("the weights to start from are not as large as its model.", run.where(self), fix)
            return state
        if not weights or not _is_wide(weights, own):
            return state
        moved = {kind: _moved(tensors, chosen) for kind, tensors in state.items()}
        cut = cut_state(moved, all_cuts(run.model, chosen))
        if self.distill:
            teacher = {TEACHER + name: t for name, t in weights.items() if name in self._teacher_shapes(run)}
            cut[f"memory.{run.order.key(self)}"] = teacher
        return cut

    def loss(self, loss: Loss, run: Run) -> Loss:
        """After the cut: the divergence from the wide model."""
        where = run.where(self, "distill")
        if self.distill and not self._decided(run):
            self._check_teacher(run, where)
        if not self.distill or not self._decided(run):
            return loss
        memory, like = run.memory(self), next(run.model.parameters())
        for name, shape in self._teacher_shapes(run).items():
            memory[TEACHER + name] = torch.zeros(shape, dtype=like.dtype, device=like.device)
        with torch.device("meta"):
            teacher = Teacher(self._widened(run.model, run), memory, TEACHER)
        with watched(run.model, where):
            pass

        def distilled(model: nn.Module, batch: Batch) -> Tensor:
            with torch.no_grad(), watched(teacher.__dict__["model"], where) as wide:
                run.task.loss(teacher, batch)
            with watched(run.model, where) as small:
                total = loss(model, batch)
            return total + self.distill * divergence(small, wide, where)

        return distilled

    def _check_teacher(self, run: Run, where: str) -> None:
        """Whether there will be logits, and the wide model is what its options say, from which the teacher is built."""
        if any("head loss" in technique.card.sets for technique in run.order.techniques):
            refuse_joined_head(where)
        config: Any = run.model.config
        with torch.device("meta"):
            plain = {name for name, _ in config.build().named_parameters()}
        other = {name for name, _ in run.model.named_parameters()} ^ plain
        if other:
            what = f"another technique changes the wide model (`{min(other)}`), which then cannot be learned from."
            raise UserError(what, where, "Drop that technique, or leave this at 0.")

    def _teacher_shapes(self, run: Run) -> dict[str, torch.Size]:
        with torch.device("meta"):
            return {name: p.shape for name, p in self._widened(run.model, run).named_parameters()}

    def decide(self, last: Run) -> dict[str, Any]:
        """What stays, when the wide stage is what ended."""
        if self._decided(last) or last.clock.position < last.clock.at(self.until):
            return last.decisions.get(last.order.key(self), {})
        return {"blocks": self._choose(dict(last.model.named_parameters()), last)}

    def export(self, named: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        """The recipe's model, cut here if the run has not reached the cut."""
        if self._decided(run):
            return named
        chosen = self._choose(named, run)
        cuts: dict[str, Cut] = {}
        for path, kept in chosen.items():
            found = all_cuts(run.model, {kept["from"]: kept})
            cuts |= {path + name.removeprefix(kept["from"]): cut for name, cut in found.items()}
        return cut_table(_moved(named, chosen), cuts)

    @torch.no_grad()
    def _choose(self, named: Mapping[str, Tensor], run: Run) -> dict[str, Choice]:
        """Path of a block of the recipe's model -> where it comes from, and what stays of it."""
        sizes: dict[str, tuple[int, int]] = next(m.__dict__[SIZES] for m in run.model.modules() if SIZES in m.__dict__)
        found, chosen = blocks(run.model), {}
        for path, (heads, others) in sizes.items():
            parent = path.rpartition(".")[0]
            few, many = (sum(p.rpartition(".")[0] == parent for p in paths) for paths in (sizes, found))
            place = round(int(path.rpartition(".")[2]) * (many - 1) / max(few - 1, 1))
            source = f"{parent}.{place}".lstrip(".")
            block = found[source]
            scores = importance(source, block, named)
            kept = [listed(largest(s, len(s) - n), n, run.read) for s, n in zip(scores, (heads, others), strict=True)]
            chosen[path] = choice(block, *kept) | {"from": source}
            if getattr(block, "cross", None) is not None:
                cross = listed(largest(heads_of(source, block, named, "cross"), units(block) - heads), heads, run.read)
                chosen[path] |= {"cross": cross, "of_cross": units(block)}
        return chosen

    def _decided(self, run: Run) -> dict[str, Choice]:
        return run.decisions.get(run.order.key(self), {}).get("blocks", {})


def _sizes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Path of each block -> its units and neurons."""
    return {path: (units(block), neurons(block)) for path, block in blocks(model).items()}


def importance(path: str, block: nn.Module, named: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Of a block's units, [K], and of its neurons, [N]."""
    scores = _weight(named, path, "mlp.down").norm(dim=0) * _weight(named, path, "mlp.up").norm(dim=1)
    if f"{path}.mlp.gate.weight" in named:
        scores = scores * _weight(named, path, "mlp.gate").norm(dim=1)
    return heads_of(path, block, named, "attention"), scores


def heads_of(path: str, block: nn.Module, named: Mapping[str, Tensor], part: str) -> Tensor:
    """Importance of the units of an attention, [K]: rows of v are the last of its layer."""
    count, own = units(block, part), getattr(block, part)
    values = _weight(named, path, f"{part}.{'qkv' if part == 'attention' else 'kv'}")[-count * own.width :]
    out = _weight(named, path, f"{part}.proj").unflatten(1, (count, unit_width(block, part)))
    return values.unflatten(0, (count, -1)).flatten(1).norm(dim=1) * out.transpose(0, 1).flatten(1).norm(dim=1)


def _weight(named: Mapping[str, Tensor], path: str, layer: str) -> Tensor:
    weight = named[f"{path}.{layer}.weight"].detach()
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _is_wide(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> bool:
    return any(name not in weights or weights[name].shape != t.shape for name, t in own.items()) or any(
        name not in own and ".attention." in name for name in weights
    )


def _moved(tensors: Mapping[str, Tensor], chosen: Mapping[str, Choice]) -> dict[str, Tensor]:
    """A table by names, with the blocks that stay under the names that they get."""
    places = {kept["from"]: path for path, kept in chosen.items()}
    parents = {path.rpartition(".")[0] for path in chosen}
    moved: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        parent = next((p for p in parents if name.startswith(f"{p}.".lstrip("."))), None)
        if parent is None:
            moved[name] = tensor
            continue
        number = name[len(f"{parent}.".lstrip(".")) :].partition(".")[0]
        source = f"{parent}.{number}".lstrip(".")
        if source in places:
            moved[places[source] + name[len(source) :]] = tensor
    return moved
