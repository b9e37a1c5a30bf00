"""Masks over weights: which weights can be pruned, where masks are kept, and how they act.

A mask is a boolean tensor in `run.memory` called like its weight and `#mask`, so that it is checkpointed, and copied
with its weight when a model grows. Pruned weights are stored as zeros: the forward pass is the plain one, and the
gradient that arrives is dense, which methods of growth read. Then it is masked, before it is clipped and before moments
see it: the moments of pruned weights stay zero. Weights are masked again after the update, as rules such as muon move
weights that have no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from scrimp.draws import generator
from scrimp.errors import UserError
from scrimp.groups import parts, trainable
from scrimp.models.seams import WEIGHT, Linear, matching

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import Backward, Batch, Evaluate, State, Step, Technique

MASK: Final = "#mask"
"""Follows a weight's name in memory; no parameter can be called so."""


def prunable(run: Run, technique: Technique, pattern: str) -> dict[str, nn.Parameter]:
    """The weights of linear layers that a pattern matches, by name: never biases, norms or embeddings.

    Raises:
        UserError: if there are none, or if some are no plain matrices.
    """
    where = run.where(technique, "params")
    layers = linear_weights(run.model)
    chosen = matching(pattern, list(layers), "weight of a linear layer", where)
    trained = trainable(run.model)
    for name in chosen:
        layer, weight = layers[name], trained[name]
        if any(phase == WEIGHT.index("expand") for phase, _ in getattr(layer, "on_weight", ())):
            raise UserError(
                f"`{name}` is a product of matrices, whose zeros would be lost.", where, "Drop one of both."
            )
        if is_traceable_wrapper_subclass(weight):
            raise UserError(f"`{name}` is split among machines, and masks are not.", where, "Drop one.")
    return {name: trained[name] for name in chosen}


def linear_weights(model: nn.Module) -> dict[str, nn.Module]:
    """Names of the trained weights of linear layers -> their layers. A weight that layers share counts once."""
    trained = trainable(model)
    tables = {id(m.weight) for m in model.modules()
              if not isinstance(m, Linear | nn.Linear) and isinstance(getattr(m, "weight", None), Tensor)}  # fmt: skip
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        name = f"{path}.weight".lstrip(".")
        if isinstance(module, Linear | nn.Linear) and name in trained and id(module.weight) not in tables:
            found[name] = module
    return found


def shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) by name."""
    return {name: (w.shape[0], w.shape[1]) for name, w in weights.items()}


def size(weights: Mapping[str, Tensor]) -> int:
    """How many weights there are."""
    return sum(w.numel() for w in weights.values())


def random_mask(shape: tuple[int, int], count: int, seed: int, name: str, device: torch.device) -> Tensor:
    """A mask of exactly `count` weights, drawn by (seed, name)."""
    mask = torch.zeros(shape[0] * shape[1], dtype=torch.bool)
    mask[torch.randperm(mask.numel(), generator=generator(seed, f"mask/{name}"))[:count]] = True
    return mask.view(shape).to(device)


def full(run: Run, technique: Technique, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The technique's memory, with a mask of everything for each weight."""
    memory = run.memory(technique)
    for name, w in weights.items():
        memory[name + MASK] = torch.ones_like(w, dtype=torch.bool)
    return memory


@torch.no_grad()
def apply(memory: Mapping[str, Tensor], weights: Mapping[str, nn.Parameter]) -> None:
    """Zero the pruned weights."""
    for name, w in weights.items():
        w.mul_(memory[name + MASK])


@torch.no_grad()
def mask_gradients(memory: Mapping[str, Tensor], weights: Mapping[str, nn.Parameter]) -> None:
    """Zero the gradients of pruned weights."""
    for name, w in weights.items():
        if w.grad is not None:
            w.grad.mul_(memory[name + MASK])


