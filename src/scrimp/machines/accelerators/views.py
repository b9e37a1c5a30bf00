# pyright: strict
"""Validations and simulations as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rich.console import Group
from rich.table import Table

from scrimp.machines.accelerators.report import Report
from scrimp.machines.accelerators.validation import WORDS, Row

CLASSES: Final = {
    "L0": "L0: closed forms, nothing free",
    "L1": "L1: ratios within a machine",
    "L2": "L2: machine against machine",
    "L3": "L3: against CPUs and GPUs, whose efficiency is fitted",
}
UNITS: Final = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))


def validation(rows: Sequence[Row]) -> Group:
    """Every class as a table, and how many rows of it are what."""
    return Group(*(part for kind in CLASSES for part in (_table(kind, rows), summary(kind, rows), "")))


def _table(kind: str, rows: Sequence[Row]) -> Table:
    table = Table(title=CLASSES[kind], title_justify="left", show_edge=False, pad_edge=False, box=None, padding=(0, 1))
    for name in ("machine", "quantity"):
        table.add_column(name, overflow="fold")
    for name in ("value", "simulated", "error", "allowed"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold")
    for row in rows:
        if row.reference.kind == kind:
            table.add_row(*cells(row))
    return table


def cells(row: Row) -> list[str]:
    """A row: what was said, what was found, and whether they agree."""
    said = row.reference
    value = f"{figure(said.value)} {said.unit}".rstrip()
    simulated = "" if row.found is None or said.fit else figure(row.found)
    error = "" if row.error is None or said.fit else f"{row.error:+.1%}"
    fitted = f"{'' if said.fit else '; fitted'} on {said.fitted_on}" if said.fitted_on else ""
    return [said.machine, said.quantity, f"{value} {WORDS[said.tag]}", simulated, error,
            "" if row.error is None or said.fit else f"{said.tolerance:.2g}",
            row.verdict + fitted + (f"; {said.note}" if said.note else "")]  # fmt: skip


def summary(kind: str, rows: Sequence[Row]) -> str:
    """How many rows of a class have each verdict."""
    found = [row.verdict for row in rows if row.reference.kind == kind]
    return ", ".join(f"{found.count(verdict)} {verdict}" for verdict in dict.fromkeys(found))


def figure(value: float) -> str:
    """Whole numbers as they are, others with five digits."""
    return f"{value:,.0f}" if value == round(value) and abs(value) >= 1000 else f"{value:.5g}"


def simulation(report: Report, baseline: Report | None, asked: str) -> str:
    """What a machine needs for a run's attention, in lines."""
    lines = [
        f"{asked} on {report.machine}",
        f"  {report.cycles:,.0f} cycles, {report.seconds * 1e6:,.4g} us",
        f"  moved: {', '.join(f'{name} {_bytes(amount)}' for name, amount in report.bytes.items())}",
        f"  in use: {', '.join(f'{name} {share:.1%}' for name, share in report.utilization.items())}",
    ]
    for name, joules in (("power x time", report.joules_by_power), ("events x table", report.joules_by_events)):
        if joules is not None:
            lines.append(f"  energy, {name}: {joules * 1e6:,.4g} uJ")
    if len(report.parts) > 1:
        lines.append("  parts by themselves: " + ", ".join(f"{n} {c:,.0f}" for n, c in report.parts.items()))
    if baseline is not None:
        lines.append(f"  {report.speedup(baseline):.3g} times as fast as {baseline.machine}, "
                     f"which takes {baseline.seconds * 1e6:,.4g} us")  # fmt: skip
    for each in (report, baseline):
        if each is not None and each.fitted:
            lines.append(f"  fitted: {each.machine}, on {each.fitted}")
    notes = dict.fromkeys([*report.notes, *(baseline.notes if baseline is not None else [])])
    return "\n".join([*lines, *(f"Note: {note}" for note in notes)])


def _bytes(amount: float) -> str:
    for unit, scale in UNITS:
        if amount >= scale:
            return f"{amount / scale:.4g} {unit}B"
    return f"{amount:.0f} B"
