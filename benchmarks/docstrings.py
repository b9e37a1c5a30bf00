"""Functions and what they are for, as data: `python benchmarks/docstrings.py OUT.jsonl`.

Every function of the running interpreter's own library that has a docstring becomes a line of JSON:

    doc     first paragraph of the docstring, on one line
    code    its source without the docstring
    name    module and qualified name, such as json.decoder.JSONDecoder.decode
    size    log2 of the lines of code

Tests and installed packages are left out. Where a paragraph or a source occurs twice, the first one stays, so that no
text has two partners. The order is that of the files' names and lines, the same each time.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scrimp.data.documents import STDLIB, find

Function = ast.FunctionDef | ast.AsyncFunctionDef
DOC, CODE = range(20, 401), range(30, 4001)
"""Lengths in characters of what is taken."""


def pairs() -> Iterator[dict[str, Any]]:
    """Every pair, each text once."""
    root = Path(sysconfig.get_paths()["stdlib"])
    seen: set[str] = set()
    for path in find(STDLIB):
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            continue
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for name, node in functions(tree, module):
            found = pair(name, node, source.splitlines())
            if found and not {found["doc"], found["code"]} & seen:
                seen |= {found["doc"], found["code"]}
                yield found


def functions(node: ast.AST, name: str) -> Iterator[tuple[str, Function]]:
    """Qualified name and node of every function, also those inside classes and functions."""
    for child in ast.iter_child_nodes(node):
        inner = name
        if isinstance(child, Function | ast.ClassDef):
            inner = f"{name}.{child.name}"
        if isinstance(child, Function):
            yield inner, child
        yield from functions(child, inner)


def pair(name: str, node: Function, lines: list[str]) -> dict[str, Any] | None:
    """One function of a file's lines; None if it has no docstring, no other code, or either has an unusual length."""
    said, last = ast.get_docstring(node), node.end_lineno
    first, *rest = node.body
    if not said or not rest or last is None or first.end_lineno is None or first.lineno == node.lineno:
        return None
    doc = " ".join(said.strip().split("\n\n")[0].split())
    kept = [line for line in lines[node.lineno - 1 : first.lineno - 1] + lines[first.end_lineno : last] if line.strip()]
    code = textwrap.dedent("\n".join(kept))
    if len(doc) not in DOC or len(code) not in CODE:
        return None
    return {"doc": doc, "code": code, "name": name, "size": round(math.log2(len(kept)), 3)}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write functions of Python's library and their docstrings.")
    parser.add_argument("out", type=Path, help=".jsonl file to write")
    given = parser.parse_args()
    found = list(pairs())
    given.out.write_text("".join(json.dumps(each) + "\n" for each in found), encoding="utf-8")
    print(f"{len(found):,} functions in {given.out}")


if __name__ == "__main__":
    main()
