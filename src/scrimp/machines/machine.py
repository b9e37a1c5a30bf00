# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Machines by name. Figures are the makers' own, for dense matrices; `here` is this machine, as `scrimp probe` found it.

What a data sheet promises is not what a training step gets. `PRODUCTS` and `STREAM` are the shares that are assumed of
a machine nobody probed; they are guesses, and a plan says so.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from scrimp.errors import UserError, did_you_mean
from scrimp.machines.rates import Rates

PRODUCTS: Final = 0.7
"""Share of a data sheet's FLOP/s that large matrix products are assumed to reach."""
STREAM: Final = 0.8
"""Share of a data sheet's bandwidth that elementwise operators are assumed to reach."""
GB: Final = 10**9
GIB: Final = 2**30
T: Final = 1e12


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One device and what connects it to others like it."""

    name: str
    device: str
    """cpu, cuda or mps."""
    memory: int
    """Bytes."""
    flops: Mapping[str, float]
    """dtype -> FLOP/s of dense products. A dtype that is missing runs at float32's rate or not at all."""
    bandwidth: float
    """Bytes/s of its memory."""
    link: float = 0.0
    """Bytes/s to another device of the same machine, in one direction; 0 when unknown."""
    power: float | None = None
    """Watts at full load."""
    overhead: float = 5e-6
    """Seconds to launch an operator, which a GPU does while it computes."""
    rates: Rates | None = field(default=None, compare=False)
    """What was measured; None where nobody probed."""

    @property
    def probed(self) -> bool:
        """Whether times rest on measurements."""
        return self.rates is not None


def _gpu(name: str, memory: float, half: float, single: float, bandwidth: float, watts: float, link: float,
         bf16: bool = True) -> Machine:  # fmt: skip
    flops = {"float16": half * T, "float32": single * T}
    if bf16:
        flops["bfloat16"] = half * T
    return Machine(name=name, device="cuda", memory=int(memory * GIB), flops=flops, bandwidth=bandwidth * GB,
                   power=watts, link=link * GB)  # fmt: skip


def _apple(name: str, memory: float, single: float, bandwidth: float) -> Machine:
    flops = {"float16": single * T, "bfloat16": single * T, "float32": single * T}
    return Machine(name=name, device="mps", memory=int(memory * GIB), flops=flops, bandwidth=bandwidth * GB)


# Half-precision products accumulate in float32. Links: NVLink in one direction, or PCIe.
KNOWN: Final[dict[str, Machine]] = {
    m.name: m
    for m in (
        _gpu("H100", 80, 989.5, 67.0, 3350, 700, 450),
        _gpu("H200", 141, 989.5, 67.0, 4800, 700, 450),
        _gpu("A100-40", 40, 312.0, 19.5, 1555, 400, 300),
        _gpu("A100-80", 80, 312.0, 19.5, 2039, 400, 300),
        _gpu("L40S", 48, 362.0, 91.6, 864, 350, 32),
        _gpu("L4", 24, 121.0, 30.3, 300, 72, 32),
        _gpu("V100", 32, 125.0, 15.7, 900, 300, 150, bf16=False),
        _gpu("T4", 16, 65.0, 8.1, 320, 70, 16, bf16=False),
        _gpu("RTX3090", 24, 71.0, 35.6, 936, 350, 32),
        _gpu("RTX4090", 24, 165.2, 82.6, 1008, 450, 32),
        _gpu("RTX5090", 32, 209.5, 104.8, 1792, 575, 64),
        _apple("M2-Max", 32, 13.6, 400),
        _apple("M4-Max", 64, 18.4, 546),
    )
}
"""By name."""


def machine(name: str = "here") -> Machine:
    """A machine by name, in any case.

    Raises:
        UserError: for an unknown one.
    """
    if name == "here":
        return here()
    found = {key.lower(): value for key, value in KNOWN.items()}.get(name.lower())
    if found is None:
        raise UserError(f"there is no machine `{name}`.", "--machine", did_you_mean(name, ["here", *KNOWN]))
    return found


def here() -> Machine:
    """This machine: its GPU if it has one, else its CPU, with what `scrimp probe` measured if it was run."""
    import torch

    from scrimp.machines.probe import remembered

    rates = remembered()
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        like = next((m for m in KNOWN.values() if m.name.split("-")[0].replace("RTX", "RTX ") in properties.name), None)
        flops = dict(rates.flops()) if rates is not None else dict(like.flops) if like is not None else {"float32": T}
        return Machine(name="here", device="cuda", memory=properties.total_memory, flops=flops,
                       bandwidth=rates.bandwidth() if rates is not None else like.bandwidth if like else 3e11,
                       power=like.power if like is not None else None, rates=rates)  # fmt: skip
    if rates is not None:
        return Machine(name="here", device="cpu", memory=available(), flops=rates.flops(), bandwidth=rates.bandwidth(),
                       overhead=rates.overhead, rates=rates)  # fmt: skip
    from scrimp.meter import gemm_rate
    from scrimp.products import fast_products

    with fast_products():
        rate = gemm_rate(torch.device("cpu"), seconds=0.1)
    flops = {"float32": rate, "float64": rate / 2}
    return Machine(name="here", device="cpu", memory=available(), flops=flops, bandwidth=1.2e10, overhead=1e-5)


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
