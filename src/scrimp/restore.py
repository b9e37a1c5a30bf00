"""What a run starts from: weights of a folder or of another run, and checkpoints that hold only a part."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from scrimp import checkpoint
from scrimp.agree import configured
from scrimp.errors import UserError
from scrimp.folder import RunFolder
from scrimp.models import hub_peft
from scrimp.models.hub_peft import is_adapter
from scrimp.weights import on_meta, renewable

if TYPE_CHECKING:
    from scrimp.recipe import Recipe
    from scrimp.technique import State

PLAIN: Final = re.compile(r"(head|pooler|head_project|head_transform\.\w+)\.(weight|bias)")
"""Names of the parameters of heads before any technique adds to them."""


def starting_weights(recipe: Recipe, data: Any, start: str | None) -> State | None:
    """Weights of another run (`--from`) or of a Hugging Face folder (`model.from`), as the stage before the first.

    With `--from` a folder of peft, its adapters are added to the weights of `model.from`.

    A head or pooler that they do not have, or have in other sizes, is left out: it begins anew (see `anew`).

    Raises:
        UserError: if a run that saves adapters only has nothing to read its frozen weights from again.
    """
    adapters = bool(start) and is_adapter(str(start))
    if start and not adapters:
        _, origin, state, meta = RunFolder.reopen(start)
        config = configured(recipe, data)
        weights = adopted(whole(origin, data, state, meta)["model"], origin.model, config)
        _same_architecture(weights, shapes(config), origin, recipe)
        return {"model": weights}
    source = getattr(recipe.model, "source", "")
    if source:
        from scrimp.models.hub import own_config, read_type, read_weights

        config = configured(recipe, data)
        given = own_config(source, config)
        weights = adopted(read_weights(source, given), given, config)
        if adapters:
            weights = hub_peft.read(str(start), read_type(source), config, recipe.techniques, weights)
        return {"model": weights}
    if adapters:
        fix = "Give the folder of the weights that they were trained on: `model: {from: FOLDER}`."
        raise UserError("adapters are nothing without their weights.", "--from", fix)
    if recipe.checkpoint.adapter_only:
        fix = "Start from a folder (`model.from`) or a run (--from), or set it to false."
        raise UserError("the frozen weights could not be read again.", "checkpoint.adapter_only", fix)
    return None


def adopted(weights: Mapping[str, Tensor], given: Any, config: Any) -> Mapping[str, Tensor]:
    """A model's weights as another one with the same body takes them: of other sizes where it can, without other heads.

    `adopt` of the options changes what depends on sizes, such as positions. A head that fits is kept, with what
    techniques added to it; one that does not, or that only the other model has, is left out with all that was added.

    Args:
        given: options of the model whose weights they are.
        config: options of the model that takes them.
    """
    adopt = getattr(config, "adopt", None)
    if adopt is not None:
        weights = adopt(dict(weights))
    own, fresh = shapes(config), renewable(config)
    left = tuple(
        part
        for part in fresh
        if any(name.startswith(part) and _shape(weights, name) != shape for name, shape in own.items())
    )
    if fresh:
        left += tuple(part for part in getattr(given, "outer", ()) if not any(name.startswith(part) for name in own))
    others = {name for name in weights if fresh and PLAIN.fullmatch(name) and name not in own}
    return {name: t for name, t in weights.items() if not name.startswith(left) and name not in others}


def _same_architecture(
    weights: Mapping[str, Tensor], own: Mapping[str, tuple[int, ...]], origin: Recipe, recipe: Recipe
) -> None:
    """Check that no technique of the run to start from took away what the model needs, and say which one did.

    Raises:
        UserError: if its norms were taken out, or its layers made narrower.
    """
    normless, slimming, keeping = (
        [t.name for t in techniques if kind in t.card.sets]
        for techniques, kind in ((origin.techniques, "normalization"), (origin.techniques, "width schedule"),
                                 (recipe.techniques, "normalization"))
    )  # fmt: skip
    lost = next((name for name in own if "norm" in name and name not in weights), None)
    if normless and lost is not None and not keeping:
        what = f"the run trained with `{normless[0]}`, which took out norms that this model has, such as `{lost}`."
        fix = f"Give the new recipe `{normless[0]}` too, or train from scratch."
        raise UserError(what, "--from", fix)
    for name, shape in own.items() if slimming else ():
        found = _shape(weights, name) or shape
        if found != shape:
            what = (f"`{slimming[0]}` has made the run's layers narrower than this model's: "
                    f"`{name}` is {list(found)} instead of {list(shape)}.")  # fmt: skip
            fix = "Start from what `scrimp export RUN` writes (model.from), which has zeros where it was cut."
            raise UserError(what, "--from", fix)


def _shape(weights: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(weights[name].shape) if name in weights else None


def shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """The parameters of a model before any technique changes it."""
    with on_meta(torch.float32):
        return {name: tuple(p.shape) for name, p in config.build().named_parameters()}


def anew(weights: Mapping[str, Tensor], recipe: Recipe, data: Any) -> list[str]:
    """The parts of the model that begin anew though the run starts from weights."""
    config = configured(recipe, data)
    fresh = renewable(config)
    absent = [name for name in shapes(config) if name not in weights and name.startswith(fresh)]
    return list(dict.fromkeys(part.rstrip(".") for name in absent for part in fresh if name.startswith(part)))


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
    if start and not is_adapter(start):
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
    said = meta["data"]
    more = {"labels": tuple(said["labels"])} if "labels" in said else {}
    return outline(folder, said.get("tokens", {}), **more)


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
    return {key: meta[key] for key in ("key", "tokens", "documents", "vocab", "labels") if key in meta}
