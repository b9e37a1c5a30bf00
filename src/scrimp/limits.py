# pyright: strict
"""How much memory a process on this machine may still take: the least of what the system, cgroups and ulimit leave."""

from __future__ import annotations

import os
import resource
from pathlib import Path


def available() -> int:
    """Bytes that a process on this machine's CPU may hold: the least of free memory, cgroup and ulimit."""
    limits = [memory_free(), *cgroup_limits(), *address_limits()]
    return min(limit for limit in limits if limit > 0)


def memory_free() -> int:
    """Bytes that the system could give."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def cgroup_limits() -> list[int]:
    """What the cgroups of this process still allow, from its own up to the root."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found: list[int] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup/memory" if controllers else "/sys/fs/cgroup")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        folder = root / path.lstrip("/")
        for place in (folder, *folder.parents):
            if place == root.parent:
                break
            found += _left(place, *names)
    return found


def _left(folder: Path, limit: str, usage: str) -> list[int]:
    try:
        most = (folder / limit).read_text().strip()
        used = int((folder / usage).read_text())
        cache = next((int(line.split()[1]) for line in (folder / "memory.stat").read_text().splitlines()
                      if line.split()[0] in ("file", "total_cache")), 0)  # fmt: skip
    except (OSError, ValueError):
        return []
    return [] if most == "max" or int(most) >= 1 << 60 else [int(most) - max(used - cache, 0)]


def address_limits() -> list[int]:
    """What ulimit -v and -d still allow."""
    found: list[int] = []
    for kind, field_ in ((resource.RLIMIT_AS, 0), (resource.RLIMIT_DATA, 5)):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            try:
                used = int(Path("/proc/self/statm").read_text().split()[field_]) * os.sysconf("SC_PAGE_SIZE")
            except OSError:
                used = 0
            found.append(max(soft - used, 1))
    return found


def resident() -> int:
    """Bytes of this process that are in memory now; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
