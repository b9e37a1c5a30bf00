"""Finds techniques, models, tasks and data sets: ours by file, others' by entry point.

A technique's name is its file's name. Cards are written with literals, so that `scrimp list` reads them from the
source without importing torch; a test compares them with the imported classes.
"""

from __future__ import annotations

import ast
import importlib
import sys
from dataclasses import MISSING, dataclass, fields
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from scrimp.errors import UserError, did_you_mean
from scrimp.technique import SLOTS, Card, Technique

HERE = Path(__file__).parent / "techniques"
BUILT_IN = {
    "models": {"transformer": "scrimp.models.transformer:TransformerConfig"},
    "tasks": {"causal-lm": "scrimp.tasks.causal_lm:CausalLM"},
    "datasets": {"text": "scrimp.data.text:TextData"},
}


@dataclass(frozen=True)
class Setting:
    """One field of a technique, as shown to users."""

    name: str
    type: str
    default: Any
    about: str


@dataclass(frozen=True)
class Entry:
    """A technique as `scrimp list` and `scrimp show` know it."""

    name: str
    module: str
    card: Card
    settings: tuple[Setting, ...]
    slots: tuple[str, ...]
    about: str
    """The module's docstring: equation, paper, when not to use it."""


@cache
def modules() -> dict[str, str | EntryPoint]:
    """name -> module of ours, or entry point of others'.

    Raises:
        UserError: if somebody's technique takes a name that is taken.
    """
    found: dict[str, str | EntryPoint] = {}
    for path in sorted(HERE.glob("*/[!_]*.py")):
        found[path.stem] = f"scrimp.techniques.{path.parent.name}.{path.stem}"
    for point in entry_points(group="scrimp.techniques"):
        if point.name in found:
            fix = f"Ask the authors of `{point.value}` to rename it, or uninstall it."
            raise UserError(f"two techniques are called `{point.name}`.", "entry points", fix)
        found[point.name] = point
    return found


def technique_class(name: str) -> type[Technique]:
    """The class of a technique.

    Raises:
        UserError: if there is none of that name.
    """
    known = modules()
    if name not in known:
        raise UserError(f"there is no technique `{name}`.", f"techniques.{name}", did_you_mean(name, known))
    target = known[name]
    if isinstance(target, EntryPoint):
        loaded: type[Technique] = target.load()
        if loaded.name != name:
            loaded.name = name
        return loaded
    module = importlib.import_module(target)
    return next(
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Technique) and value.__module__ == target
    )


def catalogue() -> dict[str, Entry]:
    """Every technique by name, ours read from source."""
    return {name: entry(name) for name in modules()}


def entry(name: str) -> Entry:
    """One technique for showing; ours is read from its source, others' is imported."""
    target = modules().get(name)
    if target is None:
        raise UserError(f"there is no technique `{name}`.", "", did_you_mean(name, modules()))
    if isinstance(target, EntryPoint):
        return describe(name, technique_class(name))
    return read_source(name, target, HERE / target.split(".")[2] / f"{name}.py")


@cache
def classes() -> dict[str, str]:
    """Class of a technique of ours -> its name, read from source."""
    found: dict[str, str] = {}
    for name, target in modules().items():
        if isinstance(target, str):
            tree = ast.parse((HERE / target.split(".")[2] / f"{name}.py").read_text(encoding="utf-8"))
            kind = next(node for node in tree.body if isinstance(node, ast.ClassDef) and _is_technique(node))
            found[kind.name] = name
    return found


def describe(name: str, kind: type[Technique]) -> Entry:
    """An entry from an imported class."""
    about = (sys.modules[kind.__module__].__doc__ or kind.__doc__ or "").strip()
    settings = [Setting(f.name, str(f.type), ... if f.default is MISSING else f.default, "") for f in fields(kind)]
    slots = tuple(slot for slot in SLOTS if getattr(kind, slot) is not getattr(Technique, slot))
    return Entry(name, kind.__module__, kind.card, tuple(settings), slots, about)


def read_source(name: str, module: str, path: Path) -> Entry:
    """An entry from a technique's file, without importing it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and _is_technique(node))
    card, settings = Card(paper="", section=""), list[Setting]()
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            values = {word.arg: ast.literal_eval(word.value) for word in node.value.keywords if word.arg}
            card = Card(**values)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            default = ... if node.value is None else ast.literal_eval(node.value)
            settings.append(Setting(node.target.id, ast.unparse(node.annotation), default, _docstring(after)))
    defined = {node.name for node in body if isinstance(node, ast.FunctionDef)}
    slots = tuple(slot for slot in SLOTS if slot in defined)
    return Entry(name, module, card, tuple(settings), slots, (ast.get_docstring(tree) or "").strip())


def _is_technique(node: ast.ClassDef) -> bool:
    return any(isinstance(base, ast.Name) and base.id == "Technique" for base in node.bases)


def _docstring(node: ast.stmt | None) -> str:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return " ".join(node.value.value.split())
    return ""


def component(group: str, name: str, where: str) -> Any:
    """A model, task or data set by name: a dataclass of settings.

    Args:
        group: models, tasks or datasets.
    Raises:
        UserError: if there is none of that name.
    """
    points = {point.name: point for point in entry_points(group=f"scrimp.{group}")}
    if name in BUILT_IN[group]:
        module, _, attribute = BUILT_IN[group][name].partition(":")
        return getattr(importlib.import_module(module), attribute)
    if name in points:
        return points[name].load()
    known = [*BUILT_IN[group], *points]
    raise UserError(f"there is no {group.rstrip('s')} `{name}`.", where, did_you_mean(name, known))


def component_name(group: str, value: Any) -> str:
    """The name under which a model, task or data set is registered."""
    target = f"{type(value).__module__}:{type(value).__qualname__}"
    names = BUILT_IN[group] | {point.name: point.value for point in entry_points(group=f"scrimp.{group}")}
    return next((name for name, known in names.items() if known == target), target)
