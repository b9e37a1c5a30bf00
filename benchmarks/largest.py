"""The largest model that trains here in little memory: weights, gradients and optimizer states on disk.

    python benchmarks/largest.py --size small --limit 500M --steps 3     # 90 million weights: minutes
    python benchmarks/largest.py --size large --limit 4G --steps 3       # 1.3 billion weights, 16 GB of disk

The run is in a control group (cgroup, of either version) whose memory is limited, page cache included, and has no swap:
it needs the right to make one, which root has. One process trains on the interpreter's own library sources in float32
with AdamW, layer by layer. A row of the evidence holds, for each step, its loss, seconds, and bytes read and written by
the process; the peaks of the group and of the process; what the plan said; and how fast the disk is, measured right
before with one file, read and written past the page cache. The files have no names: they are gone when the run ends.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
SIZES: Final = {
    "tiny": {"layers": 2, "width": 128, "heads": 2},
    "small": {"layers": 12, "width": 768, "heads": 12},
    "large": {"layers": 26, "width": 2048, "heads": 16},
}
VOCAB: Final = 8192
CONTEXT: Final = 128
BLOCK: Final = 8 << 20
"""Bytes of one read or write of the disk's test."""


def recipe(size: str, steps: int, batch: int, folder: str, memory: bool) -> Any:
    """The run.

    Args:
        memory: keep everything in memory instead.
    """
    from scrimp.recipe import Recipe

    disk: dict[str, Any] = {"layer_to_layer": {"eager": True, "folder": folder}, "offload_states": {"folder": folder}}
    return Recipe.read({
        "model": SIZES[size],
        "data": {"source": "python-stdlib", "vocab": VOCAB, "context": CONTEXT},
        "batch": batch,
        "duration": f"{steps} step",
        "techniques": {"adamw": {"lr": 3e-5}, **({} if memory else disk)},
        "validate": {"every": "0 step"},
        "sample": {"tokens": 0},
    })  # fmt: skip


def prepared(args: argparse.Namespace) -> None:
    """Build the tokens' cache, and say what the plan says."""
    from scrimp.planning import plan

    made = recipe(args.size, args.steps, args.batch, args.folder, args.in_memory)
    planned = plan(made, "here", made.data.open())
    print(json.dumps({"planned": planned.memory, "parameters": planned.worst.parameters}))


def trained(args: argparse.Namespace) -> None:
    """Train, inside the group; a line of JSON a step."""
    (Path(args.group) / "cgroup.procs").write_text(str(os.getpid()))
    from scrimp.meter import resident_peak
    from scrimp.training import train

    last = traffic()

    def observe(event: str, fields: dict[str, Any]) -> None:
        nonlocal last
        now = traffic()
        kept = {key: fields[key] for key in ("step", "loss", "seconds", "tokens") if key in fields}
        if event == "step":
            kept |= {"read": now[0] - last[0], "written": now[1] - last[1]}
        if event in ("stage", "step"):
            kept |= {"event": event, "resident_peak": resident_peak(), "time": round(time.perf_counter() - began, 1)}
            print(json.dumps(kept), flush=True)
            last = now

    began = time.perf_counter()
    train(
        recipe(args.size, args.steps, args.batch, args.folder, args.in_memory), observe=observe, save=False, force=True
    )


def traffic() -> tuple[int, int]:
    """Bytes that this process has read from disk and written to it."""
    rows = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(rows["read_bytes"]), int(rows["write_bytes"])


class Group:
    """A control group below this process's own, with little memory.

    Args:
        limit: bytes, of the page cache as well.
    """

    def __init__(self, limit: int) -> None:
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
        old = next((path for _, names, path in lines if "memory" in names.split(",")), None)
        self.first = old is not None
        own = f"/sys/fs/cgroup/memory{old}" if old is not None else f"/sys/fs/cgroup{lines[-1][2]}"
        self.path = Path(own.rstrip("/")) / f"scrimp-largest-{os.getpid()}"
        self.path.mkdir()
        names = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes") if self.first else ("memory.max",)
        for name in names:
            (self.path / name).write_text(str(limit))
        if not self.first:
            with contextlib.suppress(OSError):  # A kernel without swap does not have it.
                (self.path / "memory.swap.max").write_text("0")

    def peak(self) -> int:
        """Most bytes that the group held, page cache included."""
        return int((self.path / ("memory.max_usage_in_bytes" if self.first else "memory.peak")).read_text())

    def close(self) -> None:
        """Remove it, once its processes have ended."""
        self.path.rmdir()


