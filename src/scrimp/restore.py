"""What a run starts from: weights of a folder or of another run, and checkpoints that hold only a part."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scrimp.errors import UserError
from scrimp.folder import RunFolder
from scrimp.run import configured

if TYPE_CHECKING:
    from scrimp.recipe import Recipe
    from scrimp.technique import State


def starting_weights(recipe: Recipe, data: Any, start: str | None) -> State | None:
    """Weights of another run (`--from`) or of a Hugging Face folder (`model.from`), as the stage before the first.

    Raises:
        UserError: if a run that saves adapters only has nothing to read its frozen weights from again.
    """
    if start:
        _, origin, state, meta = RunFolder.reopen(start)
        return {"model": whole(origin, data, state, meta)["model"]}
    source = getattr(recipe.model, "source", "")
    if source:
        from scrimp.models.hub import read_weights

        return {"model": read_weights(source, configured(recipe, data))}
    if recipe.checkpoint.adapter_only:
        fix = "Start from a folder (`model.from`) or a run (--from), or set it to false."
        raise UserError("the frozen weights could not be read again.", "checkpoint.adapter_only", fix)
    return None


def whole(recipe: Recipe, data: Any, state: State, meta: dict[str, Any]) -> State:
    """A checkpoint with the frozen weights that it left out."""
    if not meta["partial"]:
        return state
    base = starting_weights(recipe, data, meta["from"])
    assert base is not None
    return {**state, "model": {**base["model"], **state["model"]}}


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