@torch.no_grad()
def mask_moments(run: Run, memory: Mapping[str, Tensor], weights: Mapping[str, nn.Parameter]) -> None:
    """Zero the moments of pruned weights, in every state that has a number a weight."""
    assert run.optimizer is not None
    states: dict[int, dict[str, Any]] = {id(p): s for part in parts(run.optimizer) for p, s in part.state.items()}
    whole: Any = getattr(run.optimizer, "whole", nullcontext)
    for name, w in weights.items():
        with whole(w):
            for value in states.get(id(w), {}).values():
                if isinstance(value, Tensor) and value.shape == w.shape:
                    value.mul_(memory[name + MASK])


def begun(state: State, run: Run, technique: Technique, weights: Mapping[str, nn.Parameter]) -> State:
    """What a run that begins with masks carries over: weights that are masked. A checkpoint's are already."""
    if f"memory.{run.order.key(technique)}" in state:
        return state
    memory = run.memory(technique)
    apply(memory, weights)
    if "model" not in state:
        return state
    given = {n: t * memory[n + MASK].to(t.device) if n in weights else t for n, t in state["model"].items()}
    return {**state, "model": given}


def masked_backward(
    backward: Backward, run: Run, technique: Technique, weights: Mapping[str, nn.Parameter],
    dense: Callable[[], bool] = lambda: False,
) -> Backward:  # fmt: skip
    """Backward, then zero the gradients of pruned weights.

    Args:
        dense: whether to leave them in this step.
    """
    memory = run.memory(technique)

    def masked(batch: Batch, count: Tensor) -> Tensor:
        loss = backward(batch, count)
        if not dense():
            mask_gradients(memory, weights)
        return loss

    return masked


def masked_step(step: Step, run: Run, technique: Technique, weights: Mapping[str, nn.Parameter]) -> Step:
    """Step, then zero the pruned weights. The density is reported from the first step on.

    What acts at another point than the weights may add to gradients that were masked, as looksam does with a direction
    that it remembers; they are masked again.
    """
    memory = run.memory(technique)
    moved = any("gradient point" in t.card.sets for t in run.order.techniques)
    told = False

    def masked() -> bool:
        nonlocal told
        if moved:
            mask_gradients(memory, weights)
        updated = step()
        if updated:
            apply(memory, weights)
        if not told:
            told = True
            report(run, technique, weights)
        return updated

    return masked


def masked_evaluate(
    evaluate: Evaluate, run: Run, technique: Technique, weights: Mapping[str, nn.Parameter]
) -> Evaluate:
    """Evaluate masked weights where averages stand in their place, which remember weights that are gone."""
    if not any(t.card.phase.get("evaluate") == "averaged" for t in run.order.slots["evaluate"]):
        return evaluate
    memory = run.memory(technique)

    def masked(job: Callable[[nn.Module], Any]) -> Any:
        kept = {name: w.data for name, w in weights.items()}
        try:
            for name, w in weights.items():
                w.data = w.data * memory[name + MASK]
            return evaluate(job)
        finally:
            for name, w in weights.items():
                w.data = kept[name]

    return masked


def masked_export(named: dict[str, Tensor], run: Run, technique: Technique) -> dict[str, Tensor]:
    """Exported weights are zero where the mask is, averages of weights that are gone included."""
    memory = run.memory(technique)
    return {n: t * memory[n + MASK] if n + MASK in memory else t for n, t in named.items()}


def report(run: Run, technique: Technique, weights: Mapping[str, nn.Parameter], **more: float) -> None:
    """Log the density over the prunable weights, and what is left of the dense model's products, in FLOPs.

    The seconds of a step tell by themselves that dense-stored masks save none.
    """
    memory, total = run.memory(technique), size(weights)
    left = sum(run.read(memory[name + MASK].sum(), worst=w.numel()) for name, w in weights.items())
    products = sum(layer.get_parameter("weight").numel() for layer in linear_weights(run.model).values())
    run.log(technique, density=left / total, flops=1 - (total - left) / products, **more)
