# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Parameter groups: each trainable parameter in exactly one, with its rule and its multipliers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from scrimp.errors import UserError
from scrimp.models.seams import matching
from scrimp.sharding import like, sharded


@dataclass(frozen=True)
class Multipliers:
    """Factors of a pattern's learning rate and weight decay; absolute values stay with the update rule."""

    lr: float = 1.0
    decay: float = 1.0

    def times(self, other: Multipliers) -> Multipliers:
        """Both at once. Patterns multiply, so that their order does not matter."""
        return Multipliers(self.lr * other.lr, self.decay * other.decay)


@dataclass(frozen=True)
class Group:
    """Parameters that share multipliers, by name."""

    params: dict[str, nn.Parameter]
    lr: float
    decay: float


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require gradients, by name, shared ones once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def assign(
    names: Mapping[str, nn.Parameter], table: Mapping[str, Multipliers], elsewhere: Collection[str] = ()
) -> list[Group]:
    """Partition parameters by the product of the multipliers of all patterns that match them.

    Vectors (biases, norms, scales) start with a decay of 0, as is usual for Transformers.

    Args:
        elsewhere: names that other ranks hold, which patterns may be meant for.
    Raises:
        UserError: if a pattern matches no parameter.
    """
    found = {name: Multipliers(decay=float(p.ndim > 1)) for name, p in names.items()}
    for pattern, factor in table.items():
        for name in matching(pattern, [*names, *elsewhere], "trainable parameter", "groups"):
            if name in found:
                found[name] = found[name].times(factor)
    groups: dict[Multipliers, dict[str, nn.Parameter]] = {}
    for name, factor in found.items():
        groups.setdefault(factor, {})[name] = names[name]
    return [Group(params, factor.lr, factor.decay) for factor, params in groups.items()]


def partition(
    names: Mapping[str, nn.Parameter], scopes: Mapping[str, str], elsewhere: Collection[str] = ()
) -> dict[str, dict[str, nn.Parameter]]:
    """Which update rule owns which parameter.

    Args:
        scopes: rule -> its pattern; `*` takes what no other rule names.
        elsewhere: names that other ranks hold, of which a rule may own all.
    Raises:
        UserError: if two patterns overlap, a rule gets nothing, or parameters are left over.
    """
    owner: dict[str, str] = {}
    for rule, pattern in scopes.items():
        if pattern == "*":
            continue
        for name in matching(pattern, [*names, *elsewhere], "trainable parameter", f"techniques.{rule}"):
            if name in owner:
                what = f"`{name}` is claimed by `{owner[name]}` and by `{rule}`."
                raise UserError(what, f"techniques.{rule}", "Make the patterns disjoint.")
            owner[name] = rule
    rest = next((rule for rule, pattern in scopes.items() if pattern == "*"), None)
    left = [name for name in names if name not in owner]
    if left and rest is None:
        raise UserError(f"no update rule takes `{left[0]}`.", "techniques", "Give one rule the pattern `*`.")
    if rest is not None and not left and not elsewhere:
        what = f"the other update rules leave `{rest}` no parameter."
        raise UserError(what, f"techniques.{rest}", "Drop it, or narrow their patterns.")
    return {r: {n: p for n, p in names.items() if owner.get(n, rest) == r} for r in scopes}


def param_groups(groups: Sequence[Group], lr: float, weight_decay: float, **more: Any) -> list[dict[str, Any]]:
    """Groups as torch's optimizers take them. `base_lr` is what schedules multiply."""
    return [
        {
            "params": list(g.params.values()),
            "lr": lr * g.lr,
            "base_lr": lr * g.lr,
            "weight_decay": weight_decay * g.decay,
        }
        | more
        for g in groups
        if g.params
    ]


class Several(Optimizer):
    """Several update rules as one optimizer, over their own groups. Each part keeps its state itself.

    Args:
        parts: optimizers over disjoint parameters.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self.parts = list(parts)
        # A rank may hold nothing that is trained, and torch wants a group.
        super().__init__([group for part in parts for group in part.param_groups] or [{"params": []}], {})
        self.param_groups = [group for part in parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step each part."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


def moments(optimizer: Optimizer, names: Mapping[str, nn.Parameter]) -> dict[str, dict[str, Tensor]]:
    """The optimizer's state as `{"optimizer.<moment>": {parameter's name: tensor}}`.

    Raises:
        TypeError: if a rule keeps something other than tensors.
    """
    by_id = {id(p): name for name, p in names.items()}
    kinds: dict[str, dict[str, Tensor]] = {}
    for part in parts(optimizer):
        for p, state in part.state.items():
            for moment, value in state.items():
                if not isinstance(value, Tensor):
                    raise TypeError(f"{type(part).__name__} keeps a {type(value).__name__} called `{moment}`.")
                kinds.setdefault(f"optimizer.{moment}", {})[by_id[id(p)]] = value
    return kinds


def load_moments(
    optimizer: Optimizer, names: Mapping[str, nn.Parameter], kinds: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Put moments back, exactly.

    Raises:
        UserError: if a moment belongs to no parameter of the optimizer.
    """
    owner = {id(p): (part, g) for part in parts(optimizer) for g in part.param_groups for p in g["params"]}
    others = {id(p) for g in optimizer.param_groups for p in g["params"]} - owner.keys()
    for kind, tensors in kinds.items():
        moment = kind.removeprefix("optimizer.")
        for name, value in tensors.items():
            if name in names and id(names[name]) in others:
                continue  # Another rank updates it, and keeps its moments.
            if name not in names or id(names[name]) not in owner:
                raise UserError(f"the checkpoint has `{kind}` of `{name}`, which is not trained here.", "checkpoint")
            p = names[name]
            part, group = owner[id(p)]
            # As torch places them: counters stay on the host unless a fused kernel reads them on the device.
            host = moment == "step" and not (group.get("fused") or group.get("capturable"))
            place = "cpu" if host else p.device
            part.state[p][moment] = like(p, value) if sharded(p) else value.to(place, copy=True)


def other_than_sgd(optimizer: Optimizer) -> str:
    """Names of the rules inside an optimizer that are not SGD, in words; empty where all are."""
    return " and ".join(sorted({type(p).__name__ for p in parts(optimizer) if not isinstance(p, torch.optim.SGD)}))


def parts(optimizer: Optimizer) -> list[Optimizer]:
    """The rules inside an optimizer."""
    inside: Sequence[Optimizer] = getattr(optimizer, "parts", ())
    return [rule for part in inside for rule in parts(part)] or [optimizer]
