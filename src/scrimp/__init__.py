"""Scrimp trains Transformers on less: less computation, less data, less memory.

    from scrimp import Lion, LoRA, Recipe, apply, train

    result = train(Recipe(model="gpt-4m", techniques=(Lion(lr=1e-4),), duration="200 step"))
    model = apply(model, [LoRA(rank=8)])

Every technique's class is here by name; so are `Recipe`, `train`, `plan`, `apply`, `Technique`, `Card`
and the errors.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scrimp.applied import apply
    from scrimp.errors import RecipeError, UserError
    from scrimp.planning import plan
    from scrimp.recipe import Recipe
    from scrimp.technique import Card, Technique
    from scrimp.training import train

__all__ = ["Card", "Recipe", "RecipeError", "Technique", "UserError", "apply", "plan", "train"]

_HOMES = {
    "Card": "technique", "Technique": "technique", "Recipe": "recipe", "RecipeError": "errors", "UserError": "errors",
    "apply": "applied", "plan": "planning", "train": "training",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name where it is first used, so that `import scrimp` stays fast."""
    from importlib import import_module

    if name == "__version__":
        from importlib.metadata import version

        return version("scrimp")
    if name in _HOMES:
        return getattr(import_module(f"scrimp.{_HOMES[name]}"), name)
    hint = ""
    # Python asks for submodules here too, before it imports them; names with an underscore are its own.
    if name[:1].isalpha() and not (Path(__file__).parent / f"{name}.py").exists():
        from scrimp.errors import did_you_mean
        from scrimp.registry import classes, technique_class

        if name in classes():
            return technique_class(classes()[name])
        hint = " " + did_you_mean(name, dir(import_module(__name__)), listed=0)
    raise AttributeError(f"module 'scrimp' has no attribute {name!r}.{hint}".rstrip())


def __dir__() -> list[str]:
    """The public names: what is in `__all__`, and every technique's class."""
    from scrimp.registry import classes

    return sorted([*__all__, "__version__", *classes()])
