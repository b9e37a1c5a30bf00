# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Stragglers: ranks that are slower than the others, for which all of them wait in every step.

Ranks that train one batch together end each step together, so that the time of a step says nothing of who was slow.
What is compared is each rank's own time, which `stopwatch` measures.
"""

from __future__ import annotations

import socket
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from scrimp.stopwatch import Stopwatch
    from scrimp.world import World

EVERY: Final = 10
"""Steps between comparisons. A rank tells of the median of them, which a single slow step does not move."""
RATIO: Final = 1.3
"""How many times the median of the others a slow rank takes."""
SHARE: Final = 0.05
"""Which share of a step the others wait for it: of what costs less there is nothing to say."""
TIMES: Final = 3
"""Comparisons in a row in which the same rank is slow before it is reported."""


@dataclass(frozen=True)
class Slowest:
    """The slowest rank of some steps.

    Attributes:
        ratio: its own time over the median of the other ranks'.
        share: of a step, in which those wait for it.
    """

    rank: int
    ratio: float
    share: float
    host: str = ""

    @property
    def slow(self) -> bool:
        """Whether it is worth a word."""
        return self.ratio > RATIO and self.share > SHARE

    def fields(self) -> dict[str, Any]:
        """For a line of metrics.jsonl."""
        return {"slowest_rank": self.rank, "slowest_over_median": self.ratio, "slowest_share": self.share,
                "slowest_host": self.host}  # fmt: skip

    @classmethod
    def of(cls, line: dict[str, Any]) -> Slowest | None:
        """From such a line, if it has a comparison."""
        if "slowest_rank" not in line:
            return None
        ratio, share = float(line["slowest_over_median"]), float(line["slowest_share"])
        return cls(int(line["slowest_rank"]), ratio, share, str(line["slowest_host"]))

    def __str__(self) -> str:
        place = f" on {self.host}" if self.host else ""
        return (
            f"rank {self.rank}{place} is slower than the others: its own part of a step takes {self.ratio:.1f} times "
            f"the median of theirs, and they wait for it {self.share:.0%} of the time. Look at what else runs there, "
            "at the device's clocks and temperature, and at the disk its data is on."
        )


def compared(own: Sequence[float], step: float, hosts: Sequence[str] = ()) -> Slowest:
    """The slowest of at least two ranks.

    Args:
        own: seconds of each rank's own part of a step.
        step: seconds of a whole step.
    """
    rank = max(range(len(own)), key=own.__getitem__)
    others = statistics.median(seconds for i, seconds in enumerate(own) if i != rank)
    ratio = own[rank] / others if others else 1.0
    return Slowest(rank, ratio, (own[rank] - others) / max(step, 1e-9), hosts[rank] if hosts else "")


def stragglers(found: Sequence[Slowest]) -> dict[int, Slowest]:
    """Ranks that were slow in `TIMES` comparisons in a row, each as in the middle one of the first such row."""
    slow: dict[int, Slowest] = {}
    for i in range(len(found) - TIMES + 1):
        row = found[i : i + TIMES]
        if all(one.slow and one.rank == row[0].rank for one in row):
            slow.setdefault(row[0].rank, sorted(row, key=lambda one: one.ratio)[TIMES // 2])
    return slow


@dataclass
class Lookout:
    """Compares ranks while they train, and reports each straggler once."""

    hosts: list[str] = field(default_factory=list[str])
    """Of each rank, once they have been compared."""
    seconds: list[float] = field(default_factory=list[float])
    recent: list[Slowest] = field(default_factory=list[Slowest])
    reported: set[int] = field(default_factory=set[int])

    def compare(self, step: int, seconds: float, clock: Stopwatch, world: World) -> Slowest | None:
        """After a step: the slowest rank, where it is time for a comparison. All ranks must call.

        Args:
            step: its number. seconds: how long it took.
        """
        if not clock.steps:
            return None
        self.seconds.append(seconds)
        if step % EVERY:
            return None
        self.hosts = self.hosts or world.gathered(socket.gethostname())
        found = compared(world.numbers(clock.read()), statistics.median(self.seconds), self.hosts)
        self.seconds.clear()
        self.recent = [*self.recent, found][-TIMES:]
        return found

    def news(self) -> list[Slowest]:
        """Stragglers that have not been reported yet."""
        new = [one for rank, one in stragglers(self.recent).items() if rank not in self.reported]
        self.reported |= {one.rank for one in new}
        return new
