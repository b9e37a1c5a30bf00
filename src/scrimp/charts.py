"""Charts as inline SVG: they follow the page's text color and width, and need no script.

Every picture is `WIDTH` units wide with text of 12 units, so that it stays readable on a telephone. Lines differ in
color (Okabe and Ito's, which color-blind readers tell apart), in dash, and by a number at their end.
"""

from __future__ import annotations

import html
import itertools
import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

WIDTH: Final = 420
HEIGHT: Final = 260
LEFT, RIGHT, TOP, BOTTOM = 46, 28, 20, 38
EARLY: Final = 0.2
"""Share of a chart's width whose high values are not shown: the loss of an untrained model hides all else."""
CLOSE: Final = 18
"""Lines that end so near each other share a column of numbers."""
COLORS: Final = ("currentColor", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES: Final = ("", "7 3", "2 3", "10 3 2 3", "14 4")
"""As many as share no factor with the colors: 35 lines differ."""
MINUS, TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
FAINT: Final = 'stroke="currentColor" stroke-opacity="0.18"'
MIDDLE: Final = 'stroke-opacity="0.5" stroke-dasharray="3 3"'
Point = tuple[float, float]
Scales = Sequence[tuple[float, str]]
PLAIN: Final[Scales] = ((1.0, ""),)
SECONDS: Final[Scales] = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"), (1e-3, "ms"))
COUNT: Final[Scales] = ((1e9, "billion "), (1e6, "million "), (1e3, "thousand "), (1.0, ""))
FLOPS: Final[Scales] = ((1e21, "ZFLOP"), (1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1, "FLOP"))
JOULES: Final[Scales] = ((1e6, "MJ"), (1e3, "kJ"), (1, "J"))
BYTES: Final[Scales] = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))


@dataclass(frozen=True)
class Line:
    """A line and the thinner ones that it is the mean of."""

    name: str
    style: int
    """Index of color, dash and number."""
    points: Sequence[Point]
    thin: Sequence[Sequence[Point]] = ()
    dots: bool = False
    """Whether each point is marked: of few measurements."""


@dataclass(frozen=True)
class Axis:
    """What is measured along a side. `{}` in the label stands for the unit that suits the values."""

    label: str
    scales: Scales = PLAIN
    zero: bool = False
    """Whether it begins at 0."""


def text(value: object) -> str:
    """Anything as text for HTML and for XML: escaped, without what XML forbids."""
    clean = str(value).encode("utf-8", "replace").decode()
    return html.escape(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]", "\N{REPLACEMENT CHARACTER}", clean))


def unit(most: float, scales: Scales) -> tuple[float, str]:
    """(divisor, name) of the unit in which a value is at least 1, or of the smallest."""
    return next(((size, name) for size, name in scales if most >= size), scales[-1])


