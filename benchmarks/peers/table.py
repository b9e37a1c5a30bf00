"""From measured lines to a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

from workloads import Workload

FOREIGN: Final = 0.06
"""A step during which others used this share of the machine, or more, is dropped."""
STEAL: Final = 0.05
"""As well as one of which the hypervisor took this share."""
NOTE: Final = (
    "Differences under 8 % are noise. A step is clean when others used less than 6 % of the machine and less than 5 % "
    "was stolen; the first step of each run is never counted. Time vs loop: median over rounds of the ratio of the two "
    "medians of a round (lowest - highest). MB are 10^6 bytes. Start: seconds from the start of the process to the end "
    "of its first step, first round / median of the later ones (compilers then find their cache)."
)
HEADER: Final = ("peer", "tok/s median", "s/step median (min)", "clean a/b", "time vs loop", "share of roof",
                 "peak RSS MB", "RSS vs loop", "start to 1st step s")  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One process of one peer."""

    peer: str
    round: int
    start: float
    """Seconds from the start of the process to the end of its first step."""
    lines: list[dict[str, Any]]

    @property
    def clean(self) -> list[float]:
        """Wall seconds of the clean steps."""
        return [line["wall"] for line in self.lines[1:] if line["foreign"] < FOREIGN and line["steal"] < STEAL]


def summary(peer: str, runs: Sequence[Run], workload: Workload, roof: float) -> dict[str, Any]:
    """The numbers of a row; None where there is nothing to say."""
    mine = [run for run in runs if run.peer == peer]
    clean = [wall for run in mine for wall in run.clean]
    middle = median(clean) if clean else None
    rate = workload.tokens / middle if middle else None
    ratios = paired(mine, [run for run in runs if run.peer == "loop"])
    peak, loop_peak = median_peak(runs, peer), median_peak(runs, "loop")
    starts = [run.start for run in sorted(mine, key=lambda run: run.round)]
    return {
        "peer": peer,
        "tokens_per_second": rate,
        "seconds_per_step": middle,
        "seconds_per_step_min": min(clean, default=None),
        "clean": len(clean),
        "steps": sum(len(run.lines) - 1 for run in mine),
        "time_vs_loop": median(ratios) if ratios else None,
        "time_vs_loop_by_round": ratios,
        "share_of_roof": rate * workload.flops / roof if rate else None,
        "peak_rss": peak,
        "rss_vs_loop": peak / loop_peak if peak and loop_peak else None,
        "start_first": starts[0],
        "start_later": median(starts[1:]) if len(starts) > 1 else None,
    }


def median_peak(runs: Sequence[Run], peer: str) -> float | None:
    """Median over a peer's runs of the peak at the end of training, in bytes."""
    peaks = [run.lines[-1]["peak_rss"] for run in runs if run.peer == peer]
    return median(peaks) if peaks else None


def paired(mine: Sequence[Run], base: Sequence[Run]) -> list[float]:
    """Ratio of the medians of each round in which both have a clean step."""
    loop = {run.round: run.clean for run in base}
    return [median(run.clean) / median(loop[run.round]) for run in mine if run.clean and loop.get(run.round)]


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table, fastest first, and what to know to read it."""
    rows = sorted(rows, key=lambda row: row["seconds_per_step"] or float("inf"))
    cells = [HEADER, ["---"] * len(HEADER), *map(columns, rows)]
    return "\n".join([*("| " + " | ".join(line) + " |" for line in cells), "", NOTE])


def columns(row: dict[str, Any]) -> list[str]:
    """A row as text."""
    ratios = row["time_vs_loop_by_round"]
    spread = f" ({min(ratios):.2f} - {max(ratios):.2f})" if ratios else ""
    return [
        row["peer"],
        text(row["tokens_per_second"], ".0f"),
        f"{text(row['seconds_per_step'], '.3f')} ({text(row['seconds_per_step_min'], '.3f')})",
        f"{row['clean']}/{row['steps']}",
        text(row["time_vs_loop"], ".2f") + spread,
        text(row["share_of_roof"], ".2f"),
        text(row["peak_rss"] / 1e6, ".0f"),
        text(row["rss_vs_loop"], ".2f"),
        f"{row['start_first']:.1f} / {text(row['start_later'], '.1f')}",
    ]


def text(value: float | None, form: str) -> str:
    """A number, or a dash."""
    return "-" if value is None else format(value, form)
