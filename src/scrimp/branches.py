"""Steps on whole branches of a block, such as `attention` or `mlp`: what adapters of every shape share.

y = branch(x)    ->    y = step(x, branch(x))
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from scrimp.errors import UserError
from scrimp.models.seams import Linear, matching, wrap_forward

if TYPE_CHECKING:
    from scrimp.run import Run

Make = Callable[[int, int, Tensor], nn.Module]
"""(inputs, outputs, a weight whose type and device are taken) -> the step."""


def add_steps(model: nn.Module, pattern: str, name: str, make: Make, where: str) -> list[str]:
    """Add a step to every module that a pattern matches, as its child of that name.

    Returns:
        The paths of the modules.
    Raises:
        UserError: if none matches, or one has such a step, is a list of others, or holds no linear layer.
    """
    modules = {path: module for path, module in model.named_modules() if path}
    found = matching(pattern, list(modules), "module", where)
    for path in found:
        module = modules[path]
        if isinstance(module, nn.Sequential | nn.ModuleList | nn.MultiheadAttention):
            what = f"`{path}` ({type(module).__name__}) takes no step after it."
            raise UserError(what, where, "Name a layer, or a module that calls its layers itself.")
        if name in module._modules:
            raise UserError(f"`{path}` already has a `{name}`.", where, "Give the two techniques disjoint patterns.")
        layers = [m for m in module.modules() if isinstance(m, Linear | nn.Linear)]
        if not layers:
            raise UserError(f"`{path}` holds no linear layer.", where, "Name a branch, such as `mlp`.")
        step = make(layers[0].weight.shape[1], layers[-1].weight.shape[0], layers[0].weight)
        module.add_module(name, step)
        wrap_forward(module, _followed_by(step))
    return found


def tell_of_norms(model: nn.Module, name: str, run: Run) -> None:
    """Say so where a technique would train norms, and the model has none of such a name."""
    if not any(fnmatchcase(n, "*norm.*") for n, _ in model.named_parameters()):
        run.remarks.append(f"{name} trains no norms: the model has none whose name ends in `norm`.")


def _followed_by(step: nn.Module) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def around(forward: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(x: Tensor, *args: Any, **more: Any) -> Tensor:
            return step(x, forward(x, *args, **more))

        return stepped

    return around
