# pyright: strict
"""How much memory a process on this machine may still take: the least of what the system, cgroups and ulimit leave."""

from __future__ import annotations

import os
from pathlib import Path

from scrimp.errors import UserError


def available(root: Path = Path("/")) -> int:
    """Bytes that a process may take on top of what it holds; 0 when a limit is reached.

    Args:
        root: of the system's files, for tests.
    """
    return min([*memory_free(root), *cgroup_limits(root), *address_limits(root)], default=1 << 60)


def memory_free(root: Path = Path("/")) -> list[int]:
    """Bytes that the system could give, if it says so."""
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return [int(line.split()[1]) * 1024]
    except OSError:
        pass
    pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else -1
    return [pages * os.sysconf("SC_PAGE_SIZE")] if pages > 0 else []


def cgroup_limits(root: Path = Path("/")) -> list[int]:
    """What the cgroups of this process leave, from its own up to the root."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found: list[int] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / ("sys/fs/cgroup/memory" if controllers else "sys/fs/cgroup")
        folder = top / path.lstrip("/")
        for place in (folder, *folder.parents):
            if controllers:
                found += _left(place, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
            else:
                found += _left(place, "memory.max", "memory.current") + _left(place, "memory.high", "memory.current")
            if place == top:
                break
    return found


def _left(folder: Path, limit: str, usage: str, prefix: str = "") -> list[int]:
    """What one cgroup leaves. The page cache of files is given back under pressure, that of tmpfs is not."""
    try:
        most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
        rows = (line.split() for line in (folder / "memory.stat").read_text().splitlines() if line)
        cache = sum(int(n) for name, n in rows if name in (f"{prefix}inactive_file", f"{prefix}active_file"))
    except (OSError, ValueError):
        return []
    return [] if most == "max" or int(most) >= 1 << 60 else [max(int(most) - max(used - cache, 0), 0)]


def address_limits(root: Path = Path("/")) -> list[int]:
    """What ulimit -v and -d leave."""
    try:
        import resource
    except ImportError:  # Windows has none.
        return []
    found: list[int] = []
    for kind, column in ((resource.RLIMIT_AS, 0), (resource.RLIMIT_DATA, 5)):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            found.append(max(soft - _pages(root, column), 0))
    return found


def resident(root: Path = Path("/")) -> int:
    """Bytes of this process that are in memory now; 0 where the system does not tell."""
    return _pages(root, 1)


def _pages(root: Path, column: int) -> int:
    """A column of /proc/self/statm in bytes."""
    try:
        return int((root / "proc/self/statm").read_text().split()[column]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def size_of(text: str, where: str = "--fit") -> int:
    """Bytes of a text such as 16GB, 24GiB or 800MB.

    Raises:
        UserError: if it is none.
    """
    units = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "b": 1}
    lower = text.strip().lower()
    for unit in sorted(units, key=len, reverse=True):
        if lower.endswith(unit):
            try:
                value = int(float(lower.removesuffix(unit)) * units[unit])
            except ValueError:
                break
            if value > 0:
                return value
            break
    raise UserError(f"`{text}` is not a size.", where, "Write it as 16GB or 24GiB.")
