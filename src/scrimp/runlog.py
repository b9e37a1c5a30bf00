"""A run's part of a report: what its folder says, as a table row and as lines of charts."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from scrimp.ablation import NONE, amount, broken
from scrimp.arrange import emulated
from scrimp.charts import BYTES, COUNT, SECONDS, Axis, Line, Point, legend, line_chart, text
from scrimp.errors import UserError
from scrimp.registry import catalogue
from scrimp.stragglers import Slowest, stragglers

POINTS: Final = 150
"""Most points of a line; more steps than that are drawn as means of neighbors."""
LOSS: Final = Axis("")
STEPS: Final = Axis("{}steps", COUNT, zero=True)
TOKENS: Final = Axis("{}tokens", COUNT, zero=True)
TIME: Final = Axis("{}", SECONDS, zero=True)


@dataclass(frozen=True)
class RunLog:
    """A run's folder, read."""

    name: str
    path: Path
    recipe: str
    """Its YAML."""
    settings: dict[str, Any]
    """The recipe as a mapping; empty where it cannot be read, which is no reason to show nothing."""
    environment: dict[str, Any]
    steps: list[dict[str, Any]]
    """A line of metrics each, with `at_tokens` and `at_seconds`: sums up to the end of the step."""
    checks: list[dict[str, Any]]
    """Validations, alike."""

    @classmethod
    def load(cls, path: Path) -> RunLog:
        """Read a folder that has a recipe.yaml.

        Raises:
            UserError: if it has no metrics, or a file of it is damaged.
        """
        try:
            recipe = (path / "recipe.yaml").read_text(encoding="utf-8")
            lines = (path / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
            place = path / "environment.json"
            environment = dict(json.loads(place.read_text(encoding="utf-8"))) if place.exists() else {}
            # The last line may be half of one, of a run that is going on or was killed.
            steps, checks = _summed([json.loads(line) for line in lines if line.endswith("}")])
        except FileNotFoundError as error:
            what = f"has no {Path(error.filename).name}, so that there is nothing to report."
            raise UserError(what, str(path), "Train it first.") from None
        except OSError as error:
            raise UserError(f"cannot be read: {error.strerror}.", str(path)) from None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            what = f"a file of the run is damaged: {type(error).__name__}: {error}."
            raise UserError(what, str(path), "It may be repaired by `scrimp train --resume`.") from None
        if not steps:
            raise UserError("has no steps to report yet.", str(path), "Train it first.")
        return cls(path.resolve().name, path, recipe, _settings(recipe), environment, steps, checks)


def _summed(lines: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Steps and validations, each with the tokens and the seconds of steps until then."""
    tokens, seconds = 0, 0.0
    steps: list[dict[str, Any]] = []
    checks: list[dict[str, Any]] = []
    for line in lines:
        if "loss" in line:
            tokens, seconds = tokens + int(line["tokens"]), seconds + float(line["seconds"])
        kept = line | {"step": int(line["step"]), "at_tokens": tokens, "at_seconds": seconds}
        if "loss" in line:
            steps.append(kept | {"loss": float(line["loss"]), "peak_bytes": int(line["peak_bytes"])})
        elif "validation_loss" in line:
            checks.append(kept | {"validation_loss": float(line["validation_loss"])})
    return steps, checks


def _settings(recipe: str) -> dict[str, Any]:
    try:
        return dict(yaml.safe_load(recipe))
    except (yaml.YAMLError, TypeError, ValueError):
        return {}


def _techniques(settings: dict[str, Any]) -> list[str]:
    """Names in a recipe, which has a mapping, a list of names and one-entry mappings, or one name."""
    found = settings.get("techniques") or []
    return [
        str(next(iter(t), "") if isinstance(t, dict) else t) for t in ([found] if isinstance(found, str) else found)
    ]


def lead(runs: Sequence[RunLog]) -> str:
    """What is shown, and in which parts the recipes differ, in a sentence."""
    if len(runs) == 1:
        return f"One run, of {runs[0].steps[-1]['step']:,} steps."
    every = [run.settings for run in runs]
    keys = dict.fromkeys(key for settings in every for key in settings if key not in ("name", "out"))
    unlike = [str(key) for key in keys if any(s.get(key) != every[0].get(key) for s in every)]
    found = f"differ in {', '.join(unlike)}" if unlike else "are the same"
    return f"{len(runs)} runs; their recipes {found}."


def section(runs: Sequence[RunLog]) -> str:
    """Table and charts of runs, as HTML."""
    head = (
        '<th>run</th><th class="words">techniques</th><th>held-out loss</th><th>training loss</th><th>steps</th>'
        "<th>tokens</th><th>training time</th><th>tokens/s</th><th>peak memory</th>"
    )
    rows = "".join(map(_row, runs))
    table = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>\n'
    note = (
        '<p class="soft">Training time is that of the steps, without start, validation and saving. The losses in the '
        "table are the last validation's and the mean of the last tenth of the steps. Peak memory is the largest "
        "until then.</p>"
    )
    warnings = "".join(f"<p>{text(sentence)}</p>" for sentence in [*_emulated(runs), *_slow_ranks(runs)])
    return f"<p>{text(lead(runs))}</p>{table}{note}{warnings}{_charts(runs)}"


def _emulated(runs: Sequence[RunLog]) -> list[str]:
    """What is said of techniques that some run's device has no hardware for, once each."""
    known, found = catalogue(), dict[str, None]()
    for run in runs:
        gpu = run.environment.get("cuda") and run.settings.get("device") != "cpu"
        cards = {name: known[name].card for name in _techniques(run.settings) if name in known}
        found |= dict.fromkeys(emulated(cards, "cuda" if gpu else "cpu"))
    return list(found)


def _slow_ranks(runs: Sequence[RunLog]) -> list[str]:
    """What is said of ranks for which the others of their run waited again and again."""
    found = ((run, [one for step in run.steps if (one := Slowest.of(step)) is not None]) for run in runs)
    return [f"{run.name}: {one}" for run, compared in found for one in stragglers(compared).values()]


def _row(run: RunLog) -> str:
    last = run.steps[-1]
    tail = run.steps[-max(1, len(run.steps) // 10) :]
    cells = [
        f'<th scope="row">{broken(run.name)}</th>',
        f'<td class="words">{text(", ".join(_techniques(run.settings))) or NONE}</td>',
        f"<td>{run.checks[-1]['validation_loss']:.4f}</td>" if run.checks else f"<td>{NONE}</td>",
        f"<td>{statistics.fmean(s['loss'] for s in tail):.4f}</td>",
        f"<td>{last['step']:,}</td>",
        f"<td>{last['at_tokens']:,}</td>",
        f"<td>{amount(last['at_seconds'], SECONDS)}</td>",
        f"<td>{last['at_tokens'] / (last['at_seconds'] or 1e-9):,.0f}</td>",
        f"<td>{amount(last['peak_bytes'], BYTES)}</td>",
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _charts(runs: Sequence[RunLog]) -> str:
    def steps(x: str, y: Callable[[dict[str, Any]], float]) -> list[Line]:
        return [Line(r.name, i, thinned([(s[x], y(s)) for s in r.steps])) for i, r in enumerate(runs)]

    def checks(x: str) -> list[Line]:
        lines = ([(c[x], c["validation_loss"]) for c in r.checks] for r in runs)
        return [Line(run.name, i, points, dots=True) for i, (run, points) in enumerate(zip(runs, lines, strict=True))]

    training = steps("at_tokens", lambda s: s["loss"])
    return (
        (legend(training) if len(runs) > 1 else "")
        + '<div class="charts">'
        + line_chart("Training loss by tokens", training, TOKENS, LOSS)
        + line_chart("Held-out loss by tokens", checks("at_tokens"), TOKENS, LOSS)
        + line_chart("Held-out loss by training time", checks("at_seconds"), TIME, LOSS)
        + line_chart("Tokens a second", steps("step", _speed), STEPS, Axis("{}tokens/s", COUNT, zero=True))
        + line_chart(
            "Peak memory so far", steps("step", lambda s: s["peak_bytes"]), STEPS, Axis("{}", BYTES, zero=True)
        )
        + "</div>"
    )


def _speed(step: dict[str, Any]) -> float:
    return step["tokens"] / (step["seconds"] or 1e-9)


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most `POINTS` points: means of equal numbers of neighbors."""
    size = -(-len(points) // POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(statistics.fmean(p[0] for p in g), statistics.fmean(p[1] for p in g)) for g in groups]
