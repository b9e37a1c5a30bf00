"""Activations on disk against keeping them and against computing them again: memory and seconds of a step.

    python benchmarks/offloading.py                   # about five minutes on one core
    python benchmarks/offloading.py --only recompute  # the arms whose names hold the word
    python benchmarks/offloading.py --steps 1 --layers 2 --out /tmp/offloading.json

A GPT whose activations dominate its memory trains on random tokens, each arm in a process of its own. `seconds` are
those of the clock, `processor` those of all threads, which a busy machine changes less. `resident` is the process'
highest resident memory (VmHWM) of all steps, `base` that before the first; `live` is the highest sum of live tensors of
a step, `planned` the same on tensors without values. `cached` is what the system's page cache holds of the file at its
fullest, which would be memory too. `check` is a sum over all gradients of the first step: equal digits are equal
gradients. Arms are written one by one, under the key "activations", to `evidence/offloading.json`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from scrimp.allocator import lean
from scrimp.folder import environment
from scrimp.meter import LiveBytes, resident_peak
from scrimp.recipe import Recipe
from scrimp.registry import technique_class
from scrimp.run import Run, build
from scrimp.stages import new_clock

ROOT: Final = Path(__file__).resolve().parents[1]
ARMS: Final[dict[str, dict[str, dict[str, Any]]]] = {
    "plain": {},
    "offload": {"offload_activations": {}},
    "offload, nothing in advance": {"offload_activations": {"depth": 0}},
    "offload half of the blocks": {"offload_activations": {"fraction": 0.5}},
    "recompute": {"recompute": {}},
    "recompute and offload": {"recompute": {}, "offload_activations": {}},
}
VOCAB: Final = 256


@dataclass(frozen=True)
class Noise:
    """Random tokens, as a split of a data set and as the set itself."""

    context: int

    def __len__(self) -> int:
        return 4096

    def read(self, ids: np.ndarray, sample: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Windows of tokens."""
        rows = [np.random.default_rng(int(i)).integers(0, VOCAB, self.context + 1) for i in ids]
        return {"tokens": np.stack(rows)}

    def open(self) -> Any:
        """The data set."""
        return argparse.Namespace(train=self, validation=self, tokenizer=argparse.Namespace(vocab=VOCAB, end=0))


def built(arm: str, args: argparse.Namespace) -> Run:
    """An arm's run."""
    chosen = {"adam": {}, **ARMS[arm]}
    techniques = tuple(technique_class(name)(**settings) for name, settings in chosen.items())
    model = {"layers": args.layers, "width": args.width, "heads": args.width // 64, "context": args.context}
    made = Recipe(techniques=techniques, model=model, data=Noise(args.context), batch=args.batch, duration="9 step")  # type: ignore[arg-type]
    data = made.data.open()
    return build(made, data, new_clock(made, data))


def step(run: Run, batch: dict[str, torch.Tensor]) -> None:
    """One, as the trainer makes it."""
    assert run.backward
    assert run.step
    assert run.optimizer
    run.set_lr()
    run.backward(batch, run.task.count(batch))
    run.step()
    run.optimizer.zero_grad(set_to_none=True)


def row(arm: str, args: argparse.Namespace) -> dict[str, Any]:
    """One arm, in this process."""
    lean()
    run = built(arm, args)
    batches = [run.batch(i) for i in range(args.steps + 2)]
    base = resident_peak()
    assert run.backward
    run.backward(batches[0], run.task.count(batches[0]))
    check = sum(float(p.grad.double().abs().sum()) for p in run.model.parameters() if p.grad is not None)
    assert run.step
    assert run.optimizer
    run.step()
    run.optimizer.zero_grad(set_to_none=True)
    seconds: list[float] = []
    used = time.process_time()
    for batch in batches[1:-1]:
        began = time.perf_counter()
        step(run, batch)
        seconds.append(time.perf_counter() - began)
    used = (time.process_time() - used) / len(seconds)
    resident = resident_peak()
    assert run.loss
    with LiveBytes() as meter:
        meter.register(run.state())
        loss = run.loss(run.model, batches[-1])
        cached, disk = on_disk(run)
        (loss / run.task.count(batches[-1])).backward()
        run.step()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = built(arm, args)
        given: dict[str, torch.Tensor] = {k: mode.from_tensor(v) for k, v in batches[-1].items()}
        step(fake, given)
        with LiveBytes() as dry:
            dry.register(fake.state())
            step(fake, given)
    return {
        "arm": arm, "seconds": statistics.median(seconds), "all seconds": seconds, "processor": used,
        "resident": resident, "base": base, "live": meter.peak, "planned": dry.peak, "disk": disk, "cached": cached,
        "check": repr(check),
    }  # fmt: skip


def on_disk(run: Run) -> tuple[int, int]:
    """Bytes of the file that the page cache holds, and of the file, while all activations wait."""
    first: Any = next(iter(run.model.blocks)).forward  # type: ignore[arg-type]
    saver = getattr(first, "saver", None)
    if saver is None:
        return 0, 0
    spill = saver.steps[0][1].__self__.store.spill
    spill.writer.submit(int).result()
    pages = -(-spill.end // mmap.PAGESIZE)
    with mmap.mmap(spill.fd, spill.end, mmap.MAP_PRIVATE) as view:
        held, start = (ctypes.c_ubyte * pages)(), ctypes.c_char.from_buffer(view)
        ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(spill.end), held)
        del start
    return sum(page & 1 for page in held) * mmap.PAGESIZE, spill.end


def about(args: argparse.Namespace) -> dict[str, Any]:
    """On what and where this was made."""
    describe = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True)
    known = {key: value for key, value in environment().items() if key != "command"}
    sizes = {key: getattr(args, key) for key in ("layers", "width", "context", "batch", "steps")}
    return {"date": time.strftime("%Y-%m-%d"), "commit": commit.stdout.strip(), "sizes": sizes, "environment": known}


def main() -> None:
    """Each arm in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a word that an arm's name must hold")
    for name, value in {"layers": 8, "width": 384, "context": 512, "batch": 8, "steps": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path, default=ROOT / "evidence" / "offloading.json", help="JSON to write")
    parser.add_argument("--arm", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.arm:
        print(json.dumps(row(args.arm, args)))
        return
    for arm in ARMS:
        if args.only in arm:
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--arm", arm], stdout=subprocess.PIPE, check=True
            )
            found = json.loads(done.stdout.splitlines()[-1])
            kept = json.loads(args.out.read_text()) if args.out.exists() else {}
            rows = {r["arm"]: r for r in kept.get("activations", {}).get("rows", [])} | {arm: found}
            kept["activations"] = {"rows": list(rows.values()), "about": about(args)}
            args.out.write_text(json.dumps(kept, indent=1) + "\n")
            sizes = ", ".join(
                f"{key} {found[key] / 1e6:.0f} MB" for key in ("resident", "base", "live", "planned", "disk", "cached")
            )
            print(
                f"{arm:28} {found['seconds']:.2f} s a step, {found['processor']:.2f} of the processor, {sizes}, "
                f"check {found['check']}",
                flush=True,
            )


if __name__ == "__main__":
    main()
