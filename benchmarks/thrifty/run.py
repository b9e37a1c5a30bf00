"""How much sooner the thrifty recipe reaches the loss of a tuned, fully decayed AdamW loop.

    python benchmarks/thrifty/run.py --tokens 450560 --seeds 3

First the loop (`loop.py`) is tuned: batch sizes and learning rates at one seed, all with the same tokens. Its best
setting trains with every seed; the mean final loss is the target. Then the thrifty recipe trains with more and more
tokens, each time fully decayed and with every seed, until its mean loss is as low. At last each ingredient is left out
at one seed, with the tokens found. Finished runs are kept in `--out`.

Memory is told three times: of live tensors, which is what a device would have to hold; of the whole process; and of
that without what a process holds that has only imported torch and made an optimizer, which no recipe can save. Both
sides use the C library's own allocator settings: on a model this small Scrimp's thresholds cost the recipe a fifth of
its speed, and save little.
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
SWEEP: Final = ((2, 5e-4), (2, 1e-3), (4, 5e-4), (4, 1e-3), (4, 2e-3), (8, 2e-3), (8, 4e-3))
"""Batch sizes and learning rates of the loop, around the best."""
INGREDIENTS: Final = {
    "the embeddings' learning rate": ["groups={}"],
    "autocast": ["autocast=off"],
    "fused_loss": ["fused_loss=off"],
    "recompute": ["recompute=off"],
    "length_warmup": ["length_warmup=off"],
    "clip": ["clip=off"],
    "decay to zero": ["warmup_cosine.floor=0.1"],
}
"""Ingredient -> what leaves it out."""
ADAM: Final = ("muon=off", "groups={}")
"""What leaves Muon out, together with a rate of its own for AdamW, the best of these."""
ADAM_RATES: Final = ("5e-4", "1e-3", "2e-3")


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
    as_short = loop(options.out, tokens, best["batch"], best["lr"], 0)
    adam = [thrifty(options.out, options.recipe, tokens, 0, [*ADAM, f"adamw.lr={lr}"]) for lr in ADAM_RATES]
    without = {"muon": min(adam, key=lambda r: r["loss"])}
    without |= {name: thrifty(options.out, options.recipe, tokens, 0, more) for name, more in INGREDIENTS.items()}
    report(options.recipe, sweep, base, found, {"everything": as_short, **without})


def loop_live(batch: int) -> int:
    """Peak bytes of the loop's live tensors, over two steps."""
    import torch

    sys.path.insert(0, str(HERE.parent / "peers"))
    from peer_loop import GPT, adamw  # pyright: ignore[reportMissingImports]
    from workloads import Workload  # pyright: ignore[reportMissingImports]

    from scrimp.meter import LiveBytes

    model = GPT(Workload(blocks=4, width=256, heads=4, vocab=8192, context=CONTEXT, batch=batch))
    optimizer = adamw(model)
    with LiveBytes() as live:
        live.register(list(model.parameters()))
        for _ in range(2):
            tokens = torch.zeros(batch, CONTEXT + 1, dtype=torch.long)
            model(tokens[:, :-1], tokens[:, 1:]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return live.peak


def report(
    recipe: Path, sweep: list[Any], base: list[Any], found: list[Any], without: dict[str, Any]
) -> None:  # fmt: skip
    """Print the ratios and write the evidence."""
    from scrimp.comparing import bits_per_byte
    from scrimp.data.text import TextData
    from scrimp.folder import environment
    from scrimp.planning import plan
    from scrimp.recipe import Recipe

    idle = int(subprocess.run([sys.executable, "-c", IDLE], capture_output=True, text=True, check=True).stdout)
    data = TextData(source="python-stdlib", vocab=8192, context=CONTEXT).open()
    for run in [*sweep, *base]:
        run["bits_per_byte"] = bits_per_byte(run["loss"], data)

    def mean(runs: list[Any], key: str) -> float:
        return statistics.fmean(r[key] for r in runs)

    live = {"loop": loop_live(base[0]["batch"]), "thrifty": plan(Recipe.load(recipe)).live}
    ratio = {
        "seconds": mean(base, "seconds") / mean(found, "seconds"),
        "live": live["thrifty"] / live["loop"],
        "process": mean(found, "peak_bytes") / mean(base, "peak_bytes"),
        "beyond_idle": (mean(found, "peak_bytes") - idle) / (mean(base, "peak_bytes") - idle),
    }
    print({key: round(value, 3) for key, value in ratio.items()})
    evidence = {"environment": environment(), "idle_bytes": idle, "live_bytes": live, "ratio": ratio,
                "sweep": sweep, "base": base, "thrifty": found, "without": without}  # fmt: skip
    (ROOT / "evidence" / "thrifty.json").write_text(json.dumps(evidence, indent=1) + "\n")


if __name__ == "__main__":
    main()
