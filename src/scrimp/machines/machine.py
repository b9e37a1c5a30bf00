# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Machines by name. Figures are the makers', for dense matrices; `here` is this machine, as `scrimp probe` found it.

What a data sheet promises is not what a training step gets. `PRODUCTS` and `STREAM` are the shares that are assumed of
a machine nobody probed; they are guesses, and a plan says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from scrimp.errors import UserError, did_you_mean
from scrimp.limits import available, resident
from scrimp.machines.memory import CONTEXT, RESIDENT
from scrimp.machines.rates import Rates
from scrimp.machines.store import remembered

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
    node: int = 0
    """Devices of one machine; 0 when unknown, and then all are taken to be in one."""
    network: float = 0.0
    """Bytes/s from each device to other machines, in one direction; 0 when unknown."""
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

    def speed(self, peers: int, stride: int, alone: bool = False) -> float:
        """Bytes/s that each of some ranks sends to the others; 0 when unknown.

        Ranks are numbered machine by machine. Those of a group that are in one machine send to others through the
        adapters of all of them, as rings of collectives do.

        Args:
            peers: how many ranks.
            stride: from one of them to the next.
            alone: whether each sends to a single other rank.
        """
        if not self.node or peers * stride <= self.node:
            return self.link
        return min(self.link, self.network * (1 if alone else max(1, self.node // stride)))


def _gpu(name: str, memory: float, half: float, single: float, bandwidth: float, watts: float, link: float,
         node: int = 0, network: float = 0.0, bf16: bool = True) -> Machine:  # fmt: skip
    flops = {"float16": half * T, "float32": single * T}
    if bf16:
        flops["bfloat16"] = half * T
    return Machine(name=name, device="cuda", memory=int(memory * GIB), flops=flops, bandwidth=bandwidth * GB,
                   power=watts, link=link * GB, node=node, network=network * GB)  # fmt: skip


def _apple(name: str, memory: float, single: float, bandwidth: float) -> Machine:
    flops = {"float16": single * T, "bfloat16": single * T, "float32": single * T}
    return Machine(name=name, device="mps", memory=int(memory * GIB), flops=flops, bandwidth=bandwidth * GB)


# Half-precision products accumulate in float32. Links: NVLink in one direction, or PCIe. Machines and their networks
# are those of the maker's DGX: 8 adapters of 400 Gb/s for 8 H100 or H200, 8 of 200 Gb/s for 8 A100.
KNOWN: Final[dict[str, Machine]] = {
    m.name: m
    for m in (
        _gpu("H100", 80, 989.5, 67.0, 3350, 700, 450, 8, 50),
        _gpu("H200", 141, 989.5, 67.0, 4800, 700, 450, 8, 50),
        _gpu("A100-40", 40, 312.0, 19.5, 1555, 400, 300, 8, 25),
        _gpu("A100-80", 80, 312.0, 19.5, 2039, 400, 300, 8, 25),
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

    return free_here("cuda" if torch.cuda.is_available() else "cpu")


def free_here(device: str) -> Machine:
    """A device of this machine, with the memory that a run of this process may have on it."""
    return _cuda_here() if device == "cuda" else _cpu_here()


def _cpu_here() -> Machine:
    """What a process holds before it has a model is part of what a plan counts, hence of what it may have."""
    rates = remembered("cpu")
    base = rates.resident if rates is not None else RESIDENT
    memory = available() + min(resident(), base)
    if rates is not None:
        return Machine(name="here", device="cpu", memory=memory, flops=rates.flops(), bandwidth=rates.bandwidth(),
                       overhead=rates.overhead, rates=rates)  # fmt: skip
    import torch

    from scrimp.meter import gemm_rate
    from scrimp.products import fast_products

    with fast_products():
        rate = gemm_rate(torch.device("cpu"), seconds=0.1)
    flops = {"float32": rate, "float64": rate / 2}
    return Machine(name="here", device="cpu", memory=memory, flops=flops, bandwidth=1.2e10, overhead=1e-5)


def _cuda_here() -> Machine:
    """Free memory is what the driver has, what torch caches, and the context, which this process has made by asking."""
    import torch

    free, _ = torch.cuda.mem_get_info()
    memory = free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated() + CONTEXT
    rates, like = remembered("cuda"), alike(torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1])
    if rates is not None:
        return Machine(name="here", device="cuda", memory=memory, flops=rates.flops(), bandwidth=rates.bandwidth(),
                       power=like.power if like else None, link=like.link if like else 0.0,
                       node=like.node if like else 0, network=like.network if like else 0.0,
                       rates=rates)  # fmt: skip
    if like is not None:
        return replace(like, name="here", memory=memory)
    return Machine(name="here", device="cuda", memory=memory, flops={"float32": 1e13}, bandwidth=3e11)


def alike(name: str, memory: int) -> Machine | None:
    """The known machine of a driver's name such as `NVIDIA A100-SXM4-80GB`, the nearest in memory."""
    words = name.replace("-", " ").split()
    found = [m for m in KNOWN.values() if m.name.split("-")[0].replace("RTX", "") in words]
    return min(found, key=lambda m: abs(m.memory - memory), default=None)
