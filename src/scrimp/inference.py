"""What is done with a trained run: evaluate, generate, export."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from scrimp.agree import configured, prepared
from scrimp.clock import Clock
from scrimp.data.pixels import Pixels
from scrimp.errors import RecipeError, UserError
from scrimp.folder import RunFolder
from scrimp.models.seams import matches
from scrimp.plain import to_device
from scrimp.products import fast_products
from scrimp.reading import override, plain, validated
from scrimp.restore import reopened, used, whole
from scrimp.run import Run, build, exported

if TYPE_CHECKING:
    from scrimp.technique import Batch, Technique


def open_run(place: str | Path, corpus: bool = True) -> Run:
    """A trained run, built from its checkpoint as training would resume it.

    Args:
        place: a run's folder, or one of its checkpoints.
        corpus: whether the data are needed; without, the run's windows are zeros.
    Raises:
        UserError: if something it needs is gone, damaged, or changed since it was trained.
    """
    folder, recipe, state, meta = RunFolder.reopen(place)
    data = reopened(recipe, meta) if corpus else used(folder.path, recipe, meta)
    state = whole(recipe, data, state, meta)
    return build(recipe, data, Clock(**meta["clock"]), last=state, decisions=meta["decisions"])


def evaluate(place: str | Path, batches: int = 0, data: Sequence[str] = ()) -> dict[str, float]:
    """The task's metrics on the run's held-out data, or on all of other data.

    Args:
        batches: how many batches; 0 for all of it.
        data: a path, and `key=value` words that change settings of the run's data. The tokenizer and the names of
            classes stay the run's, unless they are among them.
    Raises:
        UserError: if the data do not fit the run's model and task.
    """
    run = open_run(place, corpus=not data)
    task, splits = run.task, [run.data.validation]
    if data:
        other = replace(run.recipe, data=elsewhere(run, Path(place), data), model=configured(run.recipe, run.data))
        opened = other.data.open()
        configured(other, opened)
        task, splits = prepared(other, opened), [opened.train, opened.validation]
    assert run.evaluate is not None
    with fast_products():
        return run.evaluate(lambda model: task.evaluate(model, _parts(run, task, splits, batches)))


def _parts(run: Run, task: Any, splits: Sequence[Any], batches: int) -> Iterator[Batch]:
    """The first batches of some splits."""
    size, left = run.recipe.batch, batches
    for split in splits:
        for first in range(0, len(split), size):
            span = np.arange(first, min(first + size, len(split)))
            yield to_device(task.batch(split.read(span), span), run.device)
            left -= 1
            if left == 0:
                return


def elsewhere(run: Run, place: Path, words: Sequence[str]) -> Any:
    """The settings of a run's data, changed so that they are of other data.

    Raises:
        RecipeError: with every word that is no setting, or of another type.
    """
    settings: Any = run.recipe.data
    known = {f.name for f in fields(settings)}
    kept = RunFolder.newest(place).parent.parent / "tokenizer.json"
    given: dict[str, Any] = {}
    if "tokenizer" in known and kept.is_file() and settings.tokenizer != "bytes":
        given["tokenizer"] = str(kept)
    if "labels" in known and getattr(run.data, "labels", ()):
        given["labels"] = list(run.data.labels)
    # Images are seen as those of the training were: of the same size, and normalized by the same numbers.
    if isinstance(run.data.train, Pixels):
        given |= {name: plain(getattr(run.data.train, name)) for name in ("image", "channels", "mean", "std")}
    for word in words:
        if "=" not in word:
            given |= {"source": word} | ({"validation": ""} if "validation" in known else {})
    changes = [word for word in words if "=" in word]
    values, faults = override({"data": plain(settings) | given}, [f"data.{word}" for word in changes])
    found = validated(type(settings), values["data"], "--data", faults)
    if faults:
        raise RecipeError(faults)
    return found


def continue_text(place: str | Path, prompt: str, tokens: int, temperature: float, seed: int) -> str:
    """The prompt and what the model adds to it; of an encoder-decoder, what it writes of the prompt.

    Raises:
        UserError: if the model does not write.
    """
    from scrimp.models.generate import written

    run = open_run(place, corpus=False)
    chance = torch.Generator(run.device).manual_seed(seed)
    tokenizer = run.data.tokenizer
    assert run.evaluate is not None
    if tokenizer is None:
        raise UserError("the run was not trained on text, and writes none.", str(place), "`scrimp eval` measures it.")
    with fast_products():
        text = run.evaluate(lambda model: written(model, tokenizer, prompt, tokens, temperature, chance))
    if text is None:
        raise UserError("the model writes no text.", str(place), "Use a run of a decoder or an encoder-decoder.")
    return text


def export(place: str | Path, out: str | Path) -> Path:
    """Write a run as a Hugging Face folder, with what techniques added merged or removed.

    Raises:
        UserError: if a technique took the norms out, which every format has.
    """
    from scrimp.models.hub import write

    run = open_run(place, corpus=False)
    normless = [t.name for t in run.order.techniques if "normalization" in t.card.sets]
    if normless:
        what = f"`{normless[0]}` takes the norms out of the model, and no format of other libraries can say that."
        raise UserError(what, str(place), "Use the run itself (`scrimp eval`, `scrimp generate`, `--from`).")
    merged = exported(run)
    added = sorted(t.name for t in run.order.techniques if t.trained and matched(t, set(merged) - run.base))
    if added:
        what = f"`{added[0]}` added layers to the model that do not merge: a Hugging Face folder lacks them."
        raise UserError(what, str(place), "Use the run itself (`scrimp eval`, `scrimp generate`, `--from`).")
    prepares = getattr(run.data, "processor", None) or run.data.tokenizer
    labels = getattr(run.data, "labels", ())
    write(out, configured(run.recipe, run.data), merged, prepares, labels=labels)
    return Path(out)


def matched(technique: Technique, names: Iterable[str]) -> bool:
    """Whether some of these parameters are a technique's own."""
    return any(matches(pattern, name) for name in names for pattern in technique.trained)


def export_adapters(place: str | Path, out: str | Path) -> Path:
    """Write what a run trained beside frozen weights as a folder that peft loads.

    Raises:
        UserError: if peft has no such adapters, or the frozen weights are in no folder.
    """
    from scrimp.models import hub, hub_peft

    run = open_run(place, corpus=False)
    source = getattr(run.recipe.model, "source", "")
    start = RunFolder.reopen(place)[3]["from"]
    if not source or (start and not hub_peft.is_adapter(start)):
        fix = "Export the run it started from, and train with `model: {from: FOLDER}`; or use `--to hf`, which merges."
        raise UserError("adapters need a folder of the weights that they stand on.", str(place), fix)
    config = configured(run.recipe, run.data)
    hub_peft.write(out, source, hub.read_type(source), config, run.order.techniques, run.model)
    return Path(out)
