"""Tables of the guide to less computation, from `evidence/` and the catalogue."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SECTIONS = (
    "Optimization", "Initialization", "Sparse training", "Overparameterization", "Large batch training",
    "Incremental learning", "Token masking", "Importance sampling",
)  # fmt: skip

OWN = ("flip", "mae", "mass", "resolution_warmup")
"""Techniques that train no language model."""


def evidence(name: str) -> Any:
    """A file of `evidence/`; without rows where it was not measured."""
    path = ROOT / "evidence" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {"rows": {}}


def table(head: list[str], lines: list[list[str]]) -> str:
    """A table in Markdown."""
    if not lines:
        return "Not measured yet."
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *lines])


def spread(values: list[float], digits: int = 3) -> str:
    """Mean and deviation."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}" if values else ""
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def computation() -> str:
    """Every technique of the sections on computation and data: parity, claim, what was measured, what the card says."""
    from scrimp.registry import catalogue

    measured: dict[str, dict[str, Any]] = {}
    for file in ("catalogue", "computation", "effects"):
        found = evidence(file)
        for arm in found.get("arms", ()):
            if arm["kind"] == "alone":
                steps = f"{found['recipe']['duration']}s, {len(found['seeds'])} seeds"
                # Seconds of the second file are of a machine that others used, more for some arms than for others.
                timed = {"timed": file != "computation", "steps": steps}
                measured[arm["techniques"][-1]] = arm["summary"] | timed
    parity = evidence("parity").get("techniques", {})
    lines: list[list[str]] = []
    for entry in sorted(catalogue().values(), key=lambda e: (e.card.section, e.name)):
        if entry.card.section in SECTIONS:
            card = entry.card
            effect = _effect(entry.name, measured.get(entry.name))
            lines.append([f"`{entry.name}`", _parity(parity.get(entry.name, [])), card.claim or "none read", effect,
                          f"saves {card.saves}; costs {card.costs}"])  # fmt: skip
    return table(["technique", "parity", "paper's claim", "measured", "card"], lines)


def _parity(rows: list[dict[str, Any]]) -> str:
    worst: dict[str, float] = {}
    for row in rows:
        key = f"{row['library']} {row['version']}"
        worst[key] = max(worst.get(key, 0.0), row["difference"])
    return ", ".join(f"{library}: {difference:.0e}" for library, difference in worst.items()) or "equations only"


def _effect(name: str, seen: dict[str, Any] | None) -> str:
    if seen is None:
        return "on its own task only" if name in OWN else ""
    low, high = seen["interval"]
    p = f", p {seen['p']:.3f}" if seen.get("p") is not None else ""
    loss = f"loss {seen['difference']:+.3f} [{low:+.3f}, {high:+.3f}]{p}"
    time = f"; time {seen['time']:.2f}" if seen["timed"] else ""
    return f"{loss}{time}: {seen['verdict']} ({seen['steps']})"


def deep() -> str:
    """48 blocks without norms and without warm-up."""
    arms: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in evidence("deep")["rows"].values():
        arms[row["arm"]].append(row)
    lines = []
    for arm, rows in arms.items():
        bad = sum(row["diverged"] for row in rows)
        first, last = ([row[key] for row in rows if row[key] is not None] for key in ("first", "last"))
        start = f"{statistics.mean(first):.2f}" if statistics.mean(first) < 1e4 else f"{statistics.mean(first):.1e}"
        change = [row["change"] for row in rows if row["change"] is not None]
        held = [row["validation"] for row in rows if row["validation"] is not None]
        lines.append([arm, start, spread(last, 2), spread(held, 2), f"{statistics.mean(change):.2g}" if change else "",
                      f"{bad} of {len(rows)}"])  # fmt: skip
    head = ["initialization", "first loss", "last loss", "held out", "first update's change of logits", "diverged"]
    return table(head, lines)


def sparsity() -> str:
    """Accuracy at a density of 4.4 %."""
    summary = evidence("sparsity")["summary"]
    names = list(dict.fromkeys(name for arms in summary.values() for name in arms))
    names.sort(key=lambda name: -max(arms[name]["mean"] for arms in summary.values() if name in arms))
    lines = []
    for name in names:
        cells = []
        for arms in summary.values():
            found = arms.get(name)
            cells += ["", ""] if found is None else [
                f"{100 * found['mean']:.1f} ± {100 * found['std']:.1f}", f"{found['flops']:.3f}"]  # fmt: skip
        lines.append([name, *cells])
    seeds = ", ".join(f"{steps} steps: {next(iter(arms.values()))['seeds']} seeds" for steps, arms in summary.items())
    head = [text for steps in summary for text in (f"{steps} steps, accuracy %", "FLOPs")]
    return f"{table(['', *head], lines)}\n\n{seeds}."


