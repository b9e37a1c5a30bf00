# pyright: strict
"""What a machine's buffers hold, and what is said where a trace does not fit.

A design that holds all keys of a head refuses more of them: no source says how it would go on. One that fetches keys
in an order of its own fetches what does not fit again; its dataflow counts that. A buffer without a description is
taken to be large enough, and a report says so.
"""

from __future__ import annotations

from scrimp.errors import UserError
from scrimp.machines.accelerators.architecture import Accelerator


def check(machine: Accelerator, keys: int, width: int, widest: int, *names: str) -> None:
    """Whether a head's keys, and its values, fit into buffers whose lines have `widest` numbers.

    Args:
        keys: how many, of `width` numbers.
        names: of the buffers; those that the description lacks are large enough.
    Raises:
        UserError: if they do not.
    """
    if width > widest:
        what = f"its multipliers take heads of {widest} numbers at most, not {width}."
        raise UserError(
            what, machine.name, "Use narrower heads, or describe a wider one: `like` it, with another `array`."
        )
    for name in names:
        fits = held(machine, name, widest)
        if fits is not None and keys > fits:
            what = f"it holds {fits:,} {name} of {widest} numbers (`buffers.{name}`), not {keys:,}."
            fix = f"Use a shorter context, or describe a larger one: `like: {machine.name}` with other `buffers`."
            raise UserError(what, machine.name, fix)


def held(machine: Accelerator, name: str, width: int) -> int | None:
    """Lines of so many numbers that a buffer holds; half of it where it is filled while it is read. None: no limit."""
    if name not in machine.buffers:
        return None
    buffer = machine.buffers[name]
    return int(buffer.bytes // (2 if buffer.double else 1) // (width * machine.array.bits / 8))
