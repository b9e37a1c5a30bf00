# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Machines by name. Figures are the makers', for dense matrices; `here` is this machine, as `scrimp probe` found it.

What a data sheet promises is not what a training step gets. `PRODUCTS` and `STREAM` are the shares that are assumed of
a machine nobody probed; they are guesses, and a plan says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from scrimp.errors import UserError, did_you_mean
from scrimp.limits import available
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

    return free_here("cuda" if torch.cuda.is_available() else "cpu")


def free_here(device: str) -> Machine:
    """A device of this machine, with the memory that is free on it."""
    import torch

    from scrimp.machines.probe import remembered

    rates = remembered()
    if device == "cuda":
        name = torch.cuda.get_device_name()
        like = next((m for m in KNOWN.values() if m.name.split("-")[0].replace("RTX", "RTX ") in name), None)
        flops = dict(like.flops) if like is not None else {"float32": T}
        return Machine(name="here", device="cuda", memory=torch.cuda.mem_get_info()[0],
                       flops=rates.flops() if rates is not None else flops,
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
