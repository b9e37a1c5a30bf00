"""How much sooner the thrifty recipe reaches the loss of a tuned, fully decayed AdamW loop.

    python benchmarks/thrifty/run.py --tokens 450560 --seeds 3

First the loop (`loop.py`) is tuned: batch sizes and learning rates at one seed, all with the same tokens. Its best
setting trains with every seed; the mean final loss is the target. Then the thrifty recipe trains with more and more
tokens, each time fully decayed and with every seed, until its mean loss is as low. At last each ingredient is left out
at one seed, with the tokens found. Finished runs are kept in `--out`.

Memory is told twice: of the whole process, and without what a process holds that has only imported torch and made an
optimizer, which no recipe can save. Both sides use the C library's own allocator settings: on a model this small its
thresholds cost the recipe a fifth of its speed, and save little.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

HERE: Final = Path(__file__).resolve().parent
ROOT: Final = HERE.parent.parent
CONTEXT: Final = 256
ENVIRONMENT: Final = {**os.environ, "SCRIMP_ALLOCATOR": "default"}
IDLE: Final = """
import torch
torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
held = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(held.split()[1]) * 1024)
"""
SWEEP: Final = ((2, 5e-4), (2, 1e-3), (4, 5e-4), (4, 1e-3), (4, 2e-3), (8, 1e-3), (8, 2e-3), (8, 4e-3))
"""Batch sizes and learning rates of the loop, around the best."""
INGREDIENTS: Final = {
    "muon": ["muon=off", "adamw.lr=1e-3"],
    "the embeddings' learning rate": ["groups={}"],
    "autocast": ["autocast=off"],
    "fused_loss": ["fused_loss=off"],
    "recompute": ["recompute=off"],
    "length_warmup": ["length_warmup=off"],
    "clip": ["clip=off"],
    "decay to zero": ["warmup_cosine.floor=0.1"],
}
"""Ingredient -> what leaves it out."""


def kept(out: Path, name: str, command: list[str]) -> dict[str, Any]:
    """The JSON a command prints last, run only if it is not there yet."""
    file = out / f"{name}.json"
    if not file.exists():
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT)
        if done.returncode:
            raise RuntimeError(done.stderr[-1500:])
        file.write_text(done.stdout.splitlines()[-1])
    found = json.loads(file.read_text())
    print(
        f"{name:36} loss {found['loss']:.4f}  {found['seconds']:6.1f} s  {found['peak_bytes'] / 1e6:6.0f} MB",
        flush=True,
    )
    return found


def loop(out: Path, tokens: int, batch: int, lr: float, seed: int) -> dict[str, Any]:
    """One run of the loop by hand."""
    steps = tokens // (batch * CONTEXT)
    command = [sys.executable, str(HERE / "loop.py"), str(lr), str(batch), str(steps), str(seed)]
    return kept(out, f"loop-b{batch}-lr{lr:g}-t{tokens}-s{seed}", command)


def thrifty(out: Path, recipe: Path, tokens: int, seed: int, more: list[str]) -> dict[str, Any]:
    """One run of a recipe."""
    name = f"{recipe.stem}-t{tokens}-s{seed}" + "".join(f"-{m}" for m in more).replace("/", "_")
    command = [sys.executable, str(HERE / "one.py"), str(recipe), str(tokens), str(seed), *more]
    return kept(out, name, command)


def main() -> None:
    """Tune, train, and write the evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=450_560)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "thrifty.yaml")
    parser.add_argument("--shares", type=float, nargs="*", default=[0.4, 0.45, 0.5, 0.6, 0.8, 1.0])
    parser.add_argument("--out", type=Path, default=Path.home() / ".cache" / "scrimp-bench" / "thrifty")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    seeds = range(options.seeds)
    sweep = [loop(options.out, options.tokens, batch, lr, 0) for batch, lr in SWEEP]
    best = min(sweep, key=lambda r: r["loss"])
    base = [loop(options.out, options.tokens, best["batch"], best["lr"], seed) for seed in seeds]
    target = statistics.fmean(r["loss"] for r in base)
    print(f"target {target:.4f}")
    found: list[dict[str, Any]] = []
    tokens = 0
    for share in options.shares:
        tokens = int(share * options.tokens)
        found = [thrifty(options.out, options.recipe, tokens, seed, []) for seed in seeds]
        if statistics.fmean(r["loss"] for r in found) <= target:
            break
    without = {name: thrifty(options.out, options.recipe, tokens, 0, more) for name, more in INGREDIENTS.items()}
    report(sweep, base, found, without)


def report(sweep: list[Any], base: list[Any], found: list[Any], without: dict[str, Any]) -> None:
    """Print the ratios and write the evidence."""
    from scrimp.comparing import bits_per_byte
    from scrimp.data.text import TextData
    from scrimp.folder import environment

    idle = int(subprocess.run([sys.executable, "-c", IDLE], capture_output=True, text=True, check=True).stdout)
    data = TextData(source="python-stdlib", vocab=8192, context=CONTEXT).open()
    for run in [*sweep, *base]:
        run["bits_per_byte"] = bits_per_byte(run["loss"], data)

    def mean(runs: list[Any], key: str) -> float:
        return statistics.fmean(r[key] for r in runs)

    ratio = {
        "seconds": mean(base, "seconds") / mean(found, "seconds"),
        "process": mean(found, "peak_bytes") / mean(base, "peak_bytes"),
        "beyond_idle": (mean(found, "peak_bytes") - idle) / (mean(base, "peak_bytes") - idle),
    }
    print({key: round(value, 3) for key, value in ratio.items()})
    evidence = {"environment": environment(), "idle_bytes": idle, "ratio": ratio, "sweep": sweep, "base": base,
                "thrifty": found, "without": without}  # fmt: skip
    (ROOT / "evidence" / "thrifty.json").write_text(json.dumps(evidence, indent=1) + "\n")


if __name__ == "__main__":
    main()
