"""Docstrings, settings and tables as markdown."""

from __future__ import annotations

import html
import itertools
import json
import re
import textwrap
from collections.abc import Mapping
from typing import Any, Final

from scrimp.registry import Setting
from scrimp.technique import KINDS

LABELS: Final = re.compile(r"\b(Papers?|Source|Saves|Costs|Not for):")
ARXIV: Final = re.compile(r"arXiv[: ](\d{4}\.\d{4,5})")
BARE: Final = re.compile(r"(?!(?:true|false|yes|no|on|off|null)$)[A-Za-z][\w-]*")
"""Texts that need no quotes in YAML."""


def prose(text: str) -> str:
    """Plain text as markdown that reads the same; names of arXiv become links."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    for i in range(0, len(parts), 2):
        plain = re.sub(r"([\\*_\[\]])", r"\\\1", parts[i]).replace("<", "&lt;")
        parts[i] = ARXIV.sub(r"[\g<0>](https://arxiv.org/abs/\1)", plain)
    return "".join(parts)


def docstring(text: str) -> str:
    """A docstring as markdown: what is indented stays as it is, the rest is paragraphs."""
    out: list[str] = []
    for indented, group in itertools.groupby(text.split("\n\n"), key=lambda block: block.startswith("    ")):
        blocks = [block.rstrip() for block in group]
        if indented:
            out.append("```text\n" + textwrap.dedent("\n\n".join(blocks)) + "\n```")
            continue
        for block in blocks:
            out += [LABELS.sub(r"**\1:**", prose(lines)) if not code else f"```text\n{textwrap.dedent(lines)}\n```"
                    for code, lines in runs(block)]  # fmt: skip
    return "\n\n".join(out)


def runs(block: str) -> list[tuple[bool, str]]:
    """(whether it is indented, lines) for each run of lines of a block without blank lines."""
    grouped = itertools.groupby(block.splitlines(), key=lambda line: line.startswith("    "))
    return [(code, "\n".join(lines)) for code, lines in grouped]


def value(given: Any) -> str:
    """A setting's value as a recipe has it."""
    if isinstance(given, tuple | list):
        return f"[{', '.join(map(value, given))}]"
    if isinstance(given, float) and given in (float("inf"), float("-inf")):
        return ".inf" if given > 0 else "-.inf"
    if isinstance(given, str) and BARE.fullmatch(given):
        return given
    if isinstance(given, float):
        return re.sub(r"e-0(\d)$", r"e-\1", repr(given))
    return json.dumps(given)


def mapping(settings: Mapping[str, Any]) -> str:
    """Settings in one line, as a recipe has them."""
    return "{" + ", ".join(f"{name}: {value(given)}" for name, given in settings.items()) + "}"


def kind(setting: Setting) -> str:
    """A setting's type in words."""
    found = re.fullmatch(r"Literal\[(.*)\]", setting.type)
    if found:
        return "one of " + ", ".join(f"`{choice.strip(chr(39))}`" for choice in found[1].split(", "))
    if setting.type in KINDS:
        return KINDS[setting.type][1]
    if setting.type.startswith(("tuple", "list")):
        return f"a list of {len(setting.default)}" if "..." not in setting.type and setting.default else "a list"
    return f"`{setting.type}`"


def cell(text: str) -> str:
    """Text that may stand in a table. In code, what tables or markdown would read as theirs is spelled out."""

    def code(match: re.Match[str]) -> str:
        return "<code>" + re.sub(r"[|*_\\[\]]", lambda m: f"&#{ord(m[0])};", html.escape(match[1])) + "</code>"

    return re.sub(r"`([^`]*\|[^`]*)`", code, text).replace("|", "&#124;")


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table; nothing without rows."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines) if rows else ""


def link(name: str) -> str:
    """A technique's name as a link to its page."""
    return f"[`{name}`]({name}.md)"


def listed(names: tuple[str, ...]) -> str:
    """Names in a sentence."""
    quoted = [f"`{name}`" for name in names]
    return " and ".join(filter(None, [", ".join(quoted[:-1]), quoted[-1]]))
