"""`scrimp score`: train short runs, score every item of the training set, and write the scores once."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from scrimp.errors import UserError, did_you_mean
from scrimp.folder import anchored
from scrimp.inference import open_run
from scrimp.restore import fingerprint, same_data
from scrimp.scoring.scores import Scores, read, write
from scrimp.stages import new_clock
from scrimp.training import train

if TYPE_CHECKING:
    from scrimp.recipe import Recipe
    from scrimp.session import Observe

METHODS: Final = ("el2n", "grand", "forgetting", "prototypes", "perplexity")
GIVEN: Final = ("prototypes", "perplexity")
"""Methods that score by a model that is given (`--from`) rather than by short runs."""
SECTION: Final = "Importance sampling"
"""Techniques of this section choose items; scores are of all of them."""


def score(
    recipe: Recipe,
    by: str,
    out: Path,
    runs: int = 1,
    start: Path | None = None,
    clusters: int = 0,
    say: Callable[[str], None] = print,
    observe: Observe = lambda event, fields: None,
    data: Any = None,
) -> Scores:
    """Scores of a recipe's training set; runs that the file has already are not repeated.

    Args:
        recipe: what is trained for each run, with a seed of its own; `duration` says for how long.
        by: one of `METHODS`.
        runs: how many are averaged.
        start: a trained run. `prototypes` and `perplexity` score by it as it is, others train on from it.
        clusters: of `prototypes`; 0 chooses.
        data: an opened data set instead of the recipe's.
    Raises:
        UserError: if the file holds scores of something else, or the method does not fit the task.
    """
    if by not in METHODS:
        raise UserError(f"there is no score `{by}`.", "--by", did_you_mean(by, METHODS))
    method = importlib.import_module(f"scrimp.scoring.{by}")
    given = by in GIVEN and start is not None
    if given and runs > 1:
        raise UserError(f"a given run scores once, not {runs} times.", "--runs", "Leave it out.")
    more = {"clusters": clusters} if by == "prototypes" else {}
    data = recipe.data.open() if data is None else data
    plain = _plain(recipe, getattr(method, "WATCH", None))
    about = {"by": by, "data": fingerprint(data), "items": len(data.train), "recipe": anchored(recipe).dump(),
             "from": str(start.absolute()) if start else "", **more}  # fmt: skip
    if by == "forgetting" and (clock := new_clock(plain, data)).at("2 epoch") > clock.end:
        what = "the runs are shorter than two epochs, and nothing can be forgotten before the second."
        raise UserError(what, "duration", "Set several epochs, such as duration='10 epoch'.")
    done = _begun(out, about)
    for n in range(len(done), runs):
        say(f"run {n + 1} of {runs}: {'scoring by ' + str(start) if given else 'training'}")
        if given:
            assert start is not None
            run = open_run(start)
            same_data(run.data, {"data": fingerprint(data)})
        else:
            seeded = replace(plain, seed=recipe.seed + n)
            run = train(seeded, start=start, observe=observe, save=False, data=data).run
        done = np.concatenate([done, method.score(run, **more)[None]])
        write(out, Scores(done, about))
    return Scores(done, about)


def _plain(recipe: Recipe, watch: Any) -> Recipe:
    """The recipe without techniques that leave items out, with what the method watches, and writing no sample."""
    kept = [t for t in recipe.techniques if t.card.section != SECTION]
    silent = replace(recipe.sample, tokens=0)
    return replace(recipe, techniques=(*kept, watch) if watch is not None else tuple(kept), sample=silent)


def _begun(out: Path, about: dict[str, Any]) -> np.ndarray:
    """The runs that a file has: float64, [runs, items].

    Raises:
        UserError: if they are of other data, another recipe or another method.
    """
    if not out.exists():
        return np.empty((0, about["items"]))
    found = read(out, "--out")
    differing = [key for key, value in about.items() if found.about.get(key) != value]
    if differing:
        what = f"`{out}` holds scores of another {differing[0]}."
        raise UserError(what, "--out", "Name another file, or delete it to score anew.")
    return found.runs
