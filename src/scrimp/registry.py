"""Finds techniques, models, tasks and data sets: ours by file, others' by entry point.

A technique's name is its file's name. Cards are written with literals, so that `scrimp list` reads them from the
source without importing torch; a test compares them with the imported classes.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
import textwrap
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from scrimp.errors import UserError, did_you_mean
from scrimp.technique import SLOTS, Card, Technique

HERE = Path(__file__).parent / "techniques"
BUILT_IN = {
    "models": {
        "transformer": "scrimp.models.transformer:TransformerConfig",
        "vision": "scrimp.models.vision:VisionConfig",
        "masked_autoencoder": "scrimp.models.masked_autoencoder:MaskedAutoencoderConfig",
        "encoder_decoder": "scrimp.models.encoder_decoder:EncoderDecoderConfig",
        "two_towers": "scrimp.models.two_towers:TwoTowersConfig",
    },
    "tasks": {
        "causal-lm": "scrimp.tasks.causal_lm:CausalLM",
        "masked-lm": "scrimp.tasks.masked_lm:MaskedLM",
        "classify": "scrimp.tasks.classify:Classify",
        "regress": "scrimp.tasks.regress:Regress",
        "embed": "scrimp.tasks.embed:Embed",
        "masked-image": "scrimp.tasks.masked_image:MaskedImage",
        "seq2seq": "scrimp.tasks.seq2seq:Seq2Seq",
        "denoise": "scrimp.tasks.denoise:Denoise",
        "contrastive": "scrimp.tasks.contrastive:Contrastive",
        "fragment": "scrimp.tasks.fragment:Fragment",
    },
    "datasets": {
        "text": "scrimp.data.text:TextData",
        "instructions": "scrimp.data.instructions:InstructionData",
        "labelled": "scrimp.data.labelled:LabelledData",
        "images": "scrimp.data.images:ImageData",
        "parallel": "scrimp.data.parallel:ParallelData",
        "image_text": "scrimp.data.image_text:ImageTextData",
    },
}

BROKEN = "Ask its authors to mend it, or uninstall it."
"""What to do about an entry point that does not hold what it should."""


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
def points(group: str) -> tuple[EntryPoint, ...]:
    """Entry points of a group. Reading what is installed takes milliseconds, and a run asks often."""
    return tuple(entry_points(group=f"scrimp.{group}"))


@cache
def modules() -> dict[str, str | EntryPoint]:
    """name -> module of ours, or entry point of others'."""
    found: dict[str, str | EntryPoint] = {}
    for path in sorted(HERE.glob("*/[!_]*.py")):
        found[path.stem] = f"scrimp.techniques.{path.parent.name}.{path.stem}"
    for point in points("techniques"):
        found.setdefault(point.name, point)
    return found


@cache
def taken() -> dict[str, UserError]:
    """Names that somebody's technique takes though they are taken -> what to say of it."""
    found: dict[str, UserError] = {}
    for point in points("techniques"):
        owner = modules()[point.name]
        if isinstance(owner, str) or owner != point:
            other = owner if isinstance(owner, str) else owner.value
            what = f"two techniques are called `{point.name}`: this one and `{other}`."
            found[point.name] = UserError(what, _origin(point), "Ask its authors to rename it, or uninstall it.")
    return found


def _origin(point: EntryPoint) -> str:
    """An entry point and its distribution, for errors."""
    owner = f" of {point.dist.name} {point.dist.version}" if point.dist else ""
    return f"entry point `{point.name} = {point.value}`{owner}"


def _loaded(point: EntryPoint) -> Any:
    """What an entry point names.

    Raises:
        UserError: if it cannot be imported, whatever the reason.
    """
    try:
        return point.load()
    except Exception as error:
        what = f"cannot be loaded: {type(error).__name__}: {str(error).rstrip('.')}."
        raise UserError(what, _origin(point), BROKEN) from error


def technique_class(name: str) -> type[Technique]:
    """The class of a technique.

    Raises:
        UserError: if there is none of that name, there are two, or it is somebody's and broken.
    """
    known = modules()
    if name not in known:
        raise UserError(f"there is no technique `{name}`.", f"techniques.{name}", did_you_mean(name, known))
    if name in taken():
        raise taken()[name]
    target = known[name]
    if isinstance(target, EntryPoint):
        return _of_others(name, target)
    module = importlib.import_module(target)
    return next(
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Technique) and value.__module__ == target
    )


