# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Does a technique help, on this model, this data, this machine? Runs, not opinions.

Every arm trains from the same seeds on the same data with a schedule that decays over its own length, at the best of
the same learning rates, in a process of its own. The clock counts steps: no start, compilation or validation. A gain is
called one only when the paired differences over the seeds say so (p < 0.05). "No Train No Gain" (arXiv 2307.06440) has
the reasons.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from scrimp.arms import Arm, at_rate
from scrimp.clock import Duration
from scrimp.errors import UserError
from scrimp.folder import environment
from scrimp.planning import Plan, plan
from scrimp.recipe import Checkpoint, Log, Sample
from scrimp.significance import paired

if TYPE_CHECKING:
    from scrimp.recipe import Recipe

MODES: Final = ("same-steps", "same-time")
PACE: Final = 10
"""Steps by which an arm's pace is measured."""
CLOSE: Final = 1e-3
"""Nats a token within which a loss counts as reached: sums in another order are no other loss."""
Say = Callable[[str], None]
Cell = dict[str, Any]


@dataclass
class Comparison:
    """A comparison in a folder: one JSON file a finished cell, so that none is ever run again."""

    folder: Path
    arms: list[Arm]
    left_out: dict[str, str]
    seeds: Sequence[int]
    rates: Sequence[float] = (1.0,)
    """Factors of the learning rate that every arm is tried with, at the first seed."""
    mode: str = "same-steps"
    target: float | None = None
    """Loss to which time and tokens are told; None for the baseline's own, seed by seed."""
    say: Say = lambda text: None
    plans: dict[str, Plan] = field(default_factory=dict[str, Plan])
    data: Any = None

    def run(self) -> dict[str, Any]:
        """All cells that are missing, then `comparison.json`.

        Raises:
            UserError: if the baseline fails, with its last words. Other arms that fail are left out.
        """
        (self.folder / "cells").mkdir(parents=True, exist_ok=True)
        self.data = self.arms[0].recipe.data.open()
        self._plan()
        rows: list[dict[str, Any]] = []
        for i, arm in enumerate(self.arms, 1):
            self.say(f"[{i}/{len(self.arms)}] {arm.name}")
            try:
                rows.append(self._arm(arm))
            except UserError as error:
                if arm.kind == "baseline":
                    raise
                self.left_out[arm.name] = str(error)
                self.say(f"    left out: {error}")
        base = rows[0]
        for row in rows:
            row["summary"] = summary(row, base, self.target)
        found = {
            "name": self.folder.name,
            "recipe": self.arms[0].recipe.dump(),
            "mode": self.mode,
            "seeds": list(self.seeds),
            "lrs": list(self.rates),
            "environment": environment(),
            "commit": commit(),
            "arms": rows,
            "left_out": self.left_out,
        }
        (self.folder / "comparison.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return found

    def _plan(self) -> None:
        """Plans of all arms; those that cannot be built are left out. Says how long it will take."""
        kept: list[Arm] = []
        for arm in self.arms:
            try:
                self.plans[arm.name] = plan(arm.recipe, "here", self.data)
                kept.append(arm)
            except UserError as error:
                if arm.kind == "baseline":
                    raise
                self.left_out[arm.name] = str(error)
        self.arms = kept
        cells = len(self.rates) + len(self.seeds) - 1
        total = sum(self.plans[arm.name].seconds * cells for arm in self.arms)
        self.say(f"{len(self.arms)} arms of {cells} runs, about {total / 60:.0f} min of training")

    def _arm(self, arm: Arm) -> dict[str, Any]:
        recipe = arm.recipe if self.mode == "same-steps" else self._in_same_time(arm)
        first = self._sweep(arm, recipe)
        best = min(first, key=lambda cell: cell["loss"])
        cells = [best, *(self._cell(arm, recipe, best["lr"], seed) for seed in self.seeds[1:])]
        planned = self.plans[arm.name]
        return {
            "name": arm.name,
            "kind": arm.kind,
            "techniques": [t.name for t in arm.recipe.techniques],
            "lr": best["lr"],
            "claim": arm.claim,
            "planned": {
                "memory": planned.memory,
                "live": planned.live,
                "seconds": planned.seconds / max(sum(s.steps for s in planned.stages), 1),
                "flops": sum(s.steps * sum(s.flops().values()) for s in planned.stages),
                "trained": planned.stages[-1].trained,
            },
            "sweep": [{"lr": cell["lr"], "loss": cell["loss"]} for cell in first],
            "cells": cells,
        }

    def _sweep(self, arm: Arm, recipe: Recipe) -> list[Cell]:
        """The first seed at every learning rate. One at which it diverges is not chosen.

        Raises:
            UserError: if it fails at all of them.
        """
        cells: list[Cell] = []
        for rate in self.rates:
            try:
                cells.append(self._cell(arm, recipe, rate, self.seeds[0]))
            except UserError as error:
                if not cells and rate == self.rates[-1]:
                    raise
                self.say(f"    lr x{rate:g} failed: {error}")
        return cells

    def _in_same_time(self, arm: Arm) -> Recipe:
        """The arm's recipe with as many steps as fit into the time of the baseline's."""
        base = self.arms[0]
        steps = sum(s.steps for s in self.plans[base.name].stages)
        seconds = self._pace(base) * steps
        return replace(arm.recipe, duration=f"{max(1, round(seconds / self._pace(arm)))} step")

    def _pace(self, arm: Arm) -> float:
        """Seconds a step, with stages in proportion."""
        steps = PACE * max(1, len(self.plans[arm.name].stages))
        return self._cell(arm, replace(arm.recipe, duration=f"{steps} step"), 1.0, self.seeds[0], "pace")["pace"]

    def _cell(self, arm: Arm, recipe: Recipe, rate: float, seed: int, what: str = "cell") -> Cell:
        """One run, or what it left."""
        name = f"{what}-{slug(arm.name)}-lr{rate:g}-seed{seed}"
        made = replace(
            at_rate(recipe, rate), seed=seed, out=str((self.folder / "runs").absolute()), name=name,
            checkpoint=Checkpoint(every=0), log=Log(tensorboard=False), sample=Sample(tokens=0),
        )  # fmt: skip
        text = made.yaml()
        key = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        file = self.folder / "cells" / f"{name}.json"
        if file.exists() and (known := json.loads(file.read_text()))["key"] == key:
            return known
        folder = self._trained(made, text)
        cell: Cell = {"key": key, "seed": seed, "lr": rate, **measured(folder, self.data, made.task)}
        partial = file.with_suffix(".partial")
        text = json.dumps(cell)
        partial.write_text(text)
        partial.rename(file)
        shutil.rmtree(folder, ignore_errors=True)
        self.say(f"    lr x{rate:g}, seed {seed}: loss {cell['loss']:.4f} in {cell['seconds']:.0f} s, "
                 f"{cell['tokens_per_second']:,.0f} tokens/s, {cell['peak_bytes'] / 2**20:,.0f} MiB")  # fmt: skip
        return json.loads(text)

    def _trained(self, recipe: Recipe, text: str) -> Path:
        """Train in a process of its own, so that its peak memory is its own."""
        folder = Path(recipe.out) / recipe.name
        shutil.rmtree(folder, ignore_errors=True)
        path = self.folder / "runs" / f"{recipe.name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        done = subprocess.run([sys.executable, "-m", "scrimp", "train", str(path)], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"the run {recipe.name} failed: {done.stderr.strip()[-400:]}", "compare")
        return folder


def measured(folder: Path, data: Any, task: Any) -> Cell:
    """What a run's folder says, on a clock of steps without the first of each stage."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    later = [s for i, s in enumerate(steps) if i and s["stage"] == steps[i - 1]["stage"]]
    pace = statistics.fmean(s["seconds"] for s in later) if later else steps[0]["seconds"]
    usual = {n: statistics.median([s["seconds"] for s in later if s["stage"] == n] or [pace])
             for n in {s["stage"] for s in steps}}  # fmt: skip
    clock, tokens, curve = 0.0, 0, list[tuple[int, int, float, float]]()
    for line in lines:
        if "loss" in line:
            clock += line["seconds"] if line in later else usual[line["stage"]]
            tokens += line["tokens"]
        elif "validation_loss" in line:
            curve.append((line["step"], tokens, clock, line["validation_loss"]))
    if not curve:
        raise UserError("a comparison needs validation.", "validate", "Set `every` and `batches` above 0.")
    loss = curve[-1][3]
    bits = bits_per_byte(loss, data) if getattr(task, "head", "") in ("", "lm") else None
    joules = sum(s["joules"] for s in steps) if all("joules" in s for s in steps) else None
    return {"loss": loss, "bits_per_byte": bits, "seconds": clock, "tokens": tokens, "pace": pace,
            "tokens_per_second": tokens / clock, "peak_bytes": steps[-1]["peak_bytes"], "joules": joules,
            "curve": curve}  # fmt: skip


def bits_per_byte(loss: float, data: Any) -> float | None:
    """A loss in nats a token as bits a byte of text; None where tokens are no text."""
    import math

    import numpy as np

    tokenizer: Any = getattr(data, "tokenizer", None)
    held = data.validation
    if not hasattr(tokenizer, "decode") or not hasattr(held, "windows"):
        return None
    count = min(len(held), 64)
    tokens = held.windows(np.arange(count))[:, 1:]
    size = sum(len(tokenizer.decode(row.tolist()).encode()) for row in tokens)
    return loss / math.log(2) * tokens.size / max(size, 1)


def summary(row: dict[str, Any], base: dict[str, Any], target: float | None) -> dict[str, Any]:
    """An arm against the baseline."""
    cells, others = row["cells"], base["cells"]
    difference = paired([c["loss"] for c in cells], [c["loss"] for c in others])
    aims = [target if target is not None else other["loss"] for other in others]
    reached = [reach(c["curve"], aim + CLOSE) for c, aim in zip(cells, aims, strict=True)]
    verdict = "no difference seen"
    if row is base:
        verdict = "baseline"
    elif difference.seen:
        verdict = "better" if difference.mean < 0 else "worse"
    whole = [r for r in reached if r is not None]
    every = len(whole) == len(reached)
    return {
        "loss": statistics.fmean(c["loss"] for c in cells),
        "difference": difference.mean,
        "interval": [difference.low, difference.high] if difference.p is not None else None,
        "p": difference.p,
        "verdict": verdict,
        "speed": _mean(cells, "tokens_per_second") / _mean(others, "tokens_per_second"),
        "time": _mean(cells, "seconds") / _mean(others, "seconds"),
        "memory": _mean(cells, "peak_bytes") / _mean(others, "peak_bytes"),
        "seconds_to_baseline": statistics.fmean(r[0] for r in whole) if every else None,
        "tokens_to_baseline": statistics.fmean(r[1] for r in whole) if every else None,
    }


def _mean(cells: Sequence[Cell], key: str) -> float:
    return statistics.fmean(cell[key] for cell in cells)


def reach(curve: Sequence[Sequence[float]], loss: float) -> tuple[float, float] | None:
    """(seconds, tokens) at which a curve first comes down to a loss, between two validations in proportion."""
    for i, (_, tokens, seconds, value) in enumerate(curve):
        if value <= loss:
            if i == 0:
                return seconds, tokens
            _, tokens0, seconds0, value0 = curve[i - 1]
            share = (value0 - loss) / (value0 - value)
            return seconds0 + share * (seconds - seconds0), tokens0 + share * (tokens - tokens0)
    return None


def slug(name: str) -> str:
    """A name for a file."""
    return "".join(c if c.isalnum() else "_" for c in name)


def commit() -> str:
    """The commit of a checkout that the package runs from, or an empty string."""
    done = subprocess.run(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
                          capture_output=True, text=True, check=False)  # fmt: skip
    return done.stdout.strip()


def interval(recipe: Recipe) -> Recipe:
    """The recipe with validations often enough to see when a loss is reached."""
    value = Duration.parse(recipe.validate.every)
    if value.value == 0 or (value.unit == "run" and value.value > 0.1):
        return replace(recipe, validate=replace(recipe.validate, every=0.1, batches=max(recipe.validate.batches, 8)))
    return recipe
