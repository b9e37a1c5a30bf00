"""Layouts of several ranks against one process: numbers, memory, and ranks that are killed.

    python benchmarks/parallel.py               # everything, to evidence/parallel.json; a quarter of an hour
    python benchmarks/parallel.py --only parity # or memory, clusters, killed
    python benchmarks/parallel.py --only clusters --out other.json

`parity`: ten steps of SGD in float64 with dropout on two and on four ranks; the largest difference of weights and
moments from one process, each tensor by its own largest number. `memory`: the highest live bytes of a rank, planned and
counted. `clusters`: plans of all stages of ZeRO for groups of devices that only pretend: the most that weights,
gradients and Adam's states take, beside the sizes that the paper computes for them. `killed`: a rank of two is killed
ten times at some step; seconds until both are gone, and whether the run that goes on ends with the weights of one that
was left alone, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any, Final

from scrimp.folder import environment

ROOT: Final = Path(__file__).resolve().parents[1]
EVIDENCE: Final = ROOT / "evidence" / "parallel.json"
LAYOUTS: Final[dict[str, tuple[dict[str, Any], dict[str, int], tuple[int, ...]]]] = {
    "replicate": ({"replicate": {}}, {}, (2, 4)),
    "zero, stage 1": ({"zero": {"stage": 1}}, {}, (2, 4)),
    "zero, stage 2": ({"zero": {"stage": 2}}, {}, (2, 4)),
    "zero, stage 3": ({"zero": {"stage": 3}}, {}, (2, 4)),
    "tensor": ({"tensor": {}}, {"tensor": 2, "data": 1}, (2,)),
    "pipeline": ({"pipeline": {}}, {"pipeline": 2, "data": 1}, (2,)),
    "context": ({"context": {}}, {"context": 2, "data": 1}, (2,)),
    "context of 4": ({"context": {}}, {"context": 4, "data": 1}, (4,)),
    "context, ulysses": ({"context": {"kind": "ulysses"}}, {"context": 2, "data": 1}, (2,)),
    "context x replicate": ({"context": {}, "replicate": {}}, {"context": 2, "data": 2}, (4,)),
    "zero, 2 groups of 2": ({"zero": {}}, {"replica": 2, "data": 2}, (4,)),
    "tensor x replicate": ({"tensor": {}, "replicate": {}}, {"tensor": 2, "data": 2}, (4,)),
    "tensor x zero, stage 3": ({"tensor": {}, "zero": {}}, {"tensor": 2, "data": 2}, (4,)),
    "pipeline x replicate": ({"pipeline": {}, "replicate": {}}, {"pipeline": 2, "data": 2}, (4,)),
    "pipeline x tensor": ({"pipeline": {}, "tensor": {}}, {"pipeline": 2, "tensor": 2, "data": 1}, (4,)),
}
"""Layout -> techniques, mesh where it is not all data, numbers of ranks."""
MODEL: Final = {"preset": "gpt-1m", "layers": 4, "width": 64, "heads": 4, "dropout": 0.1}
LARGE: Final = {
    "7 billion": {"layers": 32, "width": 4096, "heads": 32, "vocab": 32000, "dropout": 0.0},
    "70 billion": {"layers": 80, "width": 8192, "heads": 64, "vocab": 32000, "dropout": 0.0},
}
RANKS: Final = (8, 64, 512, 4096)


def recipe(techniques: dict[str, Any], mesh: dict[str, int], **more: Any) -> Any:
    """A small GPT on the interpreter's own library."""
    from scrimp.recipe import Recipe

    common = {
        "model": MODEL, "data": {"source": "python-stdlib", "tokenizer": "bytes", "context": 32}, "batch": 8,
        "mesh": mesh, "techniques": techniques, "duration": "10 step", "dtype": "float64",
        "validate": {"every": 1.0, "batches": 1}, "sample": {"tokens": 0}, "log": {"tensorboard": False},
    }  # fmt: skip
    return Recipe.read(common | more)


def parity(layout: str) -> dict[str, Any]:
    """On each rank: the difference from one process, whose result a file holds."""
    import torch

    from scrimp.sharding import whole
    from scrimp.training import train

    techniques, mesh, _ = LAYOUTS[layout] if layout else ({}, {}, ())
    result = train(recipe({"sgd": {"lr": 0.1, "momentum": 0.9}, **techniques}, mesh), save=False)
    found = {f"{kind}/{n}": whole(t) for kind, named in result.run.state().items() for n, t in named.items()}
    place = Path(os.environ["SCRIMP_ALONE"])
    if not layout:
        torch.save({"state": found, "loss": result.validation["loss"]}, place)
        return {}
    wanted = torch.load(place)
    gap = max(float((found[n] - t).abs().max() / t.abs().max()) for n, t in wanted["state"].items() if n in found)
    return {"difference": gap, "loss": abs(result.validation["loss"] - wanted["loss"])}


def small(layout: str) -> Any:
    """The recipe whose memory is planned and counted."""
    techniques, mesh, _ = LAYOUTS[layout]
    return recipe({"adamw": {}, **techniques}, mesh, dtype="float32", duration="3 step", validate={"every": 0})


def memory(layout: str) -> dict[str, Any]:
    """On each rank: the highest live bytes."""
    from scrimp.meter import LiveBytes
    from scrimp.training import train

    with LiveBytes() as meter:
        train(small(layout), save=False, force=True)
    return {"live": meter.peak}