def slimming() -> str:
    """Early-bird tickets, expansion, and large models that are cut."""
    arms: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for key, row in evidence("slimming")["rows"].items():
        arms[key.rpartition("/")[0]].append(row)
    lines = [
        [arm, spread([row["loss"] for row in rows]), f"{statistics.mean(row['seconds'] for row in rows):.0f}",
         ", then ".join(f"{s:.2f}" for s in rows[0]["step_seconds"]), f"{rows[0]['parameters']:,}",
         str(rows[0]["steps"]), str(len(rows))]
        for arm, rows in arms.items()
    ]  # fmt: skip
    return table(["arm", "held-out loss", "seconds", "seconds a step", "weights at the end", "steps", "seeds"], lines)


def growth() -> str:
    """Growing models against baselines that decay fully, at equal steps and at equal seconds."""
    arms: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for key, row in evidence("growth")["rows"].items():
        suite, arm = key.split("/")[:2]
        arms[f"{suite}, {arm}"].append(row)
    lines = []
    for arm, rows in arms.items():
        same = [row["same_time"]["loss"] for row in rows if row.get("same_time")]
        ratio = [row["ratio"] for row in rows if row.get("ratio")]
        reached = [row["reached"] for row in rows if row.get("reached")]
        times = f"{len(reached)} of {len(rows)}" + (f", after {statistics.mean(reached):.0f} s" if reached else "")
        lines.append([arm, spread([row["loss"] for row in rows]), f"{statistics.mean(r['seconds'] for r in rows):.0f}",
                      spread(ratio, 2), spread(same), times if ratio else "", str(len(rows))])  # fmt: skip
    head = [
        "arm",
        "held-out loss",
        "seconds",
        "of the baseline's",
        "baseline in that time",
        "reached its loss",
        "seeds",
    ]
    return table(head, lines)


def autoprog() -> str:
    """AutoProg against hand-made stacking and baselines."""
    arms: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in evidence("autoprog")["rows"].values():
        arms[row["arm"]].append(row)
    lines = []
    for arm, rows in arms.items():
        paths = [str(row["searches"][-1]["path"]) for row in rows if row["searches"]]
        lines.append([arm, spread([row["loss"] for row in rows]), spread([row["seconds"] for row in rows], 0),
                      f"{statistics.mean(row['search_seconds'] for row in rows):.0f}",
                      "; ".join(dict.fromkeys(paths)), str(len(rows))])  # fmt: skip
    return table(["arm", "held-out loss", "seconds", "of them searching", "chosen (depth, length)", "seeds"], lines)


def optimizers() -> str:
    """What the update rules' own step costs."""
    lines = []
    for name, row in evidence("optimizers")["rows"].items():
        promised = row["promised_bytes_a_weight"]
        said = "" if promised is None else " - ".join(dict.fromkeys(f"{value:g}" for value in promised))
        lines.append([f"`{name}`", f"{100 * row['share']:.2f} %", f"{row['nanoseconds_a_weight']:.2f}",
                      f"{row['state_bytes_a_weight']:.2f}", said])  # fmt: skip
    first = next(iter(evidence("optimizers")["rows"].values()))
    about = f"{first['weights']:,} weights, one thread; {first['workload']['name']}."
    return table(["rule", "share of a step", "ns a weight", "state, bytes a weight", "card"], lines) + f"\n\n{about}"


def together() -> str:
    """How many pairs of techniques combine, and every reason for which others do not."""
    import itertools

    from scrimp.arrange import clash
    from scrimp.registry import modules, technique_class

    made = {name: technique_class(name)(**technique_class(name).card.example) for name in sorted(modules())}
    reasons: dict[str, list[str]] = defaultdict(list)
    total = fits = 0
    for a, b in itertools.combinations(made, 2):
        total += 1
        reason = clash(made[a], made[b])
        fits += not reason
        if reason:
            kind = reason.replace(f"`{a}`", "A").replace(f"`{b}`", "B").replace(" Drop one of them.", "")
            reasons[kind.replace("B and A", "A and B").replace("B does not go with A", "A does not go with B")].append(
                f"{a} + {b}"
            )
    lines = [
        [kind, str(len(found)), ", ".join(found)] for kind, found in sorted(reasons.items(), key=lambda r: -len(r[1]))
    ]
    head = (
        f"Of {total:,} pairs of {len(made)} techniques, {fits:,} combine and {total - fits} are refused before a run."
    )
    return f"{head}\n\n{table(['reason', 'pairs', 'which'], lines)}"


def token_masking() -> str:
    """Masked tokens that are left out, against masks that are computed."""
    lines = []
    for name, arms in evidence("token_masking")["rows"].items():
        for arm, row in arms.items():
            lines.append([name, arm, f"{row['seconds']:.2f}", f"{row['times_as_fast']:.2f}",
                          f"{1 / row['flops_ratio']:.2f}", f"{1 / row['activations_ratio']:.2f}",
                          f"{1 / row['bytes_ratio']:.2f}"])  # fmt: skip
    head = ["", "arm", "seconds a step", "times as fast", "times fewer FLOPs", "times fewer activation bytes",
            "of a step's bytes"]  # fmt: skip
    return table(head, lines)
