"""Reading recipes: YAML, overrides, validation, and faults that say where and what to do."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import TypeAdapter, ValidationError

from scrimp.errors import UserError, did_you_mean
from scrimp.registry import modules, technique_class
from scrimp.technique import Technique
from scrimp.wording import in_words

NAMED: Final = {"model": "preset", "data": "name", "task": "name"}
"""Sections that may be a single word -> the key that the word stands for."""


def read_techniques(raw: Any) -> tuple[tuple[Technique, ...], list[UserError]]:
    """Techniques from a mapping `{name: settings}`, a list of names and one-entry mappings, or a single name."""
    faults: list[UserError] = []
    pairs: list[tuple[str, Any]] = []
    if isinstance(raw, str):
        pairs = [(raw, {})]
    elif isinstance(raw, Mapping):
        pairs = [(str(name), settings) for name, settings in raw.items()]
    elif isinstance(raw, list | tuple):
        for i, item in enumerate(raw):
            if isinstance(item, Technique):
                pairs.append((item.name, item))
            elif isinstance(item, str):
                pairs.append((item, {}))
            elif isinstance(item, Mapping) and len(item) == 1:
                pairs.append(next((str(k), v) for k, v in item.items()))
            else:
                fix = "Write `- lion` or `- lion: {lr: 1e-4}`."
                faults.append(UserError(f"is not a technique: {item!r}.", f"techniques[{i}]", fix))
    else:
        fix = "Write for example `{adamw: {lr: 1e-3}}`."
        faults.append(UserError(f"must be a mapping or a list, not {raw!r}.", "techniques", fix))
    found: list[Technique] = []
    for name, settings in pairs:
        where = f"techniques.{name}"
        if isinstance(settings, Technique):
            found.append(settings)
            continue
        try:
            kind = technique_class(name)
        except UserError as error:
            faults.append(error)
            continue
        technique = validated(kind, {} if settings is None or settings is True else settings, where, faults)
        if technique is not None:
            found.append(technique)
    return tuple(found), faults


def dump_techniques(techniques: Sequence[Technique]) -> Any:
    """As `read_techniques` reads them back, with every setting: a later version's defaults change no run of today."""
    names = [t.name for t in techniques]
    if len(set(names)) == len(names):
        return {t.name: plain(t) for t in techniques}
    return [{t.name: plain(t)} for t in techniques]


@cache
def adapter(kind: Any) -> TypeAdapter[Any]:
    """pydantic's validator of a type."""
    return TypeAdapter(kind)


def validated(kind: Any, value: Any, where: str, faults: list[UserError]) -> Any:
    """A value as `kind`, or None with its faults added."""
    try:
        return adapter(kind).validate_python(value)
    except UserError as error:
        faults.append(error if error.where else UserError(error.what, where, error.fix))
    except ValidationError as error:
        faults += in_words(kind, error.errors(), where)
    return None


def plain(value: Any) -> Any:
    """As YAML's plain types."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value


def override(raw: Mapping[str, Any], words: Sequence[str]) -> tuple[dict[str, Any], list[UserError]]:
    """Apply `key=value` words: `batch=8`, `steps=200`, `lion.lr=3e-4`, `adamw=off`, `data.context=128`."""
    values, faults = {str(key): item for key, item in raw.items()}, list[UserError]()
    named = _by_name(values.get("techniques") or {})
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            faults.append(UserError(f"`{word}` is not `key=value`.", "command line", "Write for example `steps=200`."))
            continue
        try:
            value = yaml.load(text, Loader=Loader) if text else ""
        except (yaml.YAMLError, ValueError, RecursionError):
            faults.append(UserError(f"`{text}` is not a YAML value.", f"command line, {key}"))
            continue
        head, *rest = key.removeprefix("techniques.").split(".")
        if head in modules() and named is not None:
            if not rest:
                named.pop(head, None)
                if value is not False:
                    named[head] = value
            else:
                _put(named, [head, *rest], value)
        elif head in modules():
            fix = "Edit the recipe: a technique appears twice in its list."
            faults.append(UserError(f"cannot tell which `{head}` is meant.", "command line", fix))
        elif key == "techniques":
            values["techniques"], named = value, _by_name(value or {})
        elif key.startswith("techniques"):
            fix = did_you_mean(head, modules())
            faults.append(UserError(f"there is no technique `{head}`.", "command line", fix))
        else:
            preset = key == "model" and isinstance(value, str)
            _put(values, ["model", "preset"] if preset else key.split("."), value)
    if named is not None:
        values["techniques"] = named
    return _with_duration(values, set(raw), {word.partition("=")[0] for word in words}, faults), faults


def _with_duration(values: dict[str, Any], file: set[str], line: set[str], faults: list[UserError]) -> dict[str, Any]:
    """`steps: N` as `duration: N step`. The command line's wins over the file's; two of one place are a fault."""
    for given, place in ((line, "command line"), (file, "steps")):
        if {"steps", "duration"} <= given:
            faults.append(UserError("`steps` and `duration` are both given.", place, "Keep one of them."))
    steps = values.pop("steps", None)
    if steps is not None and not ("duration" in line and "steps" not in line):
        values["duration"] = f"{steps} step"
    return values


def _by_name(techniques: Any) -> dict[str, Any] | None:
    """Techniques as a mapping that overrides can change; None where a name says too little, or something is wrong."""
    if isinstance(techniques, str):
        return {techniques: {}}
    if isinstance(techniques, Mapping):
        return {str(name): settings for name, settings in techniques.items()}
    if not isinstance(techniques, list):
        return None
    named: dict[str, Any] = {}
    for item in techniques:
        pair = {item: {}} if isinstance(item, str) else item
        if not isinstance(pair, Mapping) or len(pair) != 1 or str(next(iter(pair))) in named:
            return None
        named |= {str(name): settings for name, settings in pair.items()}
    return named


def _put(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for part in path[:-1]:
        inner = values.get(part)
        if isinstance(inner, str) and part in NAMED:
            inner = {NAMED[part]: inner}
        values[part] = values = dict(inner) if isinstance(inner, Mapping) else {}
    values[path[-1]] = value


def not_yaml(error: Exception, path: Path) -> UserError:
    """What the YAML reader said, with the file, the line and the column."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return UserError(f"is not valid YAML: {' '.join(str(error).split())}.", str(path))
    mark = error.problem_mark or error.context_mark
    place = f"{path}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(path)
    context = f"{error.context} of line {error.context_mark.line + 1}" if error.context and error.context_mark else ""
    return UserError(f"is not valid YAML: {', '.join(filter(None, (context, error.problem)))}.", place)


class Loader(yaml.SafeLoader):
    """The safe loader, reading `1e-4` as a float, as YAML 1.2 does, and raising on a key given twice."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        key: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
        for key, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping; a repeated key is an error instead of a silent overwrite."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            fault = "is given twice" if isinstance(key, Hashable) and key in seen else ""
            fault = fault if isinstance(key, Hashable) else "is no plain word"
            if fault:
                raise yaml.constructor.ConstructorError(None, None, f"the key `{key}` {fault}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:(?:[0-9][0-9_]*)?\.[0-9_]+|[0-9][0-9_]*\.?)(?:[eE][-+]?[0-9]+)$"
               r"|^[-+]?[0-9][0-9_]*\.[0-9_]*$|^[-+]?\.[0-9]+$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"),
    list("-+0123456789."),
)  # fmt: skip
