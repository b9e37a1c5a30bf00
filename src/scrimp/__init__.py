"""Scrimp trains Transformers on less: less computation, less data, less memory.

import scrimp
from scrimp.techniques.optimizers.lion import Lion

result = scrimp.train(scrimp.Recipe(model="gpt-4m", techniques=(Lion(lr=1e-4),), duration="200 step"))
model = scrimp.apply(model, [scrimp.technique("lora")(rank=8)])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scrimp.arrange import arrange
    from scrimp.errors import RecipeError, UserError
    from scrimp.recipe import Recipe
    from scrimp.registry import technique_class as technique
    from scrimp.run import apply
    from scrimp.technique import Card, Technique
    from scrimp.train import train

__all__ = ["Card", "Recipe", "RecipeError", "Technique", "UserError", "apply", "arrange", "technique", "train"]

_HOMES = {
    "Card": "technique", "Technique": "technique", "Recipe": "recipe", "RecipeError": "errors", "UserError": "errors",
    "apply": "run", "arrange": "arrange", "technique": "registry:technique_class", "train": "train",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name where it is first used, so that `import scrimp` stays fast."""
    if name not in _HOMES:
        raise AttributeError(f"module 'scrimp' has no attribute {name!r}")
    from importlib import import_module

    home, _, attribute = _HOMES[name].partition(":")
    value = getattr(import_module(f"scrimp.{home}"), attribute or name)
    # `scrimp.train` is a module and a function; the function is what users mean.
    globals()[name] = value
    return value
