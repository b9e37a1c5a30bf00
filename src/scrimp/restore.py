"""What a run starts from: weights of a folder or of another run, and checkpoints that hold only a part."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from scrimp import checkpoint
from scrimp.agree import configured
from scrimp.errors import UserError
from scrimp.folder import RunFolder
from scrimp.weights import on_meta

if TYPE_CHECKING:
    from torch import Tensor

    from scrimp.recipe import Recipe
    from scrimp.technique import State


def starting_weights(recipe: Recipe, data: Any, start: str | None) -> State | None:
    """Weights of another run (`--from`) or of a Hugging Face folder (`model.from`), as the stage before the first.

    Raises:
        UserError: if a run that saves adapters only has nothing to read its frozen weights from again.
    """
    if start:
        _, origin, state, meta = RunFolder.reopen(start)
        given = dict(whole(origin, data, state, meta)["model"])
        return {"model": adopted(given, origin.model, configured(recipe, data), start)}
    source = getattr(recipe.model, "source", "")
    if source:
        from scrimp.models.hub import own_config, read_weights

        config = configured(recipe, data)
        given = own_config(source, config)
        return {"model": adopted(read_weights(source, given), given, config, source)}
    if recipe.checkpoint.adapter_only:
        fix = "Start from a folder (`model.from`) or a run (--from), or set it to false."
        raise UserError("the frozen weights could not be read again.", "checkpoint.adapter_only", fix)
    return None


def adopted(weights: dict[str, Tensor], given: Any, config: Any, where: str) -> dict[str, Tensor]:
    """A model's weights as another one with the same body takes them, such as a pre-trained one with a new head.

    Kinds of models name in `outer` what stands outside the body: what only one of the two has, or has in other shapes,
    is left out or begins anew, and is told on stderr. `adopt` of the options changes what depends on sizes, such as
    positions.

    Args:
        given: options of the model whose weights they are.
        config: options of the model that takes them.
        where: the run or folder, for what is told.
    """
    adopt = getattr(config, "adopt", None)
    weights = weights if adopt is None else adopt(weights)
    outer = (*getattr(given, "outer", ()), *getattr(config, "outer", ()))
    with on_meta(torch.float32):
        shapes = {name: p.shape for name, p in config.build().named_parameters()} if outer else {}
    left = [name for name, t in weights.items() if name.startswith(outer) and shapes.get(name) != t.shape]
    taken = {name: t for name, t in weights.items() if name not in left}
    anew = [name for name in shapes if name.startswith(outer) and name not in taken]
    for names, what in ((left, f"not taken over from {where}"), (anew, "begins anew")):
        parts = [f"{part}* ({n})" for part in dict.fromkeys(outer) if (n := sum(x.startswith(part) for x in names))]
        if parts:
            sys.stderr.write(f"scrimp: {what}: {', '.join(parts)}\n")
    return taken


def whole(recipe: Recipe, data: Any, state: State, meta: dict[str, Any]) -> State:
    """A checkpoint with the frozen weights that it left out.

    Raises:
        UserError: if they are not those that it was trained on, or are gone.
    """
    if not meta["partial"]:
        return state
    _same_base(recipe, meta)
    base = starting_weights(recipe, data, meta["from"])
    assert base is not None
    return {**state, "model": {**base["model"], **state["model"]}}


def base_of(recipe: Recipe, start: str | None) -> str:
    """What identifies the weights that checkpoints leave out: a hash of the files that hold them, or "" if none do.

    Raises:
        UserError: if a file cannot be read, or the run to start from is none.
    """
    source = getattr(recipe.model, "source", "")
    if not recipe.checkpoint.adapter_only or not (start or source):
        return ""
    if start:
        return checkpoint.identity(RunFolder.newest(start))
    from scrimp.data.cache import cache_folder, content_hash

    files = sorted(Path(source).glob("*.safetensors"))
    found = content_hash(files, cache_folder(getattr(recipe.data, "cache", ""), "weights"))
    named = "\n".join(f"{file.name} {value}" for file, value in zip(files, found, strict=True))
    return hashlib.sha256(named.encode()).hexdigest()


def _same_base(recipe: Recipe, meta: dict[str, Any]) -> None:
    """Check that the frozen weights are those a checkpoint was trained on.

    Raises:
        UserError: if they changed since, so that its adapters would be added to other weights.
    """
    where = meta["from"] or getattr(recipe.model, "source", "")
    if not Path(where).exists():
        raise UserError("the frozen weights that the run was trained on are gone.", where, "Bring them back.")
    if meta["base"] != base_of(recipe, meta["from"]):
        what = "the frozen weights are not those that the run was trained on: the files changed since."
        raise UserError(what, where, "Bring them back as they were, or train adapters on the new ones in a new run.")


def reopened(recipe: Recipe, meta: dict[str, Any]) -> Any:
    """The data that a run was trained on.

    Raises:
        UserError: if it is gone, or changed since.
    """
    found = getattr(recipe.data, "found", None)
    if found is not None and not found():
        fix = "Bring it back; `scrimp generate` and `scrimp export` do without it."
        raise UserError(f"the corpus at {recipe.data.source} is gone.", "data.source", fix)
    data = recipe.data.open()
    same_data(data, meta)
    return data


def used(folder: Path, recipe: Recipe, meta: dict[str, Any]) -> Any:
    """What using a run's model needs of its data: the tokenizer that its folder keeps, or else the data itself."""
    outline = getattr(recipe.data, "used", None)
    if outline is None or not (folder / "tokenizer.json").is_file():
        return reopened(recipe, meta)
    return outline(folder, meta["data"].get("tokens", {}))


def same_data(data: Any, meta: dict[str, Any]) -> None:
    """Check that a checkpoint's data is the data at hand.

    Raises:
        UserError: if the text or its tokens changed since, so that nothing would continue exactly.
    """
    now = fingerprint(data)
    if meta["data"] != now:
        fix = "Bring the text back as it was, or begin a new run with --from."
        raise UserError("the data is not what the run was trained on.", "data", fix)


def fingerprint(data: Any) -> Any:
    """What identifies an opened data set: its counts of tokens and documents, and its key in the cache."""
    meta = getattr(data, "meta", {})
    return {key: meta[key] for key in ("key", "tokens", "documents", "vocab") if key in meta}