def disk_speed(folder: str, size: int = 1 << 30) -> dict[str, float]:
    """Bytes a second of one long write and one long read past the page cache."""
    buffer = mmap.mmap(-1, BLOCK)
    with tempfile.TemporaryFile(dir=folder) as file:
        fd = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDWR | os.O_DIRECT)
        found: dict[str, float] = {}
        for name, transfer in (("write", os.pwritev), ("read", os.preadv)):
            began = time.perf_counter()
            for offset in range(0, size, BLOCK):
                transfer(fd, [buffer], offset)
            found[name] = size / (time.perf_counter() - began)
        os.close(fd)
    return found


def lines_of(args: argparse.Namespace, mode: str, group: str = "") -> list[dict[str, Any]]:
    """What a process of this file in another mode says.

    Raises:
        SystemExit: if it failed; -9 is a group's way to say that memory has run out.
    """
    command = [sys.executable, __file__, "--mode", mode, "--group", group, "--size", args.size,
               "--steps", str(args.steps), "--batch", str(args.batch), "--folder", args.folder]  # fmt: skip
    command += ["--in-memory"] if args.in_memory else []
    environ = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    found: list[dict[str, Any]] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            found.append(json.loads(line))
    if process.returncode:
        raise SystemExit(f"{mode} ended with {process.returncode}" + (": out of memory" * (process.returncode == -9)))
    return found


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """A row of the evidence."""
    from scrimp.folder import environment

    planned = lines_of(args, "prepare")[-1]
    speed = disk_speed(args.folder)
    group = Group(args.limit)
    try:
        lines = lines_of(args, "train", str(group.path))
        peak = group.peak()
    finally:
        group.close()
    steps = [line for line in lines if line["event"] == "step"]
    later = steps[1:] or steps
    rate = sum(s["read"] + s["written"] for s in later) / sum(s["seconds"] for s in later)
    return {
        "size": args.size, "model": SIZES[args.size], "vocab": VOCAB, "context": CONTEXT, "batch": args.batch,
        "lr": 3e-5, "parameters": planned["parameters"], "state_bytes": 16 * planned["parameters"], "limit": args.limit,
        "group_peak": peak, "resident_peak": lines[-1]["resident_peak"], "planned": planned["planned"],
        "disk": {k: round(v) for k, v in speed.items()}, "traffic_rate": round(rate), "build_seconds": lines[0]["time"],
        "steps": steps, "environment": environment(),
    }  # fmt: skip


def bytes_of(text: str) -> int:
    """300M, 4G -> bytes."""
    return int(float(text[:-1]) * {"M": 1 << 20, "G": 1 << 30}[text[-1]])


def main() -> None:
    """Measure, and replace the row of this size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--limit", type=bytes_of, default=bytes_of("400M"), help="such as 300M or 4G")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="on a fast disk, not in memory")
    parser.add_argument("--in-memory", action="store_true", help="for comparison: nothing on disk")
    parser.add_argument("--out", type=Path, default=ROOT / "evidence/largest.json")
    parser.add_argument("--mode", default="", help=argparse.SUPPRESS)
    parser.add_argument("--group", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.mode:
        return {"prepare": prepared, "train": trained}[args.mode](args)
    row = measured(args)
    if not args.in_memory:
        rows = json.loads(args.out.read_text()) if args.out.exists() else []
        rows = [r for r in rows if r["size"] != args.size] + [row]
        args.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(json.dumps({k: v for k, v in row.items() if k != "environment"}, indent=1))
    return None


if __name__ == "__main__":
    main()
