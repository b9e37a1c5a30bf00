"""The demonstration: one small GPT on real text, twice: a tuned AdamW, and a recipe that gets there on less."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from scrimp.errors import UserError
from scrimp.folder import environment
from scrimp.recipe import Checkpoint, Log, Recipe, Sample, Validate
from scrimp.registry import technique_class

BATCH: Final = 4
CONTEXT: Final = 256
STEPS: Final = 440
"""Of the plain run; a minute and a half on two threads of an AMD EPYC."""
SHARE: Final = 0.4
"""Steps of the thrifty run for one of the plain run: with so many it reached the same loss (benchmarks/thrifty)."""
SECONDS: Final = 200.0
"""Longest that both runs may take; slower machines get fewer steps."""
NAMES: Final = ("plain", "thrifty")
PLAIN: Final[dict[str, Any]] = {
    "adamw": {"lr": 1e-3},
    "warmup_cosine": {"warmup": 0.1, "floor": 0.1},
    "clip": {"norm": 1.0},
}
"""The best AdamW of a sweep over learning rates and batch sizes."""
THRIFTY: Final[dict[str, Any]] = {
    "muon": {"lr": 3e-3, "momentum": 0.9, "precision": "bfloat16"},
    "warmup_cosine": {"warmup": 0.05, "floor": 0.0},
    "clip": {"norm": 1.0},
    "fused_loss": {"chunk": 256},
    "autocast": {},
    "recompute": {},
    "length_warmup": {"start": 0.5, "until": 0.4, "levels": 1},
}
"""The techniques of recipes/thrifty.yaml."""
GROUPS: Final[dict[str, Any]] = {"embed*|positions*": {"lr": 2.0}}
"""Its learning rates."""


def recipes(out: Path, steps: int) -> dict[str, Recipe]:
    """The two recipes: same model, data, batch and seed; the thrifty one has fewer steps.

    Args:
        steps: of the plain run.
    """

    def make(name: str, steps: int, techniques: dict[str, Any], groups: dict[str, Any]) -> Recipe:
        return Recipe(
            model="gpt-4m",
            data={"source": "python-stdlib", "vocab": 8192, "context": CONTEXT},
            batch=BATCH,
            duration=f"{steps * BATCH * CONTEXT} tok",
            techniques=tuple(technique_class(key)(**settings) for key, settings in techniques.items()),
            groups=groups,
            validate=Validate(every=0.25, batches=12),
            checkpoint=Checkpoint(every=0),
            log=Log(tensorboard=False),
            sample=Sample(prompt="def ", tokens=96),
            out=str(out),
            name=name,
        )

    thrifty = dict(THRIFTY)
    if not _multiplies_16_bits():
        thrifty["muon"] = {**thrifty["muon"], "precision": "float32"}
        del thrifty["autocast"]
    return {
        "plain": make("plain", steps, PLAIN, {}),
        "thrifty": make("thrifty", max(1, round(SHARE * steps)), thrifty, GROUPS),
    }


def _multiplies_16_bits() -> bool:
    """Whether this CPU has bfloat16 products; without them autocast would be slower, not faster."""
    import torch

    cpu: Any = torch.cpu
    return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())


def demo(out: Path, steps: int = 0) -> None:
    """Train both in processes of their own, show them live, and compare.

    Args:
        out: folder of the runs, the table and the plot; runs of an earlier demonstration in it are kept.
        steps: of the plain run; 0 chooses for this machine.
    """
    console = Console()
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    made = recipes(out, steps or _affordable(console))
    rows: list[dict[str, Any]] = []
    for name in NAMES:
        console.print(f"\n[bold]{name}[/bold]: {', '.join(t.name for t in made[name].techniques)}")
        rows.append(_watch(made[name], out, name, console))
    table = _table(rows)
    console.print(table)
    for row in rows:
        console.print(Text(f"\n--- {row['name']} writes ---\n{row['text']}"))
    _plot(out, rows, console)
    shown = ("name", "techniques", "loss", "training_seconds", "tokens", "tokens_per_second", "peak_bytes", "seconds")
    runs = [{key: row[key] for key in shown} for row in rows]
    (out / "demo.json").write_text(json.dumps({"environment": environment(), "runs": runs}, indent=1) + "\n")
    console.print(f"\nBoth runs, demo.json and the plot are in {out}. It took {time.monotonic() - began:.0f} s.")


def _affordable(console: Console) -> int:
    """How many steps two runs may have so that the whole aims at less than five minutes."""
    import torch

    from scrimp.meter import gemm_rate
    from scrimp.products import fast_products

    with fast_products():
        rate = gemm_rate(torch.device("cpu"), seconds=0.5)
    flops = 6 * 5.3e6 * 1024 * (1 + SHARE)  # weights in products, tokens a step
    steps = max(20, int(min(STEPS, SECONDS * 0.5 * rate / flops)))
    console.print(f"This machine multiplies at {rate / 1e9:.0f} GFLOP/s: {steps} plain steps.")
    return steps


def _watch(recipe: Recipe, out: Path, name: str, console: Console) -> dict[str, Any]:
    """Run one recipe in a process of its own, so that its peak memory is its own."""
    path = out / f"{name}.yaml"
    path.write_text(recipe.yaml())
    before = set(out.iterdir())
    command = [sys.executable, "-m", "scrimp", "train", str(path)]
    began = time.monotonic()
    # Models this small train a fifth faster with the C library's own thresholds: see scrimp.allocator.
    given = {**os.environ, "SCRIMP_ALLOCATOR": "default"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=given)
    lines: list[str] = []
    folder: Path | None = None
    with Live(console=console, refresh_per_second=4, transient=False) as live:
        while process.poll() is None:
            time.sleep(0.25)
            folder = folder or next((p for p in sorted(out.iterdir()) if p not in before and p.is_dir()), None)
            live.update(_view(folder, recipe))
        assert process.stdout is not None
        lines = process.stdout.read().splitlines()
        live.update(_view(folder, recipe))
    if process.returncode != 0 or folder is None:
        raise UserError(f"the {name} run failed: {' '.join(lines[-3:])}", "demo")
    techniques = [t.name for t in recipe.techniques]
    return {"name": name, "techniques": techniques, "seconds": time.monotonic() - began, **_summary(folder)}


def _steps(folder: Path | None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Lines of steps and of validations so far."""
    path = folder / "metrics.jsonl" if folder else None
    if path is None or not path.exists():
        return [], []
    found = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return [r for r in found if "loss" in r], [r for r in found if "validation_loss" in r]


