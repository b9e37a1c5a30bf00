"""What the formats with a file of their own share: faults of config.json, and names of activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NoReturn

from scrimp.errors import UserError, did_you_mean

ACTIVATIONS: Final = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu", "quick_gelu": "quick_gelu"}
"""Theirs -> ours."""
ALSO: Final = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_python": "gelu"}
"""Other names of theirs, which are read and not written."""


def required(raw: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    """Check that config.json says what it must.

    Raises:
        UserError: naming what is missing.
    """
    absent = [key for key in keys if raw.get(key) is None]
    if absent:
        raise UserError(f"does not say {', '.join(absent)}.", where, "Fetch the file that belongs to the weights.")
    if raw.get("quantization_config"):
        raise UserError("the weights are quantized.", where, "Use the folder of the model before quantization.")


def refuse(what: str, where: str) -> NoReturn:
    """Say what of a folder's model ours does not do.

    Raises:
        UserError: always.
    """
    raise UserError(f"{what}, which the model here does not do.", where)


def activation_from(name: Any, where: str) -> str:
    """Their activation by our name.

    Raises:
        UserError: if we have none.
    """
    known = ACTIVATIONS | ALSO
    if name not in known:
        raise UserError(f"the activation `{name}` is not known.", where, did_you_mean(str(name), known))
    return known[name]


def activation_to(name: str) -> str:
    """Our activation by their name.

    Raises:
        UserError: if they have none.
    """
    names = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    if name not in names:
        raise UserError(f"the folder cannot hold a model with `activation: {name}`.", "model.activation")
    return names[name]
