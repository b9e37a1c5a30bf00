"""Scrimp trains Transformers on less: less computation, less data, less memory.

    from scrimp import Lion, LoRA, Recipe, apply, train

    result = train(Recipe(model="gpt-4m", techniques=(Lion(lr=1e-4),), duration="200 step"))
    model = apply(model, [LoRA(rank=8)])

Every technique's class is here by name; so are `Recipe`, `train`, `apply`, `Technique`, `Card` and the errors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scrimp.errors import RecipeError, UserError
    from scrimp.recipe import Recipe
    from scrimp.run import apply
    from scrimp.technique import Card, Technique
    from scrimp.training import train

__all__ = ["Card", "Recipe", "RecipeError", "Technique", "UserError", "apply", "train"]

_HOMES = {
    "Card": "technique", "Technique": "technique", "Recipe": "recipe", "RecipeError": "errors", "UserError": "errors",
    "apply": "run", "train": "training",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name where it is first used, so that `import scrimp` stays fast."""
    from importlib import import_module

    if name == "__version__":
        from importlib.metadata import version

        return version("scrimp")
    if name in _HOMES:
        return getattr(import_module(f"scrimp.{_HOMES[name]}"), name)
    if name[:1].isupper():
        from scrimp.registry import classes, technique_class

        if name in classes():
            return technique_class(classes()[name])
    raise AttributeError(f"module 'scrimp' has no attribute {name!r}")