def _view(folder: Path | None, recipe: Recipe) -> Group:
    steps, checks = _steps(folder)
    total = int(recipe.duration.split()[0])
    if not steps:
        return Group(Text("  starting ..."))
    last = steps[-1]
    done = last["position"]
    recent = steps[-10:]
    speed = sum(r["tokens"] for r in recent) / sum(r["seconds"] for r in recent)
    bar = "█" * (30 * done // total) + "░" * (30 - 30 * done // total)
    held = f"  held-out {checks[-1]['validation_loss']:.3f}" if checks else ""
    memory = f"{last['peak_bytes'] / 2**20:,.0f} MiB"
    return Group(
        Text(f"  {bar} {done:,}/{total:,} tokens  loss {last['loss']:.3f}{held}  {speed:,.0f} tok/s  {memory}")
    )


def _summary(folder: Path) -> dict[str, Any]:
    steps, checks = _steps(folder)
    training = sum(r["seconds"] for r in steps[1:])
    sample = folder / "sample.txt"
    return {
        "loss": checks[-1]["validation_loss"],
        "training_seconds": training,
        "tokens": sum(r["tokens"] for r in steps),
        "tokens_per_second": sum(r["tokens"] for r in steps[1:]) / training,
        "peak_bytes": steps[-1]["peak_bytes"],
        "text": sample.read_text() if sample.exists() else "",
        "curve": list(zip(accumulate(r["seconds"] for r in steps), (r["loss"] for r in steps), strict=True)),
        "folder": str(folder),
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Same model, data and seed")
    for column in ("", "held-out loss", "training s", "tokens", "tokens/s", "peak memory"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        table.add_row(row["name"], f"{row['loss']:.3f}", f"{row['training_seconds']:.0f}", f"{row['tokens']:,}",
                      f"{row['tokens_per_second']:,.0f}", f"{row['peak_bytes'] / 2**20:,.0f} MiB")  # fmt: skip
    return table


def _plot(out: Path, rows: list[dict[str, Any]], console: Console) -> None:
    """Loss against time: in the terminal always, as an SVG file too."""
    console.print(Text("\n" + "\n".join(_chart(rows))))
    (out / "demo.svg").write_text(_svg(rows))


def _smooth(curve: list[tuple[float, float]], width: int, last: float) -> list[float]:
    """The curve as means over `width` equal spans of the time up to `last`; a shorter curve ends sooner."""
    cells: list[list[float]] = [[] for _ in range(width)]
    for seconds, loss in curve:
        cells[min(width - 1, int(seconds * width / last))].append(loss)
    while cells and not cells[-1]:
        cells.pop()
    values: list[float] = []
    for cell in cells:
        values.append(sum(cell) / len(cell) if cell else (values or [curve[0][1]])[-1])
    return values


def _chart(rows: list[dict[str, Any]], width: int = 64, height: int = 12) -> list[str]:
    """Both curves as text: `o` plain, `x` thrifty, `*` both."""
    last = max(row["curve"][-1][0] for row in rows)
    curves = [_smooth(row["curve"], width, last) for row in rows]
    high, low = max(map(max, curves)), min(map(min, curves))
    grid = [[" "] * width for _ in range(height)]
    for curve, mark in zip(curves, "ox", strict=True):
        for x, value in enumerate(curve):
            y = round((high - value) / max(high - low, 1e-9) * (height - 1))
            grid[y][x] = "*" if grid[y][x] not in (" ", mark) else mark
    lines = [f"{high - (high - low) * y / (height - 1):6.2f} |{''.join(row)}" for y, row in enumerate(grid)]
    return ["training loss (o plain, x thrifty, * both)", *lines, " " * 7 + "+" + "-" * width + f" {last:.0f} s"]


def _svg(rows: list[dict[str, Any]], width: int = 640, height: int = 360) -> str:
    """Both curves as a small picture; colors that color-blind readers tell apart."""
    colors, spans = ("#0072b2", "#d55e00"), 160
    last = max(row["curve"][-1][0] for row in rows)
    curves = [_smooth(row["curve"], spans, last) for row in rows]
    high, low = max(map(max, curves)), min(map(min, curves))
    lines: list[str] = []
    for curve, color, row in zip(curves, colors, rows, strict=True):
        across, down = (width - 70) / (spans - 1), (height - 60) / max(high - low, 1e-9)
        points = " ".join(f"{50 + x * across:.1f},{20 + (high - v) * down:.1f}" for x, v in enumerate(curve))
        lines.append(f'<polyline fill="none" stroke="{color}" stroke-width="2" points="{points}"/>')
        y = 30 + 18 * len(lines)
        lines.append(f'<text x="{width - 150}" y="{y}" fill="{color}">{row["name"]}</text>')
    frame = f'<text x="8" y="24">{high:.1f}</text><text x="8" y="{height - 36}">{low:.1f}</text>'
    label = f'<text x="{width // 2 - 80}" y="{height - 8}">training loss over {last:.0f} seconds</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="13"><rect width="100%" height="100%" fill="white"/>{frame}{label}{"".join(lines)}</svg>'
    )
