# pyright: strict
"""What the command line reads and checks before a verb begins."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scrimp.errors import UserError

if TYPE_CHECKING:
    from scrimp.machines.machine import Machine
    from scrimp.recipe import Recipe

RunPath = Annotated[Path, typer.Argument(help="A run's folder, or one of its checkpoints.")]
Words = Annotated[
    list[str] | None, typer.Argument(help="Overrides: steps=200 lion.lr=3e-4 adamw=off.", metavar="[KEY=VALUE]...")
]


def axes_of(text: str) -> dict[str, int]:
    """axis -> ranks, from `data=2,tensor=2`."""
    try:
        return {axis.strip(): int(count) for axis, count in (pair.split("=") for pair in text.split(","))}
    except ValueError:
        raise UserError(f"`{text}` is no mesh.", "--mesh", "Write it as data=2,tensor=2.") from None


def accelerated(machine: str) -> bool:
    """Whether this names a simulated accelerator, or its description."""
    from scrimp.machines.accelerators.architecture import known
    from scrimp.machines.machine import KNOWN

    ours = machine.lower() in known() and machine.lower() not in (name.lower() for name in KNOWN)
    return ours or machine.endswith((".yaml", ".yml"))


def machine_of(machine: str) -> Machine:
    """A machine of plans by name, in any case.

    Raises:
        UserError: for an unknown one, with the nearest names, those of simulated accelerators too.
    """
    from scrimp.errors import did_you_mean
    from scrimp.machines.accelerators.architecture import known
    from scrimp.machines.machine import KNOWN
    from scrimp.machines.machine import machine as find

    if machine != "here" and machine.lower() not in (name.lower() for name in KNOWN):
        names = ["here", *KNOWN, *known()]
        raise UserError(f"there is no machine `{machine}`.", "--machine", did_you_mean(machine, names, len(names)))
    return find(machine)


def within(option: str, value: float, zero: str = "") -> None:
    """Check a number of the command line.

    Args:
        zero: what 0 means, a sentence.
    Raises:
        UserError: if it is negative, no number, or too large for a generator's seed.
    """
    if not 0 <= value < 2**63:
        bound = "below 2**63" if value > 0 else "at least 0"
        raise UserError(f"must be {bound}, not {value}.", option, zero)


def load(path: Path, overrides: list[str] | None) -> Recipe:
    """A recipe with overrides."""
    from scrimp.recipe import Recipe

    return Recipe.load(path, overrides or [])


def asked(recipe: Path | None, overrides: list[str] | None, resume: Path | None, start: Path | None) -> Recipe | None:
    """The recipe that `scrimp train` is given; None where it resumes a run.

    Raises:
        UserError: if arguments do not go together, or the recipe has faults.
    """
    if recipe is None and resume is None:
        raise UserError("give either a recipe or --resume RUN.", "scrimp train")
    if resume is not None and (recipe is not None or start is not None):
        what = "a resumed run keeps its recipe and its weights: no recipe, overrides or --from can be given with it."
        fix = f"Use --extend to go on longer, or begin a new run: scrimp train RECIPE --from {resume}."
        raise UserError(what, "--resume", fix)
    if start is not None and (start / "config.json").is_file() and not (start / "recipe.yaml").exists():
        fix = f"Write `model: {{from: {start}}}` in the recipe, without --from."
        raise UserError(f"`{start}` is a Hugging Face folder, not a run.", "--from", fix)
    return None if recipe is None else load(recipe, overrides)


def out_of(recipe: Recipe | None, resume: Path | None) -> Path:
    """Where the folder of a recipe's run, or of a resumed one, is."""
    if recipe is not None:
        return Path(recipe.out)
    from scrimp.folder import RunFolder

    assert resume is not None
    return RunFolder.newest(resume).parent.parent.parent


def check_mesh(recipe: Recipe | None, resume: Path | None, mesh: str | None, ranks: int) -> None:
    """Whether so many ranks can train a recipe, or go on with a run.

    Args:
        mesh: another one for the run.
    Raises:
        UserError: if the mesh has another number of ranks, or there is no run to resume.
    """
    from dataclasses import replace

    from scrimp.folder import RunFolder
    from scrimp.recipe import Recipe
    from scrimp.world import sizes

    if recipe is not None and mesh is not None:
        fix = 'Set `mesh` there, or write "mesh={tensor: 2}" behind the recipe.'
        raise UserError("a new run's mesh stands in its recipe.", "mesh", fix)
    if recipe is None:
        assert resume is not None
        recipe = Recipe.load(RunFolder.newest(resume).parent.parent / "recipe.yaml")
        recipe = replace(recipe, mesh=axes_of(mesh)) if mesh is not None else recipe
    sizes(recipe.mesh, ranks)


def numbers(text: str) -> list[float]:
    """Numbers between commas.

    Raises:
        UserError: if one is none, or not above 0.
    """
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [0.0]
    if not all(0 < value < 1e6 for value in found):
        raise UserError(f"`{text}` are not factors above 0.", "--lrs", "Write them as 0.5,1,2.")
    return found
