"""Energy that the machine's processors have used, where the system lets one read it.

Linux shows the counters of Intel's and AMD's processors (RAPL) in microjoules under /sys/class/powercap, one for each
package. They are often readable by root only, and not at all in virtual machines. They count everything that runs on
the machine, not this process alone; memory, graphics cards and the power supply's losses are not in them.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path("/sys/class/powercap")


class Energy:
    """Joules between two readings.

    Args:
        root: folder of the counters.
    """

    def __init__(self, root: Path = ROOT) -> None:
        # `intel-rapl:0:0` is a part of the package `intel-rapl:0`, and `psys` is the whole platform: both would be
        # counted twice.
        self.packages = sorted(p for p in root.glob("*-rapl:*") if p.name.count(":") == 1 and _named(p))
        self.before = self._counters()

    def joules(self) -> float | None:
        """Since the last reading, over all packages; None if there are no counters, or they cannot be read."""
        now, before = self._counters(), self.before
        self.before = now
        if now is None or before is None:
            return None
        return sum((after - start) % (span + 1) for (after, span), (start, _) in zip(now, before, strict=True)) / 1e6

    def _counters(self) -> list[tuple[int, int]] | None:
        """(microjoules, largest value before it begins at 0 again) of each package."""
        names = ("energy_uj", "max_energy_range_uj")
        try:
            found = [tuple(int((package / name).read_text()) for name in names) for package in self.packages]
        except (OSError, ValueError):
            return None
        return [(used, span) for used, span in found] or None


def _named(place: Path) -> bool:
    """Whether a counter is that of a package."""
    try:
        return (place / "name").read_text().startswith("package")
    except OSError:
        return False
