# pyright: reportAttributeAccessIssue=false, reportMissingImports=false
"""Every two techniques on a tiny model: which clash, which fit together, and where their order matters.

    python benchmarks/pairs.py              # a few minutes on one core; writes evidence/pairs.json

For every two that fit, two steps are planned on fake tensors and made on real ones, and the peaks of live bytes must
be equal. In every slot that two share, both orders are tried over a few steps: where no card declares the order,
weights and peak must be equal too. Where cards declare it, the table says whether the other order would differ.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from pairs import grid  # noqa: E402
from scrimp.arrange import clash  # noqa: E402
from scrimp.errors import UserError  # noqa: E402
from scrimp.folder import environment  # noqa: E402
from scrimp.registry import modules  # noqa: E402
from scrimp.technique import Technique  # noqa: E402

UNSEEN = {"compile"}
"""Their code is not seen operator by operator: a plan is an upper bound."""


def main() -> None:
    """Print the table, write the evidence, and fail if a pair does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a technique: only its pairs, and no evidence is written")
    parser.add_argument("--out", type=Path, default=ROOT / "evidence/pairs.json", help="JSON to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for a, b in itertools.combinations(sorted(modules()), 2):
        if args.only in ("", a, b):
            rows.append(row(a, b))
            print(line(rows[-1]), flush=True)
    bad = [r for r in rows if r["verdict"] == "FAILS"]
    print(summary(rows))
    if not args.only:
        args.out.parent.mkdir(exist_ok=True)
        args.out.write_text(json.dumps({"about": about(), "pairs": rows}, indent=1) + "\n")
    raise SystemExit(1 if bad else 0)


def row(a: str, b: str) -> dict[str, Any]:
    """One pair's line of the table."""
    one, two = grid.tried(a), grid.tried(b)
    found: dict[str, Any] = {"a": a, "b": b, "verdict": "fits", "slots": {}}
    reason = clash(one, two)
    if reason:
        return found | {"verdict": "clashes", "reason": reason}
    try:
        planned, measured = grid.planned_and_measured(grid.recipe_of(one, two))
        found |= {"planned": planned, "measured": measured}
        if planned != measured and not {a, b} & UNSEEN:
            found |= {"verdict": "FAILS", "reason": "the plan is not what is measured"}
        for slot, known in grid.shared(a, b):
            found["slots"][slot] = compared(slot, one, two, known)
            if found["slots"][slot]["order"] == "UNDECLARED":
                found |= {"verdict": "FAILS", "reason": f"the order in `{slot}` matters and is not declared"}
    except UserError as error:
        found |= {"verdict": "refused", "reason": str(error)}
    except Exception as error:
        found |= {"verdict": "FAILS", "reason": f"{type(error).__name__}: {error}"}
    return found


def compared(slot: str, one: Technique, two: Technique, known: bool) -> dict[str, Any]:
    """Both orders of a slot."""
    try:
        numbers, bytes_ = grid.differences(slot, one, two)
    except Exception as error:
        if not known:
            raise
        return {"order": "declared, the other one fails", "error": f"{type(error).__name__}: {error}"}
    same = numbers == 0 and bytes_ == 0
    order = ("declared, either would do" if same else "declared, it matters") if known else "free"
    return {"order": order if known or same else "UNDECLARED", "numbers": numbers, "bytes": bytes_}


def line(found: dict[str, Any]) -> str:
    """A row for reading."""
    slots = "; ".join(f"{slot}: {seen['order']}" for slot, seen in found["slots"].items())
    peak = f"{found['measured']:>10,} B" if "measured" in found else ""
    return f"{found['a']:15} {found['b']:15} {found['verdict']:8} {peak:12} {slots or found.get('reason', '')}".rstrip()


def summary(rows: list[dict[str, Any]]) -> str:
    """How many of which verdict and which order."""
    verdicts = [r["verdict"] for r in rows]
    orders = [seen["order"] for r in rows for seen in r["slots"].values()]
    counts = [f"{verdicts.count(v)} {v}" for v in sorted(set(verdicts))]
    return f"\n{len(rows)} pairs: {', '.join(counts)}. Shared slots: " + ", ".join(
        f"{orders.count(o)} {o}" for o in sorted(set(orders))
    )


def about() -> dict[str, Any]:
    """Where and on what this was made."""
    describe = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "environment": {key: value for key, value in environment().items() if key != "command"},
        "recipe": grid.recipe_of().dump(),
        "steps": grid.STEPS,
    }


if __name__ == "__main__":
    main()
