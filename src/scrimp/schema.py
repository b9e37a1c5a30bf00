"""The JSON Schema of recipes, made from the same dataclasses that validate them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from scrimp.reading import adapter
from scrimp.recipe import Checkpoint, GroupRule, Log, Recipe, Sample, Stop, Validate
from scrimp.registry import BUILT_IN, component, modules, technique_class


def schema() -> dict[str, Any]:
    """Everything a recipe may hold, with defaults and descriptions."""
    about = {f.name: _about(f.name) for f in fields(Recipe)}
    techniques = {name: {"anyOf": [_plain(technique_class(name)), {"type": "null"}]} for name in modules()}
    named = {"type": "object", "additionalProperties": False, "properties": techniques}
    one = {"anyOf": [{"enum": sorted(techniques)}, {**named, "maxProperties": 1}]}
    sections = {"validate": Validate, "checkpoint": Checkpoint, "log": Log, "stop": Stop, "sample": Sample}
    properties: dict[str, Any] = {
        "model": _component("models", {"preset": {"type": "string"}, "from": {"type": "string"}}),
        "data": _component("datasets", {}),
        "task": _component("tasks", {}),
        "techniques": {"anyOf": [named, {"type": "array", "items": one}]},
        "batch": {"type": "integer", "minimum": 1, "default": 16},
        "duration": {"type": ["string", "integer"], "default": "1000 step"},
        "steps": {"type": "integer", "description": "Short for `duration: N step`."},
        "seed": {"type": "integer", "default": 0},
        "device": {"enum": ["auto", "cpu", "cuda"], "default": "auto"},
        "dtype": {"enum": ["float32", "float64", "bfloat16"], "default": "float32"},
        "groups": {"type": "object", "additionalProperties": _plain(GroupRule)},
        "out": {"type": "string", "default": "runs"},
        "name": {"type": "string", "default": ""},
        **{key: _plain(kind) for key, kind in sections.items()},
    }
    for key, text in about.items():
        if text:
            properties[key].setdefault("description", text)
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
        one["properties"] = {"name": {"type": "string"}, **more, **one["properties"]}
    return {"anyOf": [{"type": "string"}, *found]}


def _plain(kind: Any) -> dict[str, Any]:
    return adapter(kind).json_schema()


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
