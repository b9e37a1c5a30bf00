"""Train the same GPT with each peer, in interleaved rounds, and print how long a step takes and what it holds.

    python benchmarks/peers/run.py --workload A16k --rounds 5 --steps 5

Everything but the result is kept under ~/.cache/scrimp-bench. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import venvs
from corpus import COUNT, build
from table import Run, markdown, summary
from workloads import WORKLOADS, Job, Workload

HERE: Final = Path(__file__).resolve().parent
PROJECT: Final = HERE.parent.parent
TIMEOUT: Final = 1800
"""Seconds after which a peer's process is given up."""


@dataclass(frozen=True)
class Peer:
    """A row: which script, in which environment, with which options."""

    script: str
    venv: str
    options: dict[str, Any] = field(default_factory=dict[str, Any])


PEERS: Final = {
    "loop": Peer("peer_loop.py", "loop"),
    "loop_compile": Peer("peer_loop.py", "loop", {"compile": True}),
    "hf": Peer("peer_hf.py", "hf"),
    "lightning": Peer("peer_lightning.py", "lightning"),
    "litgpt": Peer("peer_litgpt.py", "litgpt"),
    "scrimp": Peer("peer_scrimp.py", "scrimp", {"techniques": ["fused_loss"]}),
    "scrimp+recompute": Peer("peer_scrimp.py", "scrimp", {"techniques": ["fused_loss", "recompute"]}),
}


@dataclass(frozen=True)
class Bench:
    """What all processes of a measurement share."""

    venvs: Path
    data: Path
    work: Path
    scrimp: Path
    threads: int

    def python(self, peer: Peer) -> Path:
        """The interpreter that has the peer's packages."""
        return self.scrimp.parent / "python" if peer.venv == "scrimp" else venvs.python(self.venvs, peer.venv)

    def environment(self, name: str) -> dict[str, str]:
        """The same threads for all, no hub, byte code cached, and a compiler cache that is empty in the first round."""
        kept = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        return kept | {
            "OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads), "HF_HUB_OFFLINE": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(self.work / "inductor" / name), "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip


def main() -> None:
    """Set up, measure, print, write."""
    args = arguments()
    peers, root = {name: PEERS[name] for name in args.peers}, args.cache.expanduser()
    for name in venvs.NAMES:
        if name == "loop" or any(peer.venv == name for peer in peers.values()):
            venvs.ensure(root / "venvs", name)
    if args.setup_only:
        return
    workload = WORKLOADS[args.workload]
    bench = Bench(root / "venvs", build(root, workload), fresh(root / "work"), args.scrimp.absolute(), args.threads)
    if any(peer.venv == "scrimp" for peer in peers.values()) and (why := scrimp_fault(bench, workload)):
        print(f"SKIPPED scrimp: {why}", flush=True)
        peers = {name: peer for name, peer in peers.items() if peer.venv != "scrimp"}
    if not peers:
        sys.exit("nothing is left to measure")
    roofs = measure_roof(bench, tiny=args.workload == "tiny")
    roof = max(roofs.values())
    print(f"sgemm roof with {args.threads} threads: {roof / 1e9:.1f} GFLOP/s", flush=True)
    runs = measure(bench, peers, workload, args.rounds, args.steps)
    rows = [summary(name, runs, workload, roof) for name in peers if any(run.peer == name for run in runs)]
    print("\n" + markdown(rows))
    write(args, {
        "workload": asdict(workload), "threads": args.threads, "rounds": args.rounds, "steps": args.steps,
        "roof": roofs, "machine": machine(), "commit": commit(),
        "versions": {name: venvs.versions(bench.python(peer)) for name, peer in peers.items()},
        "rows": rows, "runs": [short(run) for run in runs],
    })  # fmt: skip


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, default="A16k")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER", help=", ".join(PEERS))
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (5)")
    parser.add_argument("--steps", type=int, default=5, help="counted steps of a run, after the first (5)")
    parser.add_argument("--threads", type=int, default=2, help="threads of every peer (2)")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/scrimp-bench"), help="environments and scratch")
    parser.add_argument("--scrimp", type=Path, default=PROJECT / ".venv/bin/scrimp", help="Scrimp's command")
    parser.add_argument("--out", type=Path, help="JSON to update (evidence/peers.json; for tiny none)")
    parser.add_argument("--setup-only", action="store_true", help="only create the environments")
    args = parser.parse_args()
    if args.rounds < 1 or args.steps < 1:
        parser.error("--rounds and --steps must be at least 1")
    if (args.steps + 2) * WORKLOADS[args.workload].tokens > COUNT:
        parser.error(f"--steps {args.steps} needs more tokens than the stream's {COUNT}")
    return args


