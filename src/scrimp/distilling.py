# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Logits of a larger model as soft targets: a teacher that owns no tensors, and the divergence from it."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from scrimp.errors import UserError


class Teacher(nn.Module):
    """A model on meta tensors that computes with a table of weights; it registers none as its own.

    Args:
        model: on meta.
        weights: its parameters by name, looked up in every call.
        prefix: of their names in the table.
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor], prefix: str) -> None:
        super().__init__()
        self.__dict__["model"], self.weights, self.prefix = model.eval(), weights, prefix
        self.config = getattr(model, "config", None)

    def forward(self, *args: Any, **options: Any) -> Any:
        start = len(self.prefix)
        own = {name[start:]: t for name, t in self.weights.items() if name.startswith(self.prefix)}
        return functional_call(self.__dict__["model"], own, args, options)


@contextmanager
def watched(model: nn.Module, where: str) -> Generator[dict[str, Tensor]]:
    """What a model's head gives while it is called inside: `logits`, and the `targets` that its loss gets.

    Raises:
        UserError: if the model has no head.
    """
    seen: dict[str, Tensor] = {}
    head, loss = (getattr(model, name, None) for name in ("head", "head_loss"))
    if not isinstance(head, nn.Module):
        raise UserError("the model has no head whose logits could be learned from.", where, "Leave it at 0.")

    def keep_logits(module: nn.Module, inputs: Any, output: Tensor) -> None:
        seen["logits"] = output.flatten(0, -2)

    def keep_targets(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen["targets"] = inputs[2].flatten()

    hooks = [head.register_forward_hook(keep_logits)]
    if isinstance(loss, nn.Module):
        hooks.append(loss.register_forward_pre_hook(keep_targets))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def divergence(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], where: str) -> Tensor:
    """KL(teacher || student), summed over rows whose targets count.

    Raises:
        UserError: if the logits were never computed.
    """
    if "logits" not in student:
        refuse_joined_head(where)
    wanted = F.log_softmax(teacher["logits"].float(), -1)
    rows = F.kl_div(F.log_softmax(student["logits"].float(), -1), wanted, reduction="none", log_target=True).sum(-1)
    return (rows * (student["targets"] != -100)).sum() if "targets" in student else rows.sum()


def refuse_joined_head(where: str) -> NoReturn:
    """Say that there are no logits to compare.

    Raises:
        UserError: always.
    """
    what = "the head's logits are never computed: another technique joins head and loss."
    raise UserError(what, where, "Drop it (fused_loss), or leave this at 0.")
