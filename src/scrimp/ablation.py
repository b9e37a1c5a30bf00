"""A comparison's part of a report: the table of claimed, planned and measured, and its plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

from scrimp.charts import (
    BYTES,
    COUNT,
    FLOPS,
    JOULES,
    MINUS,
    SECONDS,
    TIMES,
    Axis,
    Line,
    Point,
    legend,
    line_chart,
    text,
    unit,
)
from scrimp.clock import Duration
from scrimp.comparison import Arm, Cell, Comparison
from scrimp.errors import plural
from scrimp.forest import Effect, forest

FILE: Final = "comparison.json"
NONE: Final = '<span class="soft">none</span>'
LOSS: Final = Axis("")
CLAIMS: Final = "Claims are the papers', for the papers' models. "
MARKS: Final = {"better": "\N{BLACK CIRCLE}", "worse": "\N{BLACK SQUARE}"}
"""Of verdicts, as the forest plot has them."""


def section(found: Comparison) -> str:
    """The whole comparison, as HTML; techniques' names, claims and reasons are escaped."""
    base, others = found.arms[0], found.arms[1:]
    effects = [Effect(a.name, a.summary.difference, *_interval(a), a.summary.verdict, _words(a)) for a in others]
    out = "".join(f"<li>{text(name)}: {text(reason)}</li>" for name, reason in found.left_out.items())
    return (
        f"<p>{text(_lead(found))}</p>{_table(found)}"
        f'<p class="soft">Baseline: {text(", ".join(base.techniques))}. Ratios are to the baseline. '
        f"{CLAIMS if any(arm.claim for arm in found.arms) else ''}A verdict needs p &lt; 0.05 over the seeds.</p>"
        + (f"<p>Left out:</p><ul>{out}</ul>" if out else "")
        + forest("Loss against the baseline, 95 % intervals", effects, "difference to the baseline's loss")
        + _charts(found)
    )


def _lead(found: Comparison) -> str:
    """What was compared, and what came out, in two or three sentences."""
    count, verdicts = len(found.arms) - 1, [arm.summary.verdict for arm in found.arms[1:]]
    rates = f" Each took the best of {len(found.lrs)} learning rates." if len(found.lrs) > 1 else ""
    budget = {"same-steps": "the same number of steps", "same-time": "the same training time"}.get(
        found.mode, found.mode
    )
    better, worse = verdicts.count("better"), verdicts.count("worse")
    return (
        f"{plural(count, 'set')} of techniques against a baseline, {plural(len(found.seeds), 'seed')} each, for "
        f"{budget}, with the same model and data.{rates} Loss is lower than the baseline's with {better}, higher with "
        f"{worse}; with {count - better - worse} no difference was seen."
    )


def _table(found: Comparison) -> str:
    base = found.arms[0]
    claims = any(arm.claim for arm in found.arms)
    head = (
        '<tr><th rowspan="2">technique</th>'
        + ('<th rowspan="2" class="words">claimed</th>' if claims else "")
        + '<th colspan="2" class="group">planned</th><th colspan="5" class="group">measured</th></tr>'
        '<tr><th class="group">memory</th><th>time</th><th class="group">loss</th><th>difference [95 % interval]</th>'
        "<th>tokens/s</th><th>peak memory</th><th>time to the baseline's loss</th></tr>"
    )
    rows = "".join(_row(number, arm, base, claims) for number, arm in enumerate(found.arms, 1))
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>\n'


