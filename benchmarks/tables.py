"""Tables of README and docs, from `evidence/`. `python benchmarks/tables.py` writes them; a test compares."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
MARK = re.compile(r"<!-- ([a-z0-9-]+)-table -->\n(.*?)<!-- /\1-table -->", re.DOTALL)


def evidence(name: str) -> Any:
    """A file of `evidence/`."""
    return json.loads((ROOT / "evidence" / f"{name}.json").read_text())


def demo() -> str:
    """What `scrimp demo` measured."""
    found = evidence("demo")
    lines = [
        "| | techniques | held-out loss | training s | tokens | tokens/s | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["runs"]:
        lines.append(
            f"| {row['name']} | {', '.join(row['techniques'])} | {row['loss']:.3f} | {row['training_seconds']:.0f} "
            f"| {row['tokens']:,} | {row['tokens_per_second']:,.0f} | {row['peak_bytes'] / 2**20:,.0f} MiB |"
        )
    machine = f"{found['environment']['processor']}, {found['environment']['threads']} threads"
    return "\n".join([*lines, "", f"One run of `scrimp demo` on {machine}, torch {found['environment']['torch']}."])


def peers(workload: str) -> str:
    """What `make bench-peers` measured."""
    sys.path.insert(0, str(ROOT / "benchmarks" / "peers"))
    from table import markdown  # pyright: ignore[reportMissingImports]

    return markdown(evidence("peers")[workload]["rows"])


def rendered(text: str) -> str:
    """A page with every marked table written anew."""

    def table(match: re.Match[str]) -> str:
        name = match[1]
        body = demo() if name == "demo" else peers({"a16k": "A16k"}.get(name, name))
        return f"<!-- {name}-table -->\n{body}\n<!-- /{name}-table -->"

    return MARK.sub(table, text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(rendered(page.read_text()))
