# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Descriptions of accelerators: what a YAML file says of an array, its units, buffers, memory, energy and sources."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

from scrimp.errors import UserError, did_you_mean
from scrimp.machines.accelerators.engine import MEMORY

ARRAY: Final = "array"
"""Resource of products at the array's own width; `array8` is that of products of 8 bits on it."""
TAGS: Final = {
    "V": "read in the paper, its repository or an artifact",
    "S": "read in a later paper",
    "C": "computed from others",
    "R": "recalled, not checked",
}
"""What the letters in `sources` and `references.yaml` mean."""


class Part(BaseModel):
    """Anything in a description: frozen, and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Array(Part):
    """Multipliers that work on the same product."""

    rows: PositiveInt
    columns: PositiveInt
    bits: PositiveInt
    gain: dict[int, PositiveFloat] = {}
    """Bits -> how many products of that width the array does where it does one of its own."""

    @property
    def macs(self) -> int:
        """Products a cycle."""
        return self.rows * self.columns


class Unit(Part):
    """Whatever is no product: exponentials, hashes, sorters, decoders."""

    rate: PositiveFloat
    """Operations a cycle."""
    latency: float = Field(0.0, ge=0)
    """Cycles from an operand to its result."""


class Buffer(Part):
    """Memory on the chip."""

    bytes: PositiveInt
    rate: PositiveFloat | None = None
    """Bytes a cycle; None where no source says it, and it is never the limit."""
    double: bool = False
    """Whether it is filled while it is read."""


class Memory(Part):
    """Memory outside of the chip."""

    bandwidth: PositiveFloat
    """Bytes/s."""
    burst: PositiveInt = 64
    """Bytes of the smallest access."""
    latency: float = Field(0.0, ge=0)
    """Seconds."""
    channels: PositiveInt = 1


class Energy(Part):
    """Picojoules an event, at 45 nm and 0.9 V; those on the chip are scaled to its node and voltage."""

    node: PositiveFloat
    """Nanometers."""
    volts: PositiveFloat = 0.9
    picojoules: dict[str, PositiveFloat]
    """Resource -> an operation; level of memory -> a byte."""

    def joules(self, work: Mapping[str, float], traffic: Mapping[str, float]) -> float:
        """Of so many operations and bytes; what the table lacks counts nothing."""
        scale = self.node / 45 * (self.volts / 0.9) ** 2
        total = 0.0
        for name, amount in [*work.items(), *traffic.items()]:
            total += amount * self.picojoules.get(name, 0.0) * (1.0 if name == MEMORY else scale)
        return total * 1e-12


class Fact(Part):
    """A published figure of the machine."""

    value: float
    unit: str = ""
    source: str
    tag: Literal["V", "S", "C", "R"]


class Accelerator(Part):
    """A machine that the simulator knows."""

    name: str
    about: str
    dataflow: str
    """Name of the function that maps traces to stages."""
    clock: PositiveFloat
    """Hz."""
    array: Array
    units: dict[str, Unit] = {}
    buffers: dict[str, Buffer] = {}
    memory: Memory
    energy: Energy | None = None
    power: Fact | None = None
    """Watts; energy is also told as power times time."""
    area: Fact | None = None
    """Square millimeters."""
    settings: dict[str, float] = {}
    """Numbers that its dataflow asks for."""
    fitted: str = ""
    """What calibrated settings were fitted on; empty where nothing was fitted."""
    sources: dict[str, str] = {}
    """Key or beginning of a key, such as `memory.bandwidth` -> a letter of `TAGS`, a colon, and the source."""

    def rate(self, resource: str) -> float:
        """Operations a cycle of a resource."""
        if resource.startswith(ARRAY):
            bits = int(resource.removeprefix(ARRAY) or self.array.bits)
            return self.array.macs * self.array.gain.get(bits, 1.0)
        return self.unit(resource).rate

    def bandwidth(self, level: str) -> float:
        """Bytes a cycle of a level."""
        if level == MEMORY:
            return self.memory.bandwidth / self.clock
        return self.buffer(level).rate or float("inf")

    def latency(self) -> float:
        """Cycles until memory answers."""
        return self.memory.latency * self.clock

    def unit(self, name: str) -> Unit:
        """A unit by name.

        Raises:
            UserError: if the description has none.
        """
        return self._named("units", self.units, name)

    def buffer(self, name: str) -> Buffer:
        """A buffer by name.

        Raises:
            UserError: if the description has none.
        """
        return self._named("buffers", self.buffers, name)

    def setting(self, name: str) -> float:
        """A number that the dataflow needs.

        Raises:
            UserError: if the description lacks it.
        """
        return self._named("settings", self.settings, name)

    def count(self, name: str) -> int:
        """A setting that is a whole number."""
        return int(self.setting(name))

    def tags(self) -> dict[str, str]:
        """Path of each number that the description gives -> the letter of its source, empty where it names none."""
        said = {"power": self.power, "area": self.area}
        found = {name: fact.tag for name, fact in said.items() if fact is not None}
        given = self.model_dump(exclude={"power", "area", "sources"}, exclude_unset=True)
        for path in _numbers(given):
            near = [key for key in self.sources if f"{path}.".startswith(f"{key}.")]
            found[path] = self.sources[max(near, key=len)][0] if near else ""
        return found

    def _named(self, key: str, table: Mapping[str, Any], name: str) -> Any:
        if name not in table:
            what = f"the dataflow `{self.dataflow}` needs `{key}.{name}`."
            raise UserError(what, self.name, f"Add it under `{key}` of the description.")
        return table[name]


def known() -> list[str]:
    """Names of the descriptions that come with the package."""
    return sorted(Path(f.name).stem for f in _folder().iterdir() if f.name.endswith(".yaml"))


@cache
def accelerator(name: str) -> Accelerator:
    """A machine by name, or by the path of a description.

    Raises:
        UserError: if there is none, or the description is faulty.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        try:
            return described(path.read_text(encoding="utf-8"), path.stem, name)
        except OSError as error:
            raise UserError(f"cannot be read: {error.strerror}.", name) from None
    names = known()
    if name.lower() not in names:
        fix = did_you_mean(name, names, listed=len(names)) + " Or give a description: a path that ends in .yaml."
        raise UserError(f"there is no accelerator `{name}`.", "--machine", fix)
    return described(_raw(name.lower()), name.lower(), f"{name.lower()}.yaml")