def clusters() -> list[dict[str, Any]]:
    """Planned bytes of the first rank of ZeRO, for models and numbers of ranks that are not here."""
    from scrimp.planning import plan

    rows: list[dict[str, Any]] = []
    for (name, model), ranks, stage in product(LARGE.items(), RANKS, (1, 2, 3)):
        made = recipe(
            {"adamw": {}, "zero": {"stage": stage}, "recompute": {}, "fused_loss": {}}, {}, model=model, batch=ranks,
            data={"source": "python-stdlib", "tokenizer": "bytes", "context": 2048}, dtype="float32",
            duration="2 step", validate={"every": 0},
        )  # fmt: skip
        began = time.process_time()
        found = plan(made, "H100", ranks=ranks)
        weights = found.worst.parameters
        rows.append({
            "model": name, "weights": weights, "ranks": ranks, "stage": stage, "planned": found.live,
            "kinds": found.worst.most, "formula": sharded(4 * weights, ranks, stage),
            "planning_seconds": time.process_time() - began,
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def sharded(size: int, ranks: int, stage: int) -> dict[str, float]:
    """Kind -> bytes of a rank for so many bytes of weights, with twice as many of Adam's states: the paper's K = 2."""
    kinds = {"weights": (size, 3), "gradients": (size, 2), "states": (2 * size, 1)}
    return {kind: whole / ranks if stage >= least else whole for kind, (whole, least) in kinds.items()}


def killed(times: int) -> list[dict[str, Any]]:
    """A rank is killed at some step; the other stops, both go on from the last checkpoint."""
    from scrimp import checkpoint

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "recipe.yaml"
        made = recipe({"adamw": {}}, {}, dtype="float32", duration="40 step", checkpoint={"every": "4 step", "keep": 2},
                      out=place, name="run")  # fmt: skip
        path.write_text(made.yaml())
        _launched(path, 0).wait()
        wanted = _weights(checkpoint.load(Path(place) / "run/checkpoints/step-000000040")[0])
        for n in range(times):
            chance = random.Random(n)
            step, rank = chance.randint(6, 34), chance.randint(0, 1)
            process = _launched(path, 1)
            run = Path(place) / f"run-{n + 2}"
            _wait(run / "metrics.jsonl", step)
            victims = _ranks(process.pid)
            began = time.time()
            os.kill(victims[rank], signal.SIGKILL)
            while any(Path(f"/proc/{pid}/stat").exists() for pid in victims.values()):
                time.sleep(0.05)
            gone = time.time() - began
            process.wait()
            ended = _weights(checkpoint.load(run / "checkpoints/step-000000040")[0])
            rows.append({"step": step, "rank": rank, "seconds_until_gone": gone, "bitwise": ended == wanted,
                         "ended": process.returncode})  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def _weights(state: Any) -> dict[str, bytes]:
    return {f"{kind}/{n}": t.numpy().tobytes() for kind, named in state.items() for n, t in named.items()}


def _launched(path: Path, restarts: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "scrimp", "launch", "--ranks", "2", "--restarts", str(restarts), str(path)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True)


def _wait(log: Path, step: int) -> None:
    """Until a run has logged a step."""
    while not log.exists() or f'"step": {step},' not in log.read_text():
        time.sleep(0.1)


def _ranks(parent: int) -> dict[int, int]:
    """rank -> process, of the children of a launch."""
    found: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"\nPPid:\t{parent}\n" in (folder / "status").read_text():
                values = dict(v.split("=", 1) for v in (folder / "environ").read_text().split("\0") if "=" in v)
                if "RANK" in values:
                    found[int(values["RANK"])] = int(folder.name)
        except OSError:
            continue
    return found


def ranked(job: str, ranks: int) -> list[dict[str, Any]]:
    """A job on so many ranks, for all layouts that have them; one start of processes, as a start takes seconds."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run([*command, __file__, "--job", job], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def on_a_rank(job: str) -> None:
    """The first rank prints a row for each layout, with the largest number of any rank."""
    import torch.distributed as dist

    from scrimp.world import joined

    rows: list[dict[str, Any]] = []
    with joined():
        ranks = dist.get_world_size()
        for layout in (name for name, (_, _, counts) in LAYOUTS.items() if ranks in counts):
            told: list[Any] = [None] * ranks
            dist.all_gather_object(told, {"parity": parity, "memory": memory}[job](layout))
            rows.append({"layout": layout, "ranks": ranks} | {key: max(one[key] for one in told) for key in told[0]})
            if dist.get_rank() == 0:
                print(rows[-1], file=sys.stderr, flush=True)
        if dist.get_rank() == 0:
            print(json.dumps(rows), flush=True)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("parity", "memory", "clusters", "killed"))
    parser.add_argument("--times", type=int, default=10, help="how often a rank is killed")
    parser.add_argument("--out", type=Path, default=EVIDENCE, help="file to write")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if args.job:
        on_a_rank(args.job)
        return
    found: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    found["environment"] = environment()
    for what in (args.only,) if args.only else ("parity", "memory", "clusters", "killed"):
        found[what] = measured(what, args.times)
        args.out.write_text(json.dumps(found, indent=1) + "\n")


def measured(what: str, times: int) -> list[dict[str, Any]]:
    """The rows of one table."""
    if what == "clusters":
        return clusters()
    if what == "killed":
        return killed(times)
    from scrimp.planning import plan

    with tempfile.TemporaryDirectory() as place:
        os.environ["SCRIMP_ALONE"] = str(Path(place) / "alone.pt")
        if what == "parity":
            parity("")
        rows = sorted(ranked(what, 2) + ranked(what, 4), key=lambda row: list(LAYOUTS).index(row["layout"]))
    if what == "memory":
        for row in rows:
            row["planned"] = plan(small(row["layout"]), "here", ranks=row["ranks"]).live
    return rows


if __name__ == "__main__":
    main()
