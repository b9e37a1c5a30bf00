"""One case in a process of its own: planned, or trained with a counter of live bytes, or trained with a stop watch."""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from typing import Any

from scrimp.allocator import lean

lean()


def main(what: str, case: dict[str, Any]) -> dict[str, Any]:
    """The figures."""
    from synthetic import recipe

    with tempfile.TemporaryDirectory() as out:
        made = recipe(case, out)
        return {"plan": planned, "live": live, "run": run}[what](made)


def planned(made: Any) -> dict[str, Any]:
    """What the plan says."""
    from scrimp.machines.machine import free_here
    from scrimp.planning import plan

    found = plan(made, free_here("cpu"), made.data.open())
    return {"live": found.live, "resident": found.memory, "step": found.stages[-1].seconds,
            "parameters": found.worst.parameters}  # fmt: skip


def live(made: Any) -> dict[str, Any]:
    """The highest live bytes of a whole run: building, steps, stages, validation, checkpoints."""
    from scrimp.meter import LiveBytes
    from scrimp.training import train

    with LiveBytes() as meter:
        train(made)
    return {"live": meter.peak}


def run(made: Any) -> dict[str, Any]:
    """Resident memory at its highest, and the median of the undisturbed steps of the last stage."""
    from scrimp.meter import resident_peak
    from scrimp.training import train

    steps: list[tuple[int, float, float]] = []
    before = [busy()]

    def observe(event: str, fields: dict[str, Any]) -> None:
        if event == "step":
            now = busy()
            steps.append((fields["stage"], fields["seconds"], foreign(before[0], now)))
            before[0] = now

    train(made, observe=observe)
    last = steps[-1][0]
    all_last = [s for s in steps if s[0] == last][1:]
    clean = [seconds for _, seconds, load in all_last if load < 0.08]
    return {"resident": resident_peak(), "step": statistics.median(clean or [s for _, s, _ in all_last]),
            "clean": len(clean), "steps": len(all_last)}  # fmt: skip


def busy() -> tuple[float, float, float]:
    """(busy CPU seconds of the machine with steal, those of this process, seconds of all cores)."""
    with open("/proc/stat", encoding="ascii") as file:
        fields = [int(n) / os.sysconf("SC_CLK_TCK") for n in file.readline().split()[1:9]]
    total = sum(fields)
    return total - fields[3] - fields[4], sum(os.times()[:2]), total


def foreign(a: tuple[float, float, float], b: tuple[float, float, float]) -> float:
    """Share of the machine that others used between two moments."""
    return max((b[0] - a[0]) - (b[1] - a[1]), 0.0) / max(b[2] - a[2], 1e-9)


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], json.loads(sys.argv[2]))))
