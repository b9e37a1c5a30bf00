"""What each technique of the section on memory does to one model: planned and measured bytes, seconds, loss.

    python benchmarks/memory.py                   # rows that evidence/memory.json lacks; twenty minutes on one core
    python benchmarks/memory.py --only recompute  # rows whose names hold the word
    python benchmarks/memory.py --steps 2 --out /tmp/memory.json    # does it run?

A GPT of four million weights trains on the interpreter's own library sources with AdamW, once plainly and once with
each technique, all for the same steps. `planned` and `live` are the highest bytes of live tensors over the whole run,
as a plan says and as a counter finds; `resident` is that of the process in the allocator's lean setting, from which
the table takes what a process holds that has only imported torch. Seconds are the processor's, the median step's.
Rows of `gpt2-small` are of the 124 million weights of GPT-2, two steps. Tuning methods begin with the weights of
`pretrained`, a plain run on the same text, since nobody tunes random weights; `full tuning` is what they are compared
with.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from scrimp.allocator import lean
from scrimp.folder import environment

ROOT: Final = Path(__file__).resolve().parents[1]
MODEL: Final[dict[str, Any]] = {"preset": "gpt-4m"}
SMALL: Final[dict[str, Any]] = {"preset": "gpt2-small"}
RULE: Final[dict[str, Any]] = {"adamw": {"lr": 1e-3}}
ARMS: Final[dict[str, dict[str, Any]]] = {
    "plain": {},
    "autocast": {"autocast": {}},
    "fp8": {"fp8": {}},
    "fp8, kept in fp8": {"fp8": {"save": "fp8"}},
    "int8": {"int8": {}},
    "act, 8 bits": {"act": {"bits": 8}},
    "act, 4 bits": {"act": {"bits": 4}},
    "act, 2 bits": {"act": {"bits": 2}},
    "low_bit_states, 8 bits": {"low_bit_states": {"bits": 8}},
    "low_bit_states, 4 bits": {"low_bit_states": {"bits": 4}},
    "recompute, block": {"recompute": {}},
    "recompute, selective": {"recompute": {"mode": "selective"}},
    "recompute, half the bytes": {"recompute": {"budget": 0.5}},
    "recompute, 35 % of the bytes": {"recompute": {"budget": 0.35}},
    "fused_loss": {"fused_loss": {}},
    "fused_loss + recompute": {"fused_loss": {}, "recompute": {}},
    "accumulate, 4 parts": {"accumulate": {"parts": 4}},
    "offload_activations": {"offload_activations": {}},
    "offload_states": {"offload_states": {}},
    "layer_to_layer": {"layer_to_layer": {}},
    "share": {"share": {}},
}
"""Row -> the techniques beside AdamW."""
TUNED: Final[dict[str, dict[str, Any]]] = {
    "full tuning": {},
    "lora": {"lora": {}},
    "lora + quantized_base": {"lora": {}, "quantized_base": {}},
    "adapter": {"adapter": {}},
    "compacter": {"compacter": {}},
    "bitfit": {"bitfit": {}},
    "ssf": {"ssf": {}},
    "ia3": {"ia3": {}},
    "prompt": {"prompt": {}},
    "prefix": {"prefix": {}},
    "ladder": {"ladder": {}},
    "lora + recompute + fused_loss": {"lora": {}, "recompute": {}, "fused_loss": {}},
}
"""Rows that begin with trained weights."""
LARGE: Final[dict[str, dict[str, Any]]] = {
    "gpt2-small, plain": {},
    "gpt2-small, lora + recompute + fused_loss": TUNED["lora + recompute + fused_loss"],
}
IDLE: Final = "import torch; torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])"


def recipe(name: str, steps: int, out: Path) -> Any:
    """The recipe of a row."""
    from scrimp.recipe import Recipe

    large = name in LARGE
    own = ({"pretrained": {}} | ARMS | TUNED | LARGE)[name]
    return Recipe.read({
        "model": SMALL if large else MODEL,
        "data": {"source": "python-stdlib", "tokenizer": "bpe", "vocab": 4096, "context": 256},
        "batch": 2 if large else 8, "duration": f"{2 if large else steps} step", "techniques": RULE | own,
        "validate": {"every": 1.0, "batches": 2 if large else 8}, "checkpoint": {"every": 0},
        "sample": {"tokens": 0}, "log": {"tensorboard": False}, "out": str(out), "name": name.replace(" ", "-"),
    })  # fmt: skip


def planned(made: Any) -> dict[str, Any]:
    """What the plan says."""
    from scrimp.machines.machine import free_here
    from scrimp.planning import plan

    found = plan(made, free_here("cpu"))
    return {"planned": found.live, "parameters": found.worst.parameters, "trained": found.worst.trained}


def live(made: Any, start: str | None) -> dict[str, Any]:
    """The highest live bytes of a run of three steps."""
    from scrimp.meter import LiveBytes
    from scrimp.training import train

    with LiveBytes() as meter:
        train(replace(made, duration="3 step"), start=start, force=True)
    return {"live": meter.peak}


def run(made: Any, start: str | None) -> dict[str, Any]:
    """Resident memory at its highest, seconds and loss of a whole run."""
    from scrimp.meter import resident_peak
    from scrimp.training import train

    seconds: list[float] = []
    last = time.process_time()

    def see(event: str, fields: dict[str, Any]) -> None:
        nonlocal last
        if event == "step":
            seconds.append(time.process_time() - last)
        last = time.process_time()

    result = train(made, start=start, observe=see, force=True)
    return {"resident": resident_peak(), "seconds": statistics.median(seconds[1:]), "loss": result.validation["loss"],
            "folder": str(result.folder)}  # fmt: skip


def child(what: str, name: str, steps: int, out: Path, start: str | None) -> dict[str, Any]:
    """The figures of one process."""
    import torch

    torch.set_num_threads(1)
    made = recipe(name, steps, out)
    return planned(made) if what == "plan" else {"live": live, "run": run}[what](made, start)


def measured(name: str, steps: int, out: Path, start: str | None) -> dict[str, Any]:
    """A row; what fails is told in it."""
    row: dict[str, Any] = {}
    for what in ("plan", "live", "run"):
        command = [sys.executable, __file__, "--child", what, "--row", name, "--steps", str(steps), "--place", str(out)]
        command += ["--start", start] if start else []
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return row | {"error": done.stderr.strip().splitlines()[-1][:300]}
        row |= json.loads(done.stdout.splitlines()[-1])
    return row


def idle() -> int:
    """Resident bytes of a process that has made an optimizer."""
    code = f"{IDLE}; from scrimp.meter import resident_peak; print(resident_peak())"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Measure, print, and write the evidence row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a word that a row's name must hold")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=ROOT / "evidence" / "memory.json")
    parser.add_argument("--place", type=Path, default=Path(tempfile.gettempdir()) / "scrimp-memory", help="for runs")
    for hidden in ("--child", "--row", "--start"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        lean()
        print(json.dumps(child(args.child, args.row, args.steps, args.place, args.start)))
        return
    found: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {"rows": {}}
    found |= {"steps": args.steps, "environment": environment(), "idle": idle()}
    for name in ["pretrained", *ARMS, *TUNED, *LARGE]:
        old = found["rows"].get(name)
        if (args.only in name or name == "pretrained") and (old is None or "error" in old):
            start = found["rows"]["pretrained"]["folder"] if name in TUNED else None
            row = found["rows"][name] = measured(name, args.steps, args.place, start)
            args.out.write_text(json.dumps(found, indent=1) + "\n")
            print(name, row, flush=True)


if __name__ == "__main__":
    main()
