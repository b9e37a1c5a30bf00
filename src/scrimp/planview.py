# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""A plan as text for a terminal, as JSON, and as a page with a plot."""

from __future__ import annotations

import html
from typing import Any, Final

from scrimp.dryrun import StagePlan
from scrimp.fitting import HALF, Fit, Option, Remedy, Tip
from scrimp.planning import Plan

WIDTH: Final = 72
"""Columns of the plot."""
BARS: Final = " ▁▂▃▄▅▆▇█"


def text(plan: Plan) -> str:
    """The whole plan, in lines."""
    worst = plan.worst
    lines = [*_head(plan, worst), "", *_memory(plan, worst), "", *_plot(worst), "", *_time(plan)]
    if len(plan.stages) > 1:
        lines += ["", *_stages(plan)]
    if plan.notes:
        lines += ["", *(f"Note: {note}" for note in plan.notes)]
    return "\n".join(lines)


def _head(plan: Plan, worst: StagePlan) -> list[str]:
    machine = plan.machine
    share = "all trained" if worst.trained == worst.parameters else f"{count(worst.trained)} trained"
    share += f", {count(worst.packed)} packed in four bits" if worst.packed else ""
    names = ", ".join(t.name for t in plan.recipe.techniques)
    return [
        f"{count(worst.parameters)} parameters, {share}; {worst.tokens:,} tokens a step; with {names}",
        f"on {machine.name} ({machine.device}, {size(machine.memory)}"
        f"{' available' if machine.name == 'here' and machine.device == 'cpu' else ''})",
    ]


def _memory(plan: Plan, worst: StagePlan) -> list[str]:
    peak = worst.peak
    place = f"stage {worst.number}, {peak.part}" if len(plan.stages) > 1 else peak.part
    lines = [f"Memory at its highest ({place})"]
    lines += [f"  {kind:14}{size(held):>12}" for kind, held in peak.kinds.items() if held or kind != "gathered"]
    at = f"  when {peak.op.module or 'the model itself'} runs {peak.op.name} ({peak.op.phase})" if peak.op else ""
    if peak.op and peak.op.phase == "update":
        at = f"  when the optimizer runs {peak.op.name}"
    lines.append(f"  {'live tensors':14}{size(peak.total):>12}{at}")
    kind = "on the GPU" if plan.machine.device == "cuda" else "resident"
    verdict = "fits" if plan.fits else f"does not fit: {size(plan.memory - plan.machine.memory)} too much"
    lines.append(f"  {kind:14}{size(plan.memory):>12}  {verdict}")
    if plan.machine.device == "cuda":
        segments = size(max(s.segments for s in plan.stages))
        lines.append(f"  {'':14}{'':12}  of it {segments} in segments of torch's allocator")
    lines.append("Largest holders then")
    lines += [f"  {size(held):>12}  {op}{f' of {module}' if module else ''}" for held, module, op in peak.held]
    return lines


def _plot(stage: StagePlan) -> list[str]:
    values, parts = columns(stage, WIDTH)
    most = max(values) or 1
    rows: list[str] = []
    for row in range(5, -1, -1):
        label = size(int(most * (row + 1) / 6)) if row in (5, 2) else ""
        cells = (BARS[round(min(max(value / most * 6 - row, 0.0), 1.0) * 8)] for value in values)
        rows.append(f"{label:>10} │{''.join(cells)}")
    marks = "".join(part[0] if i == 0 or part != parts[i - 1] else " " for i, part in enumerate(parts))
    legend = ", ".join(f"{part[0]} {part}" for part in dict.fromkeys(parts))
    return ["Live bytes over building, two steps and a validation", *rows, f"{'':>10} └{'─' * len(values)}",
            f"{'':>12}{marks}", f"{'':>12}{legend}"]  # fmt: skip


