"""Folders of the library peft in and out: adapter_config.json and adapter_model.safetensors, without importing peft.

Each kind of adapter has a file, `KINDS`, with two functions:

    write(trained)  -> (what adapter_config.json says, their tensors)
    read(folder)    -> our tensors; takes out of `folder.held` what it has read

A layer that is one here and three there, such as q, k and v, is split by its rows: `Names.places` says which rows of
ours are which of their modules.
"""

from __future__ import annotations

import importlib
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scrimp.checkpoint import save_tensors
from scrimp.errors import UserError
from scrimp.models.hub_files import read_json, replace_folder, write_json
from scrimp.models.hub_formats import Format, format_of
from scrimp.models.seams import matches

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
VECTORS: Final = "prompt_embeddings"
"""The tensor of prompts and prefixes, which stands in no module."""
KINDS: Final = {
    "LORA": ("lora", "hub_peft_lora"),
    "IA3": ("ia3", "hub_peft_ia3"),
    "PROMPT_TUNING": ("prompt", "hub_peft_prompts"),
    "P_TUNING": ("prompt", "hub_peft_prompts"),
    "PREFIX_TUNING": ("prefix", "hub_peft_prompts"),
}
"""`peft_type` -> the technique, whose first one here is written, and the module that writes and reads it."""
TASKS: Final = {"lm": "CAUSAL_LM", "": "CAUSAL_LM", "classes": "SEQ_CLS"}
"""Head -> their task, where they have one."""


@dataclass(frozen=True)
class Names:
    """What a Hugging Face family calls the linear layers of a model.

    Attributes:
        model_type: the family.
        config: our options of the model.
        layers: shapes [outputs, inputs] of our linear layers, by name.
    """

    model_type: str
    form: Format
    config: Any
    layers: Mapping[str, tuple[int, int]]

    @classmethod
    def of(cls, model_type: str, config: Any) -> Names:
        """Of a model."""
        with torch.device("meta"):
            shapes = {name: tuple(p.shape) for name, p in config.build().named_parameters()}
        layers = {
            name.removesuffix(".weight"): (shape[0], shape[1])
            for name, shape in shapes.items()
            if name.startswith(("blocks.", "encoder.", "decoder.")) and name.endswith(".weight") and len(shape) == 2
        }
        return cls(model_type, format_of(model_type), config, {n: s for n, s in layers.items() if "positions" not in n})

    def places(self, layer: str) -> dict[str, Tensor]:
        """Their modules that one of our layers is, and which of our outputs each has: int64 [outputs]."""
        # A bias is written without being transposed, and tells where its numbers went.
        rows = torch.arange(self.layers[layer][0])
        return {
            name.removesuffix(".bias"): t for name, t in self.form.write({f"{layer}.bias": rows}, self.config).items()
        }

    def short(self, chosen: Sequence[str]) -> list[str]:
        """Their modules by their endings, where these name no others, and else in full."""
        every = [theirs for layer in self.layers for theirs in self.places(layer)]
        ends = {name: re.sub(r"^.*\.\d+\.", "", name) for name in chosen}
        wanted = set(chosen)
        exact = {end for end in ends.values() if {n for n in every if n.endswith(f".{end}")} <= wanted}
        return list(dict.fromkeys(end if (end := ends[name]) in exact else name for name in chosen))


@dataclass(frozen=True)
class Trained:
    """What is written: a trained model, and the techniques of one kind that added to it."""

    techniques: Sequence[Any]
    model: Any
    names: Names

    def weights(self) -> dict[str, Tensor]:
        """Of the model, by our names."""
        return {name: p.detach() for name, p in self.model.named_parameters()}