def _row(number: int, arm: Arm, base: Arm, claims: bool) -> str:
    summary, is_base = arm.summary, arm is base
    planned, rival = arm.planned, base.planned
    speed = _mean(arm.cells, lambda c: c.tokens_per_second)
    memory = _mean(arm.cells, lambda c: c.peak_bytes)
    bits = [c.bits_per_byte for c in arm.cells if c.bits_per_byte is not None]
    rate = f'<br><span class="soft">learning rate {TIMES} {arm.lr:g}</span>' if arm.lr != 1.0 else ""
    some = (
        f'<br><span class="soft">trains {planned.trained:,} weights</span>' if planned.trained != rival.trained else ""
    )
    joules = [c.joules for c in arm.cells if c.joules is not None]
    energy = f'<br><span class="soft">{amount(sum(joules) / len(joules), JOULES)}</span>' if joules else ""
    per_byte = f'<br><span class="soft">{sum(bits) / len(bits):.3f} bits/byte</span>' if bits else ""
    cells = [
        f'<th scope="row"><span class="soft">{number}</span> {broken(arm.name)}{rate}{some}</th>',
        f'<td class="words">{text(arm.claim) or NONE}</td>' if claims else "",
        f'<td class="group">{_ratio(planned.memory, rival.memory)}{_soft(amount(planned.memory, BYTES), is_base)}</td>',
        f"<td>{_ratio(planned.seconds, rival.seconds)}{_soft(amount(planned.seconds, SECONDS), is_base)}</td>",
        f'<td class="group">{summary.loss:.4f}{per_byte}</td>',
        f"<td>{'baseline' if is_base else f'{text(_words(arm))}<br>{_marked(summary.verdict)}'}</td>",
        f"<td>{summary.speed:.2f}{TIMES}{_soft(f'{speed:,.0f}')}{energy}</td>",
        f"<td>{summary.memory:.2f}{TIMES}{_soft(amount(memory, BYTES))}</td>",
        f"<td>{_reached(summary.seconds_to_baseline, base.summary.seconds_to_baseline)}</td>",
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _marked(verdict: str) -> str:
    """A verdict with its mark, as HTML."""
    mark = MARKS.get(verdict)
    return (
        f'<span class="{verdict}">{mark} {verdict}</span>' if mark else _soft(f"\N{WHITE CIRCLE} {verdict}", line=False)
    )


def _words(arm: Arm) -> str:
    """The difference with its interval."""
    low, high = _interval(arm)
    width = "" if low is None or high is None else f" [{_signed(low)}, {_signed(high)}]"
    return f"{_signed(arm.summary.difference)}{width}"


def _signed(value: float) -> str:
    """With a sign, but for the zero that it may round to."""
    return f"{round(value, 4) + 0.0:+.4f}".replace("-", MINUS)


def _interval(arm: Arm) -> tuple[float, float] | tuple[None, None]:
    """The interval, if more than one seed gave one."""
    found = arm.summary.interval
    return found if found is not None and all(map(math.isfinite, found)) else (None, None)


def _reached(seconds: float | None, base: float | None) -> str:
    if seconds is None:
        return "not reached"
    return f"{seconds / base:.2f}{TIMES}{_soft(amount(seconds, SECONDS))}" if base else amount(seconds, SECONDS)


def _ratio(value: float, base: float) -> str:
    return f"{value / base:.2f}{TIMES}" if base else NONE


def _soft(words: str, shown: bool = True, line: bool = True) -> str:
    """Words that are less prominent, in a line of their own."""
    return f'{"<br>" if line else ""}<span class="soft">{text(words)}</span>' if shown else ""


def amount(value: float, scales: Sequence[tuple[float, str]]) -> str:
    """A value with the unit that suits it."""
    size, name = unit(value, scales)
    return f"{value / size:,.3g} {name}" if value < 1000 * size else f"{value / size:,.0f} {name}"


def broken(name: str) -> str:
    """A name as HTML that may go on in a new line after an underscore."""
    return text(name).replace("_", "_<wbr>")


def _mean(cells: Sequence[Cell], of: Callable[[Cell], float]) -> float:
    return sum(map(of, cells)) / len(cells)


def _charts(found: Comparison) -> str:
    """Held-out loss against time, tokens and, where the plan knows them, FLOPs; and the legend."""
    by_time = [_line(i, arm, lambda p: p[2]) for i, arm in enumerate(found.arms)]
    by_tokens = [_line(i, arm, lambda p: p[1]) for i, arm in enumerate(found.arms)]
    by_flops = [_line(i, arm, per_step) for i, arm in enumerate(found.arms) if (per_step := _flops(found, arm))]
    return (
        legend(by_time)
        + '<div class="charts">'
        + line_chart("Held-out loss by training time", by_time, Axis("{}", SECONDS, zero=True), LOSS)
        + line_chart("Held-out loss by tokens", by_tokens, Axis("{}tokens", COUNT, zero=True), LOSS)
        + line_chart("Held-out loss by FLOPs, as planned", by_flops, Axis("{}", FLOPS, zero=True), LOSS)
        + '</div><p class="soft">Thick lines are means over the seeds, thin lines the seeds.</p>'
    )


def _flops(found: Comparison, arm: Arm) -> Callable[[Sequence[float]], float] | None:
    """A curve's point -> FLOPs so far: those of the planned run, in proportion to its steps."""
    length = Duration.parse(found.recipe["duration"], "duration") if "duration" in found.recipe else None
    steps = max((p[0] for cell in arm.cells for p in cell.curve), default=0.0)
    if length is not None and length.unit == "step":
        steps = length.value
    elif found.mode != "same-steps":
        # The run was cut or stretched, and how many steps were planned is not told.
        return None
    flops = arm.planned.flops
    return None if not flops or not steps else lambda point: flops * point[0] / steps


def _line(index: int, arm: Arm, across: Callable[[Sequence[float]], float]) -> Line:
    """An arm's curves, and their mean at the steps that all of its seeds have."""
    curves = [{p[0]: (across(p), p[3]) for p in cell.curve} for cell in arm.cells]
    shared = sorted(set.intersection(*(set(c) for c in curves)))
    thin = [list(c.values()) for c in curves] if len(curves) > 1 else []
    return Line(arm.name, index, [_middle([c[step] for c in curves]) for step in shared], thin, dots=True)


def _middle(points: Sequence[Point]) -> Point:
    return sum(p[0] for p in points) / len(points), sum(p[1] for p in points) / len(points)
