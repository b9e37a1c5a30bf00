"""What a Hugging Face folder of each `model_type` holds: which model, how it says its options, and its tensors.

The families of decoders are told apart in `hub_config` and `hub_names`; others have a file of their own with their
`FORMATS`, which is imported when it is needed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from scrimp.errors import UserError, did_you_mean
from scrimp.models import hub_config, hub_names
from scrimp.models.hub_tokenizer import for_decoder

Weights = dict[str, Tensor]
OWN_FILE: Final = {
    "bert": ("transformer", "hub_bert"),
    "roberta": ("transformer", "hub_bert"),
    "xlm-roberta": ("transformer", "hub_bert"),
    "vit": ("vision", "hub_vit"),
    "vit_mae": ("masked_autoencoder", "hub_vit"),
    "bart": ("encoder_decoder", "hub_bart"),
    "clip": ("two_towers", "hub_clip"),
}
"""model_type -> the model's name in recipes, and the module with its `FORMATS`."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """One model_type."""

    root: str = ""
    """Prefix of their tensors that folders of base models leave out."""
    options_from: Callable[[Mapping[str, Any], str], dict[str, Any]]
    """(config.json, its path for errors) -> our options."""
    options_to: Callable[[Any, Sequence[str]], dict[str, Any]]
    """(our options, names of a classifier's classes) -> config.json; raises `UserError` for what it cannot say."""
    head_from: Callable[[Mapping[str, Any], Sequence[str]], dict[str, Any]] = lambda raw, names: {}
    """(config.json, names of the folder's tensors) -> options of its head, where a task may choose another."""
    tensors: Callable[[Any], dict[str, tuple[int, ...]]]
    """Our options -> their names and shapes."""
    spelled: Callable[[str, Iterable[str]], str] = lambda name, held: name
    """(a tensor's name, names of the folder's tensors) -> its name there, where versions differ."""
    read: Callable[[Weights, Any], Weights]
    """(their tensors, our options) -> our tensors."""
    write: Callable[[Weights, Any], Weights]
    """(our tensors, our options) -> their tensors."""
    copies: Callable[[Any], tuple[str, ...]] = lambda config: ()
    """Their tensors that may be there and must equal our embedding."""
    zeros: tuple[str, ...] = ()
    """Their tensors that may be there and must be zero."""
    heads: tuple[str, ...] = ()
    """Prefixes of the tensors that belong to some head, and are left out when it is not the one asked for."""
    reshaped: bool = False
    """Whether the weights are read by the folder's own options, as the model that takes them may have others."""
    inputs: Callable[[Path, Any, Any, Mapping[str, Any]], dict[str, Any]]
    """(folder, our options, tokenizer or what prepares images, config.json) -> what more config.json says of them; it
    writes their files."""


def known() -> list[str]:
    """Every model_type."""
    return [*hub_names.FAMILIES, *OWN_FILE]


def kind_of(model_type: str) -> str:
    """The name of the model in recipes."""
    return OWN_FILE[model_type][0] if model_type in OWN_FILE else "transformer"


def format_of(model_type: str) -> Format:
    """The format of a model_type, which must be one of `known`."""
    if model_type in OWN_FILE:
        return importlib.import_module(f"scrimp.models.{OWN_FILE[model_type][1]}").FORMATS[model_type]
    names = hub_names.FAMILIES[model_type]
    return Format(
        root=names.root,
        options_from=partial(hub_config.options_from, model_type),
        options_to=lambda config, labels: hub_config.options_to(model_type, config),
        tensors=partial(hub_names.tensors, model_type),
        read=names.read,
        write=names.write,
        copies=lambda config: ("lm_head.weight",) if config.tied else (),
        inputs=for_decoder,
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
    if kind == "transformer" and kind_of(wished) == kind:
        from scrimp.models import hub_bert

        return (hub_bert if hub_bert.holds(config) else hub_config).family_of(config, wished)
    fitting = [model_type for model_type, (own, _) in OWN_FILE.items() if own == kind]
    if not fitting or wished not in ("", *fitting):
        fix = f"Use {fitting[0]}." if fitting else ""
        raise UserError(f"no folder of {wished or 'Hugging Face'} can hold the model `{kind}`.", "family", fix)
    return wished or fitting[0]
