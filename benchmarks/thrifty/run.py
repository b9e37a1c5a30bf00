"""How much sooner the thrifty recipe reaches the loss of a tuned, fully decayed AdamW loop.

    python benchmarks/thrifty/run.py --tokens 450560 --seeds 3

First the loop (`loop.py`) is tuned: batch sizes and learning rates at one seed, all with the same tokens. Its best
setting trains with every seed; the mean final loss is the target. Then the thrifty recipe trains with more and more
tokens, each time fully decayed and with every seed, until its mean loss is as low. Finished runs are kept in `--out`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

HERE: Final = Path(__file__).resolve().parent
ROOT: Final = HERE.parent.parent
CONTEXT: Final = 256
HELD: Final = 128


def kept(out: Path, name: str, command: list[str]) -> dict[str, Any]:
    """The JSON a command prints last, run only if it is not there yet."""
    file = out / f"{name}.json"
    if not file.exists():
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
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
    parser.add_argument("--batches", type=int, nargs="*", default=[8, 16])
    parser.add_argument("--lrs", type=float, nargs="*", default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "thrifty.yaml")
    parser.add_argument("--shares", type=float, nargs="*", default=[0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    parser.add_argument("--out", type=Path, default=Path.home() / ".cache" / "scrimp-bench" / "thrifty")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    seeds = range(options.seeds)
    sweep = [loop(options.out, options.tokens, b, lr, 0) for b in options.batches for lr in options.lrs]
    best = min(sweep, key=lambda r: r["loss"])
    base = [loop(options.out, options.tokens, best["batch"], best["lr"], seed) for seed in seeds]
    target = statistics.fmean(r["loss"] for r in base)
    print(f"target {target:.4f}")
    found: list[dict[str, Any]] = []
    for share in options.shares:
        found = [thrifty(options.out, options.recipe, int(share * options.tokens), seed, []) for seed in seeds]
        if statistics.fmean(r["loss"] for r in found) <= target:
            break
    ratio = {key: statistics.fmean(r[key] for r in base) / statistics.fmean(r[key] for r in found)
             for key in ("seconds", "peak_bytes")}  # fmt: skip
    print(f"{ratio['seconds']:.2f} times sooner, {1 / ratio['peak_bytes']:.2f} of the memory")
    evidence = {"target": target, "sweep": sweep, "base": base, "thrifty": found, "ratio": ratio}
    (ROOT / "evidence" / "thrifty.json").write_text(json.dumps(evidence, indent=1) + "\n")


if __name__ == "__main__":
    main()
