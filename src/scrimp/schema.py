"""The JSON Schema of recipes, made from the same dataclasses that validate them."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from scrimp.reading import adapter
from scrimp.recipe import Checkpoint, GroupRule, Log, Mesh, Recipe, Sample, Stop, Validate
from scrimp.registry import BUILT_IN, catalogue, component, documented, taken, technique_class
from scrimp.rules import CHOICES


def schema() -> dict[str, Any]:
    """Everything a recipe may hold, with defaults and descriptions."""
    about = {f.name: _about(f.name) for f in fields(Recipe)}
    techniques = {
        name: {"anyOf": [_plain(technique_class(name)), {"type": "null"}]}
        for name in catalogue()
        if name not in taken()
    }
    named = {"type": "object", "additionalProperties": False, "properties": techniques}
    one = {"anyOf": [{"enum": sorted(techniques)}, {**named, "maxProperties": 1}]}
    sections = {"validate": Validate, "checkpoint": Checkpoint, "log": Log, "stop": Stop, "sample": Sample,
                "mesh": Mesh}  # fmt: skip
    properties: dict[str, Any] = {
        "model": _component("models", {"preset": _text("A named size."), "from": _text("A Hugging Face folder.")}),
        "data": _component("datasets", {}),
        "task": _component("tasks", {}),
        "techniques": {"anyOf": [named, {"type": "array", "items": one}, {"enum": sorted(techniques)}]},
        "batch": {"type": "integer", "minimum": 1},
        "duration": {"type": ["string", "integer"]},
        "steps": {"type": "integer", "description": "Short for `duration: N step`."},
        "seed": {"type": "integer", "minimum": 0},
        "device": {"enum": list(CHOICES["device"])},
        "dtype": {"enum": list(CHOICES["dtype"])},
        "groups": {"type": "object", "additionalProperties": _plain(GroupRule)},
        "out": {"type": "string"},
        "name": {"type": "string"},
        **{key: _plain(kind) for key, kind in sections.items()},
    }
    for f in fields(Recipe):
        properties[f.name]["description"] = about[f.name]
        if f.default is not MISSING and f.name != "techniques":
            properties[f.name]["default"] = f.default
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Scrimp recipe",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }


def _component(group: str, more: dict[str, Any]) -> dict[str, Any]:
    found = [_plain(component(group, name, "")) for name in BUILT_IN[group]]
    for one in found:
        one["properties"] = {"name": _text("Which one; another's by its entry point."), **more, **one["properties"]}
    return {"anyOf": [{"type": "string"}, *found]}


def _text(about: str) -> dict[str, str]:
    return {"type": "string", "description": about}


def _plain(kind: Any) -> dict[str, Any]:
    found = adapter(kind).json_schema()
    # pydantic reads the docstrings of a class's own fields, not of those it derives from.
    for name, (_, about) in documented(kind).items():
        if name in found["properties"] and about:
            found["properties"][name].setdefault("description", about)
    return found


def _about(name: str) -> str:
    import ast
    import inspect

    body = ast.parse(inspect.getsource(Recipe)).body[0]
    assert isinstance(body, ast.ClassDef)
    for node, after in zip(body.body, body.body[1:], strict=False):
        named = isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == name
        if named and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            return str(after.value.value)
    return ""
