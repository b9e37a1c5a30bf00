"""What is measured of a training process: one JSON line a step. Standard library only; reads Linux's /proc.

    foreign = (CPU seconds of the machine - CPU seconds of the process) / (wall seconds * cores)
    steal   = CPU seconds the hypervisor gave to others / (wall seconds * cores)

A step is everything from the end of the step before to its own end, a trainer's own logging and data included.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

TICK: Final = os.sysconf("SC_CLK_TCK")
CORES: Final = os.cpu_count() or 1


@dataclass(frozen=True)
class Snapshot:
    """Counters at one moment, in seconds."""

    wall: float
    own: float
    """CPU time of the process, all threads."""
    busy: float
    """CPU time of all processes of the machine together."""
    steal: float


def snapshot(pid: int | None = None) -> Snapshot:
    """The counters now; `own` is of the process `pid`, by default of this one."""
    user, nice, system, _, _, irq, softirq, steal = machine_ticks()
    own = time.process_time() if pid is None else process_seconds(pid)
    return Snapshot(time.perf_counter(), own, (user + nice + system + irq + softirq) / TICK, steal / TICK)


def machine_ticks() -> list[int]:
    """The first eight fields of /proc/stat: user, nice, system, idle, iowait, irq, softirq, steal."""
    with open("/proc/stat", encoding="ascii") as file:
        return [int(field) for field in file.readline().split()[1:9]]


def process_seconds(pid: int) -> float:
    """User and system time of a process."""
    # The name in parentheses may contain blanks; what follows it does not.
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def peak_rss(pid: int | None = None) -> int:
    """The largest resident set so far (VmHWM), in bytes."""
    for line in Path(f"/proc/{pid or 'self'}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the kernel reports no VmHWM")


class Recorder:
    """Appends a line at the end of each step.

    Args:
        path: file of JSON lines.
        pid: the process that is measured; by default this one.
    """

    def __init__(self, path: str | Path, pid: int | None = None) -> None:
        self.file = open(path, "w", encoding="utf-8")  # noqa: SIM115 - lives as long as the process
        self.pid, self.steps, self.last = pid, 0, snapshot(pid)

    def mark(self, wall: float | None = None, end: float | None = None) -> None:
        """A step has ended.

        Args:
            wall: its seconds, when they are known better than by the time of this call.
            end: when it ended, seconds since the epoch; by default now.
        """
        now, before = snapshot(self.pid), self.last
        passed = max(now.wall - before.wall, 1e-9)
        own = now.own - before.own
        self.steps += 1
        line = {
            "step": self.steps,
            "wall": passed if wall is None else wall,
            "cpu": own,
            "foreign": max(0.0, now.busy - before.busy - own) / (passed * CORES),
            "steal": (now.steal - before.steal) / (passed * CORES),
            "peak_rss": peak_rss(self.pid),
            "end": time.time() if end is None else end,
        }
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        self.last = now
