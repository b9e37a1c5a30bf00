"""What a Hugging Face folder of each `model_type` holds: which model, how it says its options, and its tensors.

The families of language models are told apart in `hub_config` and `hub_names`; others have a file of their own with a
`FORMAT`, which is imported when it is needed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from torch import Tensor

from scrimp.errors import UserError, did_you_mean
from scrimp.models import hub_config, hub_names

Weights = dict[str, Tensor]
OWN_FILE: Final = {
    "bart": ("encoder_decoder", "scrimp.models.hub_bart"),
    "clip": ("two_towers", "scrimp.models.hub_clip"),
}
"""model_type -> the model's name in recipes, and the module with its `FORMAT`."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """One model_type."""

    root: str = ""
    """Prefix of their tensors that folders of base models leave out."""
    options_from: Callable[[Mapping[str, Any], str], dict[str, Any]]
    """(config.json, its path for errors) -> our options."""
    options_to: Callable[[Any], dict[str, Any]]
    """Our options -> config.json; raises `UserError` for what it cannot say."""
    tensors: Callable[[Any], dict[str, tuple[int, ...]]]
    """Our options -> their names and shapes."""
    read: Callable[[Weights, Any], Weights]
    """(their tensors, our options) -> our tensors."""
    write: Callable[[Weights, Any], Weights]
    """(our tensors, our options) -> their tensors."""
    copies: Callable[[Any], tuple[str, ...]] = lambda config: ()
    """Their tensors that may be there and must equal our embedding."""
    zeros: tuple[str, ...] = ()
    """Their tensors that may be there and must be zero."""
    special: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    """Where else in config.json the ids of special tokens stand: section, or "" for its top, -> keys for the end."""
    ends: bool = False
    """Whether the model sees the end token after a text; otherwise before it."""


def known() -> list[str]:
    """Every model_type."""
    return [*hub_names.FAMILIES, *OWN_FILE]


def kind_of(model_type: str) -> str:
    """The name of the model in recipes."""
    return OWN_FILE[model_type][0] if model_type in OWN_FILE else "transformer"


def format_of(model_type: str) -> Format:
    """The format of a model_type, which must be one of `known`."""
    if model_type in OWN_FILE:
        return importlib.import_module(OWN_FILE[model_type][1]).FORMAT
    names = hub_names.FAMILIES[model_type]
    return Format(
        root=names.root,
        options_from=partial(hub_config.options_from, model_type),
        options_to=partial(hub_config.options_to, model_type),
        tensors=partial(hub_names.tensors, model_type),
        read=names.read,
        write=names.write,
        copies=lambda config: ("lm_head.weight",) if config.tied else (),
    )


def choose(kind: str, config: Any, wished: str = "") -> str:
    """The model_type that can hold a model.

    Args:
        kind: the model's name in recipes.
        wished: the one that is wanted, or empty.
    Raises:
        UserError: if there is none, or the wished one cannot.
    """
    if wished and wished not in known():
        raise UserError(f"there is no family `{wished}`.", "family", did_you_mean(wished, known()))
    fitting = [model_type for model_type, (own, _) in OWN_FILE.items() if own == kind]
    if kind == "transformer" and wished not in OWN_FILE:
        return hub_config.family_of(config, wished)
    if not fitting or wished not in ("", *fitting):
        fix = f"Use {fitting[0]}." if fitting else ""
        raise UserError(f"no folder of {wished or 'Hugging Face'} can hold the model `{kind}`.", "family", fix)
    return wished or fitting[0]