def fresh(folder: Path) -> Path:
    """An empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def scrimp_fault(bench: Bench, workload: Workload) -> str:
    """Why Scrimp cannot be measured, or nothing. Trains one small step, which also builds its token cache, once."""
    if not bench.scrimp.exists():
        return f"there is no {bench.scrimp}"
    small = replace(workload, blocks=1, width=32, heads=1, batch=1)
    run = train(bench, "scrimp", PEERS["scrimp"], small, steps=1, number=0)
    return "" if run else "one small step failed"


def measure(bench: Bench, peers: dict[str, Peer], workload: Workload, rounds: int, steps: int) -> list[Run]:
    """A B C, A B C, ...: what the machine does to one peer it does to all."""
    runs: list[Run] = []
    for number in range(1, rounds + 1):
        for name, peer in peers.items():
            run = train(bench, name, peer, workload, steps + 1, number)
            if run is not None:
                runs.append(run)
                walls = " ".join(f"{line['wall']:.2f}" for line in run.lines)
                print(f"round {number} {name}: {walls} s, {len(run.clean)}/{steps} clean", flush=True)
    return runs


def train(bench: Bench, name: str, peer: Peer, workload: Workload, steps: int, number: int) -> Run | None:
    """Run one process of a peer to its end; None, and a line that says so, if it failed."""
    lines, log = bench.work / "lines.jsonl", bench.work / "log" / f"{number}-{name}.txt"
    lines.unlink(missing_ok=True)
    log.parent.mkdir(exist_ok=True)
    scratch = fresh(bench.work / "scratch")
    options = {**peer.options, "scrimp": str(bench.scrimp)}
    Job(workload, steps, str(bench.data), str(lines), str(scratch), options).write(bench.work / "job.json")
    # Scrimp's script starts the command itself, and needs no package.
    python = sys.executable if peer.venv == "scrimp" else bench.python(peer)
    command, began = [python, HERE / peer.script, bench.work / "job.json"], time.time()
    with log.open("w", encoding="utf-8") as file:
        try:
            code = subprocess.run(command, cwd=scratch, env=bench.environment(name), stdout=file, stderr=file,
                                  timeout=TIMEOUT).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            code = None
    measured = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    if code != 0 or len(measured) != steps:
        why = f"no end within {TIMEOUT} s" if code is None else f"exit code {code}, {len(measured)} of {steps} steps"
        print(f"round {number} {name}: FAILED ({why}), see {log}", flush=True)
        return None
    return Run(name, number, measured[0]["end"] - began, measured)


def measure_roof(bench: Bench, tiny: bool) -> dict[str, float]:
    """The best rate of each size of square product, FLOP/s."""
    words = ["0", "256"] if tiny else ["3", "1024", "2048", "4096"]
    command = [bench.python(PEERS["loop"]), HERE / "roof.py", *words]
    done = subprocess.run(command, env=bench.environment("roof"), check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def machine() -> dict[str, Any]:
    """What it was measured on."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in info if line.startswith("model name")), "unknown")
    memory = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    return {"cpu": model, "cores": os.cpu_count(), "memory": memory, "kernel": platform.release()}


def commit() -> str:
    """The project's commit, `+` after it when the sources differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", PROJECT, *words], capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "src") else "")


def short(run: Run) -> dict[str, Any]:
    """A run for the record: of each step wall seconds, foreign load and steal, the uncounted first one included."""
    steps = [[round(line[key], 4) for key in ("wall", "foreign", "steal")] for line in run.lines]
    peak = run.lines[-1]["peak_rss"]
    return {"peer": run.peer, "round": run.round, "start": round(run.start, 2), "peak_rss": peak, "steps": steps}


def write(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Put the workload's result into the evidence, beside the other workloads'; one line a key."""
    if args.out is None and args.workload == "tiny":
        return
    path = args.out or PROJECT / "evidence" / "peers.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text()) if path.exists() else {}
    known[args.workload] = result
    parts = [
        f'"{name}": {{\n' + ",\n".join(f'  "{key}": {json.dumps(value)}' for key, value in part.items()) + "\n }"
        for name, part in known.items()
    ]
    path.write_text("{\n " + ",\n ".join(parts) + "\n}\n", encoding="utf-8")
    print(f"Wrote {path}")


if __name__ == "__main__":
    main()
