"""A forest plot: differences with their intervals, one row each, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from scrimp.charts import COLORS, MIDDLE, WIDTH, Point, figure, text, ticks

ROW: Final = 46
"""Height of a row."""
EDGE: Final = 14
ROOM: Final = 26
"""Letters of a name that fit beside the numbers."""
BETTER, WORSE = "\N{LEFTWARDS ARROW} better", "worse \N{RIGHTWARDS ARROW}"
REACH: Final = 4.0
"""How many times the largest difference an interval is drawn before it ends in an arrow."""


@dataclass(frozen=True)
class Effect:
    """A row of a forest plot."""

    name: str
    mean: float
    low: float | None
    high: float | None
    verdict: str
    """better, worse, or anything else for neither."""
    words: str
    """The numbers, for the reader."""


def forest(title: str, effects: Sequence[Effect], label: str) -> str:
    """A figure of differences with their intervals, one row each; empty where there is none.

    An interval much wider than all differences, as two seeds give it, ends in an arrow at the picture's edge.
    """
    effects = [e for e in effects if math.isfinite(e.mean)]
    if not effects:
        return ""
    low, high = _bounds(effects)
    bottom = ROW * len(effects) + 10

    def at(value: float) -> float:
        return EDGE + (value - low) / (high - low) * (WIDTH - 2 * EDGE)

    rows = "".join(_effect(e, ROW * i, at, (low, high)) for i, e in enumerate(effects))
    marks = "".join(
        f'<text x="{at(value):.1f}" y="{bottom + 16}" text-anchor="middle">{words}</text>'
        for value, words in ticks(low, high, 4)
    )
    foot = "".join(
        f'<text x="{x:g}" y="{bottom + 36}" text-anchor="{anchor}">{words}</text>'
        for x, anchor, words in (
            (EDGE, "start", BETTER),
            (WIDTH / 2, "middle", text(label)),
            (WIDTH - EDGE, "end", WORSE),
        )
    )
    return figure(title, bottom + 42, rows + marks + foot)


def _bounds(effects: Sequence[Effect]) -> Point:
    """A range with 0 and all differences in it, and of the intervals what is not too wide."""
    most = max(abs(e.mean) for e in effects) or 1e-3
    ends = [max(-REACH * most, min(REACH * most, v)) for e in effects for v in (e.low, e.high) if v is not None]
    values = [*ends, *(e.mean for e in effects), -most / 2, most / 2]
    return min(values) - 0.05 * most, max(values) + 0.05 * most


def _effect(effect: Effect, top: float, at: Callable[[float], float], bounds: Point) -> str:
    """Name and numbers, and below them the interval with the mean."""
    shade = {"better": COLORS[1], "worse": COLORS[2]}.get(effect.verdict, "currentColor")
    name = effect.name if len(effect.name) <= ROOM else effect.name[: ROOM - 1] + "\N{HORIZONTAL ELLIPSIS}"
    y, x, zero = top + 34, at(effect.mean), at(0.0)
    drawn = (
        f'<line x1="{zero:.1f}" x2="{zero:.1f}" y1="{top + 25}" y2="{top + 43}" stroke="currentColor" {MIDDLE}/>'
        f'<text x="{EDGE}" y="{top + 20}" font-weight="bold">{text(name)}</text>'
        f'<text x="{WIDTH - EDGE}" y="{top + 20}" text-anchor="end">{text(effect.words)}</text>'
    )
    if effect.low is not None and effect.high is not None:
        left, right = at(max(effect.low, bounds[0])), at(min(effect.high, bounds[1]))
        drawn += f'<line x1="{left:.1f}" x2="{right:.1f}" y1="{y}" y2="{y}" stroke="{shade}" stroke-width="2"/>'
        drawn += _cap(left, y, shade, -1 if effect.low < bounds[0] else 0)
        drawn += _cap(right, y, shade, 1 if effect.high > bounds[1] else 0)
    shapes = {
        "better": f'<circle cx="{x:.1f}" cy="{y}" r="5" fill="{shade}"/>',
        "worse": f'<rect x="{x - 5:.1f}" y="{y - 5}" width="10" height="10" fill="{shade}"/>',
    }
    hollow = f'<circle cx="{x:.1f}" cy="{y}" r="4" class="hollow" fill="white" stroke="{shade}" stroke-width="2"/>'
    return f"<g><title>{text(effect.name)}</title>{drawn}{shapes.get(effect.verdict, hollow)}</g>"


def _cap(x: float, y: float, shade: str, way: int) -> str:
    """The end of an interval: a bar, or an arrow to where it goes on."""
    points = f"{x + 7 * way:.1f},{y} {x:.1f},{y - 5} {x:.1f},{y + 5}"
    if way:
        return f'<polygon points="{points}" fill="{shade}"/>'
    return f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y - 5}" y2="{y + 5}" stroke="{shade}" stroke-width="2"/>'