def ticks(low: float, high: float, count: int = 5) -> list[tuple[float, str]]:
    """About so many round values between two bounds, with their texts."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * k for k in (1, 2, 5, 10) if power * k >= rough * 0.999)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    found = [i * step for i in range(math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6) + 1)]
    return [(value, f"{value + 0.0:,.{digits}f}".replace("-", MINUS)) for value in found]


@dataclass(frozen=True)
class Frame:
    """The plotted part of a picture: data ranges (low, high) of both axes."""

    across: Point
    down: Point

    def place(self, point: Point) -> Point:
        """(x, y) in data -> in the picture."""
        wide, tall = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        (low, high), (bottom, top) = self.across, self.down
        return LEFT + (point[0] - low) / (high - low) * wide, HEIGHT - BOTTOM - (point[1] - bottom) / (
            top - bottom
        ) * tall


def line_chart(title: str, lines: Sequence[Line], x: Axis, y: Axis) -> str:
    """A figure of lines; empty where there is no finite point to draw."""
    lines = [line for line in map(_finite, lines) if line.points]
    if not lines:
        return ""
    frame = _frame(lines, x, y)
    drawn = "".join(_thin(line, frame) for line in lines) + "".join(_thick(line, frame) for line in lines)
    name = f"clip{zlib.crc32(drawn.encode()):08x}"
    inner = f'<rect x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}"/>'
    clip = f'<clipPath id="{name}">{inner}</clipPath><g clip-path="url(#{name})">{drawn}</g>'
    return figure(title, HEIGHT, _grid(frame, x, y) + clip + _ends(lines, frame))


def figure(title: str, height: float, inner: str) -> str:
    """A picture with its title above."""
    return (
        f'<figure><figcaption>{text(title)}</figcaption><svg xmlns="http://www.w3.org/2000/svg" role="img" '
        f'viewBox="0 0 {WIDTH} {height:g}" font-family="system-ui, sans-serif" font-size="12" fill="currentColor">'
        f"<title>{text(title)}</title>{inner}</svg></figure>\n"
    )


def _finite(line: Line) -> Line:
    def kept(points: Sequence[Point]) -> tuple[Point, ...]:
        return tuple(p for p in points if all(map(math.isfinite, p)))

    return Line(line.name, line.style, kept(line.points), tuple(map(kept, line.thin)), line.dots)


def _frame(lines: Sequence[Line], x: Axis, y: Axis) -> Frame:
    """Ranges that hold all lines, but for high values at the beginning."""
    every = [p for line in lines for points in (line.points, *line.thin) for p in points]
    low, high = 0.0 if x.zero else min(p[0] for p in every), max(p[0] for p in every)
    late = [p[1] for p in every if p[0] >= low + EARLY * (high - low)]
    bottom, top = 0.0 if y.zero else min(late), max(late)
    room = 0.05 * (top - bottom) or 0.1 * abs(top) or 1.0
    return Frame((low, high if high > low else low + 1.0), (bottom if y.zero else bottom - room, top + room))


def _grid(frame: Frame, x: Axis, y: Axis) -> str:
    """Ticks, their texts and the labels of both axes."""
    wide, x_name = unit(frame.across[1], x.scales)
    parts = [_levels(frame, unit(frame.down[1], y.scales)[0])]
    for value, words in ticks(frame.across[0] / wide, frame.across[1] / wide):
        left = frame.place((value * wide, 0.0))[0]
        parts.append(f'<text x="{left:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{words}</text>')
    return "".join(parts) + _labels(x.label.format(x_name), y.label.format(unit(frame.down[1], y.scales)[1]))


def _levels(frame: Frame, size: float) -> str:
    """Faint lines across, with their values in a unit of that size."""
    parts: list[str] = []
    for value, words in ticks(frame.down[0] / size, frame.down[1] / size):
        height = frame.place((0.0, value * size))[1]
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height:.1f}" y2="{height:.1f}" {FAINT}/>')
        parts.append(f'<text x="{LEFT - 6}" y="{height + 4:.1f}" text-anchor="end">{words}</text>')
    return "".join(parts)


def _labels(across: str, down: str) -> str:
    """What is measured along the axes: below the picture, and above its left side."""
    below = f'<text x="{(WIDTH + LEFT - RIGHT) / 2:g}" y="{HEIGHT - 5}" text-anchor="middle">{text(across)}</text>'
    return below + (f'<text x="0" y="11">{text(down)}</text>' if down else "")


def _path(points: Sequence[Point], frame: Frame) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in map(frame.place, points))


def _thin(line: Line, frame: Frame) -> str:
    style = f'fill="none" stroke="{color(line.style)}" stroke-width="1" stroke-opacity="0.35"'
    return "".join(f'<polyline points="{_path(points, frame)}" {style}/>' for points in line.thin)


def _thick(line: Line, frame: Frame) -> str:
    drawn = f'<polyline points="{_path(line.points, frame)}" {stroke(line.style)}/>'
    if line.dots or len(line.points) == 1:
        places = map(frame.place, line.points)
        drawn += "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="{color(line.style)}"/>' for x, y in places)
    return f"<g><title>{text(line.name)}</title>{drawn}</g>"


def _ends(lines: Sequence[Line], frame: Frame) -> str:
    """Each line's number at its end; where they would lie on each other they move apart, with a thread to the end."""
    if len(lines) < 2:
        return ""
    ends = sorted(((frame.place(line.points[-1]), line.style + 1) for line in lines), key=lambda end: end[0][0])
    groups = [[ends[0]]]
    for before, after in itertools.pairwise(ends):
        if after[0][0] - before[0][0] > CLOSE:
            groups.append([])
        groups[-1].append(after)
    parts: list[str] = []
    for group in groups:
        heights, left = spread([y for (_, y), _ in group], 12, TOP + 6, HEIGHT - BOTTOM), group[-1][0][0] + 10
        for ((x, y), number), height in zip(group, heights, strict=True):
            parts.append(f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{left:.1f}" y2="{height:.1f}" {FAINT}/>')
            parts.append(f'<text x="{left:.1f}" y="{height + 4:.1f}" class="number">{number}</text>')
    return "".join(parts)


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Heights near those wanted, a gap apart where there is room for it, in their order, from low to high."""
    gap = min(gap, (high - low) / max(len(wanted) - 1, 1))
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    down, up = list(wanted), list(wanted)
    for before, after in itertools.pairwise(order):
        down[after] = max(down[after], down[before] + gap)
    for after, before in itertools.pairwise(reversed(order)):
        up[before] = min(up[before], up[after] - gap)
    # Both keep the gap, and so does their mean, which moves neighbors evenly; then the bounds.
    found = [max((a + b) / 2, low) for a, b in zip(down, up, strict=True)]
    for before, after in itertools.pairwise(order):
        found[after] = max(found[after], found[before] + gap)
    edge = high
    for i in reversed(order):
        found[i] = min(found[i], edge)
        edge = found[i] - gap
    return found


def color(style: int) -> str:
    """Of the line with that index."""
    return COLORS[style % len(COLORS)]


def stroke(style: int) -> str:
    """Attributes of the line with that index."""
    dash = DASHES[style % len(DASHES)]
    return f'fill="none" stroke="{color(style)}" stroke-width="2"' + (f' stroke-dasharray="{dash}"' if dash else "")


def legend(lines: Sequence[Line]) -> str:
    """What the numbers, colors and dashes stand for."""
    items = "".join(
        '<li><svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 36 10" width="36" height="10" aria-hidden="true">'
        f'<line x1="0" x2="36" y1="5" y2="5" {stroke(line.style)}/></svg> '
        f"<b>{line.style + 1}</b> {text(line.name)}</li>"
        for line in lines
    )
    return f'<ul class="legend">{items}</ul>\n'


def area(title: str, values: Sequence[float], parts: Sequence[str], scales: Scales) -> str:
    """A figure of a quantity over events in their order, with the part of the run that each belongs to."""
    frame = Frame((0.0, float(max(len(values) - 1, 1))), (0.0, max(values) * 1.05 or 1.0))
    size, name = unit(max(values), scales)
    points = _path([(0.0, 0.0), *enumerate(values), (len(values) - 1.0, 0.0)], frame)
    drawn = [
        _levels(frame, size),
        f'<polygon points="{points}" fill="{COLORS[1]}" fill-opacity="0.3" stroke="{COLORS[1]}"/>',
        _labels("", name),
    ]
    free, begin = 0.0, 0
    for end in range(1, len(parts) + 1):
        if end < len(parts) and parts[end] == parts[begin]:
            continue
        left, right = (frame.place((float(i), 0.0))[0] for i in (begin, min(end, len(parts) - 1)))
        ends = f'x1="{left:.1f}" x2="{left:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM + 4}"'
        drawn.append(f'<line {ends} stroke="currentColor" {MIDDLE}/>')
        middle, half = (left + right) / 2, 3.5 * len(parts[begin])
        # A part that is over at once gets no name, for want of room.
        if middle - half >= free:
            words = text(parts[begin])
            drawn.append(f'<text x="{middle:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{words}</text>')
            free = middle + half
        begin = end
    return figure(title, HEIGHT, "".join(drawn))