def columns(stage: StagePlan, count: int) -> tuple[list[int], list[str]]:
    """(highest live bytes, part of the run) of each of so many equal spans of events."""
    line = stage.line
    spans = [line[len(line) * i // count : max(len(line) * (i + 1) // count, len(line) * i // count + 1)]
             for i in range(min(count, len(line)))]  # fmt: skip
    return [max(live for live, _ in span) for span in spans], [span[0][1] for span in spans]


def _time(plan: Plan) -> list[str]:
    last = plan.stages[-1]
    flops = last.flops()
    total = sum(flops.values())
    rate = last.tokens / last.seconds if last.seconds else 0.0
    lines = [
        "Time" if len(plan.stages) == 1 else "Time (last stage)",
        f"  a step {duration(last.seconds)}, {rate:,.0f} tokens/s; "
        f"the run's {sum(s.steps for s in plan.stages):,} steps {duration(plan.seconds)}",
        f"  {total / 1e12:.4g} TFLOP a step: " + ", ".join(f"{k} {v / max(total, 1):.0%}" for k, v in flops.items())
        + f"; {size(last.moved())} moved",
        "  " + ", ".join(f"{name.removeprefix('aten.')} {time / last.seconds:.0%}" for name, time in last.slowest[:5]),
    ]  # fmt: skip
    if plan.ranks > 1:
        lines.append(f"  each of {plan.ranks:,} ranks; of a step it sends {size(last.sent)} for "
                     f"{duration(last.sending)}, and waits for others {duration(last.waiting)}")  # fmt: skip
    if plan.joules is not None:
        lines.append(f"  about {plan.joules / 3.6e6:.3g} kWh at {plan.machine.power:.0f} W")
    return lines


def _stages(plan: Plan) -> list[str]:
    lines = ["Stages   steps   parameters   tokens a step        peak      a step"]
    for s in plan.stages:
        lines.append(f"{s.number:6} {s.steps:7,} {count(s.parameters):>12} {s.tokens:15,} {size(s.peak.total):>11} "
                     f"{duration(s.seconds):>11}")  # fmt: skip
    return lines


def fitted(fit: Fit) -> str:
    """What a search found, fastest first, each as the lines to add to the recipe."""
    given, machine = fit.given, fit.given.machine
    if given.fits:
        return f"It fits as it is: {size(given.memory)} of {size(fit.limit)}."
    lines = [f"As it is, it needs {size(given.memory)}: {size(given.memory - fit.limit)} more than {size(fit.limit)}."]
    if not fit.options:
        closest = fit.closest
        lines += [
            f"Nothing fits of {fit.tried} sets of remedies that were planned.",
            f"The closest lacks {size(closest.plan.memory - fit.limit)}: "
            f"{', '.join(map(str, closest.remedies)) or 'none'}.",
        ]  # fmt: skip
        return "\n".join(lines)
    cut = "; more were left untried" if fit.cut else ""
    lines.append(f"What fits on {machine.name}, by predicted time (of {fit.tried} sets that were planned{cut}):")
    for i, option in enumerate(fit.options[:8], 1):
        lines += ["", f"{i}. {size(option.plan.memory)}, {duration(option.plan.seconds)} for the run", *_lines(option)]
    return "\n".join(lines)


def _lines(option: Option) -> list[str]:
    """An option as lines of a recipe, each with the reason for it."""

    def line(remedy: Remedy, indent: str) -> str:
        saved = option.saved.get(str(remedy))
        much = f"{size(saved)} less: " if saved is not None else ""
        return f"{f'     {indent}{remedy}':40}  # {much}{remedy.why}"

    techniques = [remedy for remedy in option.remedies if remedy.name != HALF]
    lines = [line(remedy, "") for remedy in option.remedies if remedy.name == HALF]
    return lines + (["     techniques:"] if techniques else []) + [line(remedy, "  ") for remedy in techniques]


def tips(given: Plan, found: list[Tip]) -> str:
    """The catalogue against a recipe, one row a technique."""
    rows = [f"{'technique':18}{'memory':>12}{'':>9}{'the run':>12}", f"{'(as it is)':18}{size(given.memory):>12}{'':>9}"
            f"{duration(given.seconds):>12}"]  # fmt: skip
    for tip in found:
        if tip.plan is None:
            rows.append(f"{tip.name:18}  does not apply: {tip.reason}")
            continue
        less, faster = tip.plan.memory / given.memory - 1, tip.plan.seconds / max(given.seconds, 1e-9) - 1
        words = "; ".join(part for part in (tip.reason, f"claim: {tip.claim}" if tip.claim else "") if part)
        rows.append(f"{tip.name:18}{size(tip.plan.memory):>12} {less:+7.1%} {duration(tip.plan.seconds):>12} "
                    f"{faster:+7.1%}  {words}".rstrip())  # fmt: skip
    return "\n".join(rows)


def fit_json(fit: Fit) -> dict[str, Any]:
    """What a search found."""
    return {
        "limit": fit.limit,
        "needs": fit.given.memory,
        "fits": fit.given.fits,
        "tried": fit.tried,
        "options": [
            {
                "remedies": {r.name: "bfloat16" if r.name == HALF else dict(r.settings) for r in option.remedies},
                "memory": option.plan.memory,
                "seconds": option.plan.seconds,
            }
            for option in fit.options
        ],
        "closest": {"remedies": [str(r) for r in fit.closest.remedies], "memory": fit.closest.plan.memory},
    }


def tips_json(found: list[Tip]) -> list[dict[str, Any]]:
    """The catalogue against a recipe."""
    return [
        {
            "technique": tip.name,
            "memory": tip.plan.memory if tip.plan else None,
            "seconds": tip.plan.seconds if tip.plan else None,
            "reason": tip.reason,
            "claim": tip.claim,
        }
        for tip in found
    ]


def as_json(plan: Plan) -> dict[str, Any]:
    """Every figure."""
    return {
        "machine": plan.machine.name,
        "memory": {
            "live": plan.live,
            "expected": plan.memory,
            "available": plan.machine.memory,
            "fits": plan.fits,
            "kinds": plan.worst.peak.kinds,
            "stage": plan.worst.number,
            "part": plan.worst.peak.part,
            "module": plan.worst.peak.op.module if plan.worst.peak.op else "",
            "operator": plan.worst.peak.op.name if plan.worst.peak.op else "",
        },
        "seconds": plan.seconds,
        "joules": plan.joules,
        "stages": [
            {
                "steps": s.steps,
                "tokens": s.tokens,
                "parameters": s.parameters,
                "trained": s.trained,
                "packed": s.packed,
                "live": s.peak.total,
                "segments": s.segments,
                "reserved": s.reserved,
                "seconds": s.seconds,
                "sent": s.sent,
                "sending": s.sending,
                "waiting": s.waiting,
                "kinds": s.most,
                "flops": s.flops(),
                "moved": s.moved(),
            }
            for s in plan.stages
        ],
        "notes": plan.notes,
    }


def page(plan: Plan) -> str:
    """A self-contained HTML page."""
    plots = "".join(_svg(stage) for stage in plan.stages)
    return (
        '<!doctype html><meta charset="utf-8"><title>Plan</title>'
        "<style>body{font:14px system-ui;max-width:60em;margin:2em auto}pre{font-size:13px}</style>"
        f"<h1>Plan</h1><pre>{html.escape(text(plan))}</pre>{plots}"
    )


def _svg(stage: StagePlan) -> str:
    values, parts = columns(stage, 800)
    most = max(values) or 1
    points = " ".join(f"{i},{200 - 190 * value / most:.1f}" for i, value in enumerate(values))
    marks = "".join(
        f'<line x1="{i}" x2="{i}" y1="0" y2="200" stroke="#ccc"/><text x="{i + 3}" y="212" font-size="11">{part}</text>'
        for i, part in enumerate(parts)
        if i == 0 or part != parts[i - 1]
    )
    return (
        f"<h2>Stage {stage.number}: {size(stage.peak.total)} at the peak</h2>"
        f'<svg viewBox="0 0 {len(values)} 220" width="100%"><title>Live bytes</title>{marks}'
        f'<polyline points="{points}" fill="none" stroke="#06c"/></svg>'
    )


def size(value: float) -> str:
    """Bytes, decimal."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:.4g} {unit}"
    return f"{value:.0f} B"


def count(value: float) -> str:
    """A number with a letter for thousands, millions or billions."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g}{unit}"
    return str(int(value))


def duration(value: float) -> str:
    """Seconds in the unit that suits."""
    for unit, scale in (("days", 86400.0), ("h", 3600.0), ("min", 120.0), ("s", 1.0)):
        if value >= scale:
            return f"{value / (60.0 if unit == 'min' else scale):.3g} {unit}"
    return f"{value * 1e3:.3g} ms"
