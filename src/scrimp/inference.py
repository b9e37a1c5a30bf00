"""What is done with a trained run: evaluate, generate, export."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from scrimp.agree import configured
from scrimp.clock import Clock
from scrimp.errors import UserError
from scrimp.folder import RunFolder
from scrimp.plain import to_device
from scrimp.products import fast_products
from scrimp.restore import reopened, used, whole
from scrimp.run import Run, build, exported


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


def evaluate(place: str | Path, batches: int = 0) -> dict[str, float]:
    """The task's metrics on held-out data.

    Args:
        batches: how many batches; 0 for all of it.
    """
    run = open_run(place)
    held, size = run.data.validation, run.recipe.batch
    count = len(held) if batches == 0 else min(batches * size, len(held))
    spans = [np.arange(i, min(i + size, count)) for i in range(0, count, size)]

    parts = (to_device(run.task.batch(held.read(span), span), run.device) for span in spans)
    assert run.evaluate is not None
    with fast_products():
        return run.evaluate(lambda model: run.task.evaluate(model, parts))


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
    with fast_products():
        text = run.evaluate(lambda model: written(model, tokenizer, prompt, tokens, temperature, chance))
    if text is None:
        raise UserError("the model writes no text.", str(place), "Use a run of a decoder or an encoder-decoder.")
    return text


def export(place: str | Path, out: str | Path) -> Path:
    """Write a run as a Hugging Face folder, with what techniques added merged or removed."""
    from scrimp.models.hub import write

    run = open_run(place, corpus=False)
    write(out, configured(run.recipe, run.data), exported(run), run.data.tokenizer)
    return Path(out)
