"""A live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from scrimp.meter import flops_per_token, gemm_rate

if TYPE_CHECKING:
    from scrimp.run import Run

KNOWN: Final = ("step", "loss", "perplexity")
"""Fields of a validation that are no metric of their own to show beside the loss."""


class Progress:
    """Listens to a run: loss, tokens a second, share of the machine's matrix-product rate, peak memory, time left.

    Args:
        stream: where to write.
        every: seconds between plain lines.
        label: shown before the numbers.
    """

    def __init__(self, stream: TextIO, every: float = 5.0, label: str = "") -> None:
        self.console = Console(file=stream, highlight=False)
        self.every, self.label = every, label
        self.rate = self.flops = 0.0
        self.tokens, self.seconds, self.weight, self.shown, self.last = 0.0, 0.0, 0.0, 0.0, 0
        self.end, self.validation, self.whole = 1, "", False
        self.folder: Path | None = None
        self.bar: Bar | None = None
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[text]}"))
            self.bar = Bar(*columns, console=self.console)
            self.task = self.bar.add_task(label, total=1, text="")

    def __enter__(self) -> Self:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, event: str, fields: dict[str, Any]) -> None:
        """Hear one event of `scrimp.train`."""
        if event == "stage":
            self._stage(fields)
        elif event == "step":
            self._step(fields)
        elif event == "validation":
            more = [f"{name} {value:.4f}" for name, value in fields.items() if name not in KNOWN]
            self.validation = "  ".join([f"  held-out {fields['loss']:.4f}", *more])
            if self.bar is None:
                self.console.print(f"{self.label}step {fields['step']}{self.validation}", soft_wrap=True)
        elif event == "note":
            self.console.print(self.label + fields["text"], soft_wrap=True, markup=False)
        elif event == "checkpoint":
            self.folder = fields["path"].parent.parent
        elif event == "end":
            self._end(fields)

    def _stage(self, fields: dict[str, Any]) -> None:
        run = fields["run"]
        self.end, self.last = run.clock.end, run.clock.position
        # An image counts as one token, of which its model makes many: neither word nor share would be right.
        self.whole = getattr(run.data.train, "context", 0) == 1
        self.flops = flops_per_token(run.model, getattr(getattr(run.model, "config", None), "context", 0))
        self.rate = self.rate or gemm_rate(run.device, precision(run))
        if self.bar is not None:
            self.bar.update(self.task, total=self.end, completed=run.clock.position)

    def _step(self, fields: dict[str, Any]) -> None:
        # The first step of a stage pays for warm-up; a moving average forgets it soon.
        keep = 0.9 if self.tokens else 0.0
        self.tokens = keep * self.tokens + fields["tokens"]
        self.seconds = keep * self.seconds + fields["seconds"]
        speed = self.tokens / max(self.seconds, 1e-9)
        self.weight = keep * self.weight + 1
        moved = fields["position"] - self.last
        self.last = fields["position"]
        left = (self.end - fields["position"]) / max(moved, 1) * self.seconds / self.weight
        pace = f"{speed:,.0f} tok/s  {100 * speed * self.flops / self.rate:.0f} % of peak"
        pace = f"{speed:,.0f} items/s" if self.whole else pace
        text = (
            f"step {fields['step']}  loss {fields['loss']:.4f}{self.validation}  {pace}"
            f"  {fields['peak_bytes'] / 2**20:,.0f} MiB  {duration(left)} left"
        )
        if self.bar is not None:
            self.bar.update(self.task, completed=fields["position"], text=text)
        elif time.monotonic() - self.shown >= self.every or fields["position"] >= self.end:
            self.shown = time.monotonic()
            self.console.print(self.label + text, soft_wrap=True)

    def _end(self, fields: dict[str, Any]) -> None:
        if self.bar is not None:
            self.bar.refresh()
        loss = f": held-out loss {fields['loss']:.4f}" if fields.get("loss") is not None else ""
        place = f", in {self.folder}" if self.folder is not None else ""
        self.console.print(f"{self.label}{fields['reason']}{loss}{place}", soft_wrap=True, markup=False)
        for finding in fields["run"].findings.values():
            self.console.print(self.label + finding, soft_wrap=True, markup=False)
        if fields["text"]:
            self.console.print(fields["text"], markup=False)


def precision(run: Run) -> torch.dtype:
    """The type in which a run multiplies: its peak is the one to compare with."""
    for technique in run.recipe.techniques:
        if "compute precision" in technique.card.sets:
            return getattr(torch, getattr(technique, "dtype"))  # noqa: B009
    return getattr(torch, run.recipe.dtype)


def duration(seconds: float) -> str:
    """Seconds for a reader."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