def _of_others(name: str, point: EntryPoint) -> type[Technique]:
    loaded = _loaded(point)
    if not (isinstance(loaded, type) and issubclass(loaded, Technique)):
        raise UserError("does not name a class that derives from scrimp.Technique.", _origin(point), BROKEN)
    if not isinstance(getattr(loaded, "card", None), Card):
        raise UserError("names a class without a card.", _origin(point), BROKEN)
    if loaded.name != name:
        loaded.name = name
    return loaded


def catalogue() -> dict[str, Entry]:
    """Every technique by name, ours read from source. Others' that are broken are left out, and told on stderr."""
    found: dict[str, Entry] = {}
    faults = list(taken().values())
    for name, target in modules().items():
        try:
            found[name] = _entry(name, target)
        except UserError as error:
            faults.append(error)
    for fault in faults:
        sys.stderr.write(f"scrimp: {fault}\n")
    return found


def entry(name: str) -> Entry:
    """One technique for showing; ours is read from its source, others' is imported.

    Raises:
        UserError: if there is none of that name, there are two, or it is somebody's and broken.
    """
    target = modules().get(name)
    if target is None:
        raise UserError(f"there is no technique `{name}`.", "", did_you_mean(name, modules()))
    if name in taken():
        raise taken()[name]
    return _entry(name, target)


def _entry(name: str, target: str | EntryPoint) -> Entry:
    if isinstance(target, EntryPoint):
        return describe(name, _of_others(name, target))
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
    written = documented(kind)
    settings: list[Setting] = []
    for f in fields(kind):
        type_, said = written.get(f.name, (getattr(f.type, "__name__", str(f.type)), ""))
        settings.append(Setting(f.name, type_, ... if f.default is MISSING else f.default, said))
    slots = tuple(slot for slot in SLOTS if getattr(kind, slot) is not getattr(Technique, slot))
    return Entry(name, kind.__module__, kind.card, tuple(settings), slots, about)


def documented(kind: type) -> dict[str, tuple[str, str]]:
    """Setting -> its type and docstring, as the source of a dataclass and of those it derives from has them."""
    found: dict[str, tuple[str, str]] = {}
    for part in reversed(kind.__mro__):
        if not is_dataclass(part) or part is Technique:
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(part)))
        except (OSError, TypeError, SyntaxError):
            continue  # a package without its source is shown without docstrings
        if isinstance(tree.body[0], ast.ClassDef):
            found |= {key: (ast.unparse(node.annotation), said) for key, node, said in _fields(tree.body[0].body)}
    return found


def _fields(body: list[ast.stmt]) -> list[tuple[str, ast.AnnAssign, str]]:
    """The annotated names of a class: name, node, and the docstring under it."""
    found: list[tuple[str, ast.AnnAssign, str]] = []
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.append((node.target.id, node, _docstring(after)))
    return found


def read_source(name: str, module: str, path: Path) -> Entry:
    """An entry from a technique's file, without importing it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and _is_technique(node))
    card, settings = Card(paper="", section=""), list[Setting]()
    for node in body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            values = {word.arg: ast.literal_eval(word.value) for word in node.value.keywords if word.arg}
            card = Card(**values)
    for key, node, said in _fields(body):
        default = ... if node.value is None else ast.literal_eval(node.value)
        settings.append(Setting(key, ast.unparse(node.annotation), default, said))
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
        UserError: if there is none of that name, or it is somebody's and broken.
    """
    others = {point.name: point for point in points(group)}
    if name in BUILT_IN[group]:
        module, _, attribute = BUILT_IN[group][name].partition(":")
        return getattr(importlib.import_module(module), attribute)
    if name in others:
        kind = _loaded(others[name])
        if not (isinstance(kind, type) and is_dataclass(kind)):
            raise UserError("does not name a dataclass.", _origin(others[name]), BROKEN)
        return kind
    known = [*BUILT_IN[group], *others]
    raise UserError(f"there is no {group.rstrip('s')} `{name}`.", where, did_you_mean(name, known))


def component_name(group: str, value: Any) -> str:
    """The name under which a model, task or data set is registered."""
    target = f"{type(value).__module__}:{type(value).__qualname__}"
    names = BUILT_IN[group] | {point.name: point.value for point in points(group)}
    return next((name for name, known in names.items() if known == target), target)
