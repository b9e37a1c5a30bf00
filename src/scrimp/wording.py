"""What pydantic found wrong, in the words of a recipe: where it is, what belongs there, and an example."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Final, get_args

import yaml

from scrimp.errors import UserError, did_you_mean

KINDS: Final = {"float": "a number", "int": "a whole number", "bool": "true or false", "string": "a text",
                "tuple": "a list", "list": "a list", "dict": "a mapping", "dataclass": "a mapping of settings",
                "too": "a list", "missing": "a list"}  # fmt: skip
"""First word of pydantic's types of fault -> what should stand there. The last two are lists of another length."""
BRANCH: Final = re.compile(r"(str|float|int|bool|(function-[a-z]+|tuple|list|dict|literal)\[.*\])$")
"""What pydantic adds to a path to say which type of several it tried."""


def in_words(kind: Any, details: Sequence[Any], where: str) -> list[UserError]:
    """The faults of one value; those of several types that one place may have become one.

    Args:
        kind: the type that the value should have had.
        details: what `ValidationError.errors()` gave.
        where: the value's path in the recipe.
    """
    places: dict[tuple[Any, ...], list[Any]] = {}
    for detail in details:
        place = tuple(part for part in detail["loc"] if not (isinstance(part, str) and BRANCH.match(part)))
        if detail["type"] in ("missing", "too_long", "too_short") and place and isinstance(place[-1], int):
            place = place[:-1]
        places.setdefault(place, []).append(detail)
    return [_fault(kind, place, found, where) for place, found in places.items()]


def _fault(kind: Any, place: tuple[Any, ...], details: list[Any], where: str) -> UserError:
    path, first = ".".join([where, *map(str, place)]), details[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UserError):
        return UserError(cause.what, cause.where or path, cause.fix)
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        owner = kind if is_dataclass(kind) else next(iter(get_args(kind)[::-1]), None)
        known = [f.name for f in fields(owner)] if is_dataclass(owner) else []
        return UserError(f"unknown setting `{place[-1]}`.", path, did_you_mean(str(place[-1]), known))
    if first["type"] == "literal_error":
        # As pydantic lists them: 'linear' or 'sqrt'; 2, 4 or 8.
        known = [text or number for text, number in re.findall(r"'([^']*)'|(-?\d+)", first["ctx"]["expected"])]
        return UserError(f"`{first['input']}` is not one of {', '.join(known)}.", path)
    if first["type"] == "missing" and isinstance(first["loc"][-1], str):
        return UserError("must be given.", path)
    default = _default(kind, place)
    words = dict.fromkeys(_expected(detail["type"], default) for detail in details)
    if cause is not None or "" in words:
        message = str(cause or first["msg"]).rstrip(".")
        return UserError(f"{message[:1].lower()}{message[1:]}, not {first['input']!r}.", path)
    what = f"must be {' or '.join(words)}, not {first['input']!r}."
    return UserError(what, path, _example(path.rpartition(".")[2], default))


def _expected(fault: str, default: Any) -> str:
    words = KINDS.get(fault.split("_")[0], "")
    return f"a list of {len(default)} values" if words == "a list" and isinstance(default, tuple) and default else words


def _default(kind: Any, place: tuple[Any, ...]) -> Any:
    """A value that could stand at a place: the setting's default, or some settings; None where there is none."""
    if not is_dataclass(kind):
        return None
    if not place:
        known = {f.name: f.default for f in fields(kind) if f.default is not MISSING}
        return dict(getattr(getattr(kind, "card", None), "example", {})) or dict(list(known.items())[:1])
    found = {f.name: f.default for f in fields(kind)}.get(str(place[0]), MISSING)
    return found if len(place) == 1 and found is not MISSING else None


def _example(name: str, value: Any) -> str:
    """A line of a recipe."""
    if value in (None, "", (), {}):
        return ""
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump({name: plain}, default_flow_style=True, width=1000).strip()
    return f"Write for example `{text[1:-1]}`."