@dataclass(frozen=True)
class Folder:
    """What is read: a folder's settings and tensors, for techniques of a recipe on frozen weights."""

    raw: Mapping[str, Any]
    held: dict[str, Tensor]
    techniques: Sequence[Any]
    base: Mapping[str, Tensor]
    names: Names


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder is one of peft."""
    return (Path(folder) / CONFIG).is_file()


def write(folder: str | Path, base: str, model_type: str, config: Any, techniques: Sequence[Any], model: Any) -> None:
    """Write the adapters of a trained model; an earlier export is replaced.

    Args:
        base: folder of the frozen weights, of that `model_type`.
        techniques: of the run.
        model: trained, with what techniques added to it.
    Raises:
        UserError: if there is no adapter that peft knows, or something else was trained beside it.
    """
    folder, names = Path(folder).resolve(), Names.of(model_type, config)
    known = dict.fromkeys(own for own, _ in KINDS.values())
    kinds = {t.name for t in techniques if t.trained}
    if len(kinds) != 1 or not kinds <= known.keys():
        what = f"a peft folder holds one of {', '.join(known)}, and the run trains {', '.join(sorted(kinds)) or 'all'}."
        raise UserError(what, "--to", "Use `--to hf`, which merges what can be merged.")
    mine = [t for t in techniques if t.name in kinds]
    kind, file = next((kind, file) for kind, (own, file) in KINDS.items() if own in kinds)
    raw, tensors = importlib.import_module(f"scrimp.models.{file}").write(Trained(mine, model, names))
    heads, saved = _heads(mine, model, names)
    raw = {
        "peft_type": kind, "base_model_name_or_path": base, "task_type": TASKS.get(getattr(config, "head", "-")),
        "inference_mode": True, "modules_to_save": saved or None, **raw,
    }  # fmt: skip
    partial = folder.parent / f".partial-{folder.name}"
    refuse_others(folder)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        root = _prefix(tensors)
        whole = {n if n == VECTORS else root + n: t.clone().contiguous() for n, t in (tensors | heads).items()}
        save_tensors(whole, partial / WEIGHTS, {"format": "pt"})
        write_json(partial / CONFIG, raw)
        replace_folder(folder, partial)
    except (OSError, SafetensorError) as error:
        fix = "Free some space or choose another folder."
        raise UserError(f"cannot be written: {error}.", str(folder), fix) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _prefix(tensors: Iterable[str]) -> str:
    """What their file says before the name of each tensor of a model: adapters are inside of one module more."""
    return "base_model." if VECTORS in tensors else "base_model.model."


def _heads(techniques: Sequence[Any], model: Any, names: Names) -> tuple[dict[str, Tensor], list[str]]:
    """What a task trained beside the adapters: their tensors, and the modules to save, each of them whole."""
    named = {n: p.detach() for n, p in model.named_parameters()}
    adapters = [pattern for t in techniques for pattern in t.trained]
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    own = {n.rpartition(".")[0] for n in trained if not any(matches(pattern, n) for pattern in adapters)}
    heads = names.form.write({n: t for n, t in named.items() if n.rpartition(".")[0] in own}, names.config)
    modules = {n.rpartition(".")[0] for n in heads}
    saved = sorted(n for n in modules if not any(n.startswith(f"{other}.") for other in modules))
    inside = tuple(f"{module}." for module in saved)
    copies = {theirs: named[ours] for theirs, ours in _copies(names).items() if theirs.startswith(inside)}
    return heads | copies, saved


def _copies(names: Names) -> dict[str, str]:
    """What their head holds once more, by our names: a module is saved whole, with what it shares."""
    weights = dict.fromkeys(names.form.copies(names.config), "embed.weight")
    biases = {theirs.removesuffix("weight") + "bias": "head.bias" for theirs in weights}
    return weights | (biases if getattr(names.config, "head", "") == "mlm" else {})


def refuse_others(folder: Path) -> None:
    """Only an empty folder, or one that holds adapters alone, may be replaced."""
    found = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    others = sorted(set(found) - {CONFIG, WEIGHTS})
    if others or folder.is_file():
        raise UserError(f"holds what scrimp did not write: {', '.join(others[:6])}.", str(folder), "Choose another.")


def read(
    folder: str | Path, model_type: str, config: Any, techniques: Sequence[Any], base: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Weights and the adapters of a folder, under our names.

    Args:
        techniques: of the recipe, whose settings must be the folder's.
        base: the frozen weights, under our names.
    Raises:
        UserError: if the recipe lacks the technique, its settings are others, or a tensor has no place here.
    """
    folder = Path(folder)
    raw, names = read_json(folder / CONFIG), Names.of(model_type, config)
    name, file = KINDS.get(str(raw.get("peft_type")), ("", ""))
    if not name:
        raise UserError(f"adapters of type {raw.get('peft_type')} cannot be read.", str(folder / CONFIG))
    mine = [t for t in techniques if t.name == name]
    if not mine:
        raise UserError(f"the folder holds `{name}`, which the recipe lacks.", str(folder), f"Add `{name}`.")
    held = _held(folder / WEIGHTS, names.form.root)
    ours = importlib.import_module(f"scrimp.models.{file}").read(Folder(raw, held, mine, base, names))
    heads = {n: held.pop(n) for n in names.form.tensors(config) if n in held}
    for copy in _copies(names):
        held.pop(copy, None)
    if held:
        what = f"has what `{name}` has no place for: {', '.join(list(held)[:6])}."
        raise UserError(what, str(folder / WEIGHTS))
    return {**base, **names.form.read(heads, config), **ours}


def _held(path: Path, root: str) -> dict[str, Tensor]:
    """A file's tensors by their names in a model with a head: those of a base model lack its root."""
    if not path.is_file():
        raise UserError(f"{path.name} is missing.", str(path.parent), "Fetch the whole folder.")
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            found = {key.removeprefix(_prefix(keys)): file.get_tensor(key) for key in keys}
    except SafetensorError as error:
        raise UserError(f"is not a safetensors file: {error}.", str(path), "Fetch it again.") from None
    rooted = not root or VECTORS in found or any(name.startswith(root) for name in found)
    return found if rooted else {root + name: t for name, t in found.items()}


def agreed(values: Mapping[str, Any], what: str) -> Any:
    """The one value that several techniques have of a setting.

    Raises:
        UserError: if they differ.
    """
    found = set(values.values())
    if len(found) > 1:
        raise UserError(f"a peft folder has one `{what}` for all layers.", "--to", "Train them alike.")
    return found.pop()