def described(text: str, name: str, where: str) -> Accelerator:
    """A machine from the text of its description.

    Raises:
        UserError: with every fault of it.
    """
    from scrimp.machines.accelerators.dataflows import dataflow

    raw = _mapping(text, where)
    raw = _inherited(raw, where)
    try:
        found = Accelerator.model_validate({"name": name} | raw)
    except ValidationError as error:
        faults = "; ".join(_fault(each) for each in error.errors())
        raise UserError(f"{faults}.", where, "Compare with a description that comes with Scrimp.") from None
    dataflow(found.dataflow, where)
    return found


def _mapping(text: str, where: str) -> dict[str, Any]:
    from scrimp.reading import Loader

    try:
        raw = yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" in line {mark.line + 1}" if mark else ""
        raise UserError(f"is no YAML{place}: {getattr(error, 'problem', error)}.", where) from None
    if not isinstance(raw, dict):
        raise UserError("is no mapping of keys to values.", where)
    return raw


def _inherited(raw: dict[str, Any], where: str, depth: int = 0) -> dict[str, Any]:
    """With what the machine under `like` says and this one does not."""
    like = raw.pop("like", None)
    if like is None:
        return raw
    if like not in known() or depth > 4:
        fix = did_you_mean(str(like), known())
        raise UserError(f"`like: {like}` is no machine that comes with Scrimp.", where, fix)
    return _merged(_inherited(_mapping(_raw(like), f"{like}.yaml"), where, depth + 1), raw)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Mappings key by key; of anything else, the second."""
    both = {k: _merged(base[k], v) if isinstance(v, dict) and isinstance(base.get(k), dict) else v
            for k, v in over.items()}  # fmt: skip
    return base | both


def _fault(error: Any) -> str:
    """A fault that pydantic found, in words."""
    place = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        parts: dict[str, type[Part]] = {"array": Array, "memory": Memory, "energy": Energy, "power": Fact, "area": Fact,
                                        "units": Unit, "buffers": Buffer}  # fmt: skip
        fields = (parts[error["loc"][0]] if len(error["loc"]) > 1 else Accelerator).model_fields
        hint = did_you_mean(str(error["loc"][-1]), fields).rstrip(".")
        return f"`{place}` is no key of a description ({hint[0].lower()}{hint[1:]})"
    words = error["msg"][0].lower() + error["msg"][1:]
    return f"`{place}`: {words}" + ("" if error["type"] == "missing" else f", not {error['input']!r}")


def _numbers(raw: Any, place: str = "") -> list[str]:
    """Paths of all numbers in mappings."""
    if isinstance(raw, dict):
        return [path for key, value in raw.items() for path in _numbers(value, f"{place}.{key}".strip("."))]
    return [place] if isinstance(raw, int | float) and not isinstance(raw, bool) else []


def _raw(name: str) -> str:
    return (_folder() / f"{name}.yaml").read_text(encoding="utf-8")


def _folder() -> Any:
    return resources.files("scrimp.machines.accelerators") / "descriptions"
