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

HERE: Final = Path(__file__).parent
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


def main() -> None:
    """Set up, measure, print, write."""
    args = arguments()
    root = args.cache.expanduser()
    peers = {name: PEERS[name] for name in args.peers}
    for name in {peer.venv for peer in peers.values()} - {"scrimp"} | {"loop"}:
        venvs.ensure(root / "venvs", name)
    if args.setup_only:
        return
    workload = WORKLOADS[args.workload]
    data = build(root, workload)
    work = fresh(root / "work")
    if any(peer.venv == "scrimp" for peer in peers.values()) and (why := scrimp_fault(args, workload, data, work)):
        print(f"SKIPPED scrimp: {why}", flush=True)
        peers = {name: peer for name, peer in peers.items() if peer.venv != "scrimp"}
    sizes = ["256"] if args.workload == "tiny" else ["1024", "2048", "4096"]
    roofs = measure_roof(root, args.threads, sizes)
    roof = max(roofs.values())
    print(f"sgemm roof with {args.threads} threads: {roof / 1e9:.1f} GFLOP/s", flush=True)
    runs = rounds(args, peers, workload, data, root, work)
    rows = [summary(name, runs, workload, roof) for name in peers if any(run.peer == name for run in runs)]
    print("\n" + markdown(rows))
    write(args, {
        "workload": asdict(workload), "threads": args.threads, "rounds": args.rounds, "steps": args.steps,
        "roof": roofs, "machine": machine(), "commit": commit(),
        "versions": {name: venvs.versions(interpreter(args, root, peer)) for name, peer in peers.items()},
        "rows": rows, "runs": [asdict(run) for run in runs],
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
    if (args.steps + 2) * WORKLOADS[args.workload].tokens > COUNT:
        parser.error(f"--steps {args.steps} needs more tokens than the stream's {COUNT}")
    return args


def fresh(folder: Path) -> Path:
    """An empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def scrimp_fault(args: argparse.Namespace, workload: Workload, data: Path, work: Path) -> str:
    """Why Scrimp cannot be measured, or nothing. Trains one tiny step, which also tokenizes the corpus, once."""
    if not args.scrimp.exists():
        return f"there is no {args.scrimp}"
    tiny = replace(workload, blocks=1, width=32, heads=1, batch=1)
    run = train("scrimp", PEERS["scrimp"], job(args, PEERS["scrimp"], tiny, 1, data, work), args, Path(sys.executable), 0)
    return "" if run else f"a tiny run failed, see {work / 'log'}"


def rounds(
    args: argparse.Namespace, peers: dict[str, Peer], workload: Workload, data: Path, root: Path, work: Path
) -> list[Run]:
    """A B C, A B C, ...: what the machine does to one peer it does to all."""
    runs: list[Run] = []
    for number in range(1, args.rounds + 1):
        for name, peer in peers.items():
            task = job(args, peer, workload, args.steps + 1, data, work)
            run = train(name, peer, task, args, interpreter(args, root, peer, script=True), number)
            if run is None:
                print(f"round {number} {name}: FAILED, see {work / 'log'}", flush=True)
                continue
            runs.append(run)
            walls = " ".join(f"{line['wall']:.2f}" for line in run.lines)
            print(f"round {number} {name}: {walls} s, {len(run.clean)}/{args.steps} clean", flush=True)
    return runs


def interpreter(args: argparse.Namespace, root: Path, peer: Peer, script: bool = False) -> Path:
    """The Python of a peer's environment; Scrimp's script itself needs none and is run by ours."""
    if peer.venv == "scrimp":
        return Path(sys.executable) if script else args.scrimp.parent / "python"
    return venvs.python(root / "venvs", peer.venv)


def job(args: argparse.Namespace, peer: Peer, workload: Workload, steps: int, data: Path, work: Path) -> Job:
    """What one process is told."""
    scratch = fresh(work / "scratch")
    return Job(workload, steps, str(data), str(work / "lines.jsonl"), str(scratch), {**peer.options, "scrimp": str(args.scrimp)})


def train(name: str, peer: Peer, task: Job, args: argparse.Namespace, python: Path, number: int) -> Run | None:
    """Run one process of a peer to its end; None if it failed."""
    lines, work = Path(task.lines), Path(task.lines).parent
    lines.unlink(missing_ok=True)
    task.write(work / "job.json")
    (work / "log").mkdir(exist_ok=True)
    with (work / "log" / f"{number}-{name}.txt").open("w") as log:
        began = time.time()
        try:
            done = subprocess.run([python, HERE / peer.script, work / "job.json"], cwd=task.scratch, timeout=TIMEOUT,
                                  env=environment(name, args.threads, work), stdout=log, stderr=log)  # fmt: skip
        except subprocess.TimeoutExpired:
            return None
    measured = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    if done.returncode or len(measured) != task.steps:
        return None
    return Run(name, number, measured[0]["end"] - began, measured)


def environment(name: str, threads: int, work: Path) -> dict[str, str]:
    """The same threads for all, no hub, byte code cached, and a compiler cache that is empty in the first round."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    return kept | {
        "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor" / name), "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip


def measure_roof(root: Path, threads: int, sizes: list[str]) -> dict[str, float]:
    """The best rate of each size of square product, FLOP/s."""
    command = [venvs.python(root / "venvs", "loop"), HERE / "roof.py", "3" if len(sizes) > 1 else "0", *sizes]
    env = environment("roof", threads, root / "work")
    return json.loads(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)


def machine() -> dict[str, Any]:
    """What it was measured on."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in info if line.startswith("model name")), "unknown")
    memory = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    return {"cpu": model, "cores": os.cpu_count(), "memory": memory, "kernel": platform.release()}


def commit() -> str:
    """The project's commit, `+` after it when files differ from it."""
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", PROJECT, *words], capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "src") else "")


def write(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Put the workload's result into the evidence, beside the other workloads'."""
    if args.out is None and args.workload == "tiny":
        return
    path = args.out or PROJECT / "evidence" / "peers.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | {args.workload: result}, indent=1) + "\n")
    print(f"Wrote {path}")


if __name__ == "__main__":
    main()
