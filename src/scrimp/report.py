"""One HTML page about runs and comparisons: tables, plots, recipes and environments; no script, no network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import yaml

from scrimp import ablation, runlog
from scrimp.charts import BYTES, area, text
from scrimp.comparison import Comparison
from scrimp.errors import UserError, plural
from scrimp.runlog import RunLog

if TYPE_CHECKING:
    from scrimp.recipe import Recipe

SPANS: Final = 160
"""Points of the plot of memory over a step."""
QUICK: Final = 24
"""Layers up to which a recipe is planned for a report; more would keep the reader waiting."""
STYLE: Final = """
:root { color-scheme: light dark; --fore: #1c1d1f; --back: #fff; --soft: #5c6066; --rule: #d9dbde; --panel: #f4f5f6 }
@media (prefers-color-scheme: dark) {
  :root { --fore: #e4e6e9; --back: #15171a; --soft: #a3a8b0; --rule: #363a40; --panel: #1f2226 }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 82rem; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif;
  color: var(--fore); background: var(--back); overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.2 } h2 { font-size: 1.25rem; margin-top: 2.5rem }
p, ul { max-width: 46rem }
.soft { color: var(--soft); font-size: .875rem; font-weight: normal }
.scroll { overflow-x: auto; overflow-wrap: normal }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .45rem .7rem; border-bottom: 1px solid var(--rule); text-align: right; vertical-align: top;
  white-space: nowrap }
tbody th, thead tr:first-child th:first-child { position: sticky; left: 0; background: var(--back); text-align: left;
  white-space: normal; overflow-wrap: anywhere; min-width: 7rem; max-width: 11rem }
thead th { vertical-align: bottom; white-space: normal } thead th[colspan] { text-align: left }
.group { border-left: 1px solid var(--rule) }
.words { text-align: left; white-space: normal; min-width: 11rem }
.better, .worse { font-weight: bold }
.charts { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr));
  margin: 1.5rem 0 .5rem }
figure { margin: 0; max-width: 34rem } figcaption { font-weight: 600 } svg { max-width: 100% }
figure svg { display: block; width: 100% } .hollow { fill: var(--back) }
.number { font-weight: bold; stroke: var(--back); stroke-width: 3px; paint-order: stroke }
@media (prefers-color-scheme: dark) { [stroke="#0072b2"] { stroke: #3a94d6 } [fill="#0072b2"] { fill: #3a94d6 } }
.legend { list-style: none; padding: 0; margin: .5rem 0; display: flex; flex-wrap: wrap; gap: .3rem 1.5rem;
  max-width: none } .legend svg { vertical-align: middle }
details { margin: .5rem 0; border: 1px solid var(--rule); border-radius: .3rem; padding: .5rem .8rem }
@media (max-width: 40rem) {
  table, .legend { font-size: .82rem } th, td { padding: .35rem .45rem } .words { min-width: 9rem }
  tbody th { min-width: 5.5rem; max-width: 8rem } td .soft, th .soft { font-size: .78rem }
}
summary { cursor: pointer } pre { overflow-x: auto; background: var(--panel); padding: .7rem; font-size: .8rem;
  overflow-wrap: normal }
"""


def report(paths: Sequence[Path], out: Path) -> Path:
    """Write a page about runs' folders and comparisons' folders, in any mixture.

    Args:
        out: the page's file; its folder is made if need be.
    Returns:
        `out`.
    Raises:
        UserError: if a path is neither a run nor a comparison, is damaged, or `out` cannot be written.
    """
    if not paths:
        raise UserError("name at least one run's or comparison's folder.", "scrimp report")
    found = [_load(Path(path)) for path in paths]
    body = page(_titled([f for f in found if isinstance(f, RunLog)]), [f for f in found if isinstance(f, Comparison)])
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(body, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}.", str(out), "Set --out to a file.") from None
    return out


def _load(path: Path) -> RunLog | Comparison:
    """What a path holds.

    Raises:
        UserError: if it is neither a run nor a comparison.
    """
    if path.name == ablation.FILE and path.is_file():
        path = path.parent
    if (path / ablation.FILE).is_file():
        return Comparison.load(path / ablation.FILE)
    if (path / "recipe.yaml").is_file():
        return RunLog.load(path)
    if not path.exists():
        raise UserError("does not exist.", str(path), "Name a run's folder or a comparison's folder.")
    inside = sorted(p.parent.name for name in ("recipe.yaml", ablation.FILE) for p in path.glob(f"*/{name}"))
    what = f"is neither a run, which has a recipe.yaml, nor a comparison, which has a {ablation.FILE}."
    raise UserError(what, str(path), f"In it are: {', '.join(inside[:8])}." if inside else "")


def _titled(runs: Sequence[RunLog]) -> list[RunLog]:
    """Runs with names that differ: with their folder's where two are called the same."""
    names = [run.name for run in runs]
    return [replace(run, name=str(run.path)) if names.count(run.name) > 1 else run for run in runs]


def page(runs: Sequence[RunLog], comparisons: Sequence[Comparison]) -> str:
    """The whole page."""
    title = ", ".join([c.name for c in comparisons] + [run.name for run in runs])
    # One thing alone is what the page's own title names.
    alone = len(comparisons) + bool(runs) == 1
    parts = [f"{'' if alone else heading(c.name)}{ablation.section(c)}{_comparison_facts(c)}" for c in comparisons]
    if runs:
        parts.append(f"{'' if alone else heading('Runs')}{runlog.section(runs)}")
        plans = "".join(_memory(run.path / "recipe.yaml", run.name) for run in runs)
        parts += [f'<div class="charts">{plans}</div>', *map(_run_facts, runs)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head>\n"
        f"<body>{heading(title, 1)}{''.join(parts)}</body></html>\n"
    )


def heading(words: str, level: int = 2) -> str:
    """A title of a part."""
    return f"<h{level}>{text(words)}</h{level}>\n"


def _comparison_facts(found: Comparison) -> str:
    """Memory over the baseline's step, its recipe, and where it was measured."""
    recipe = yaml.safe_dump(found.recipe, sort_keys=False, allow_unicode=True)
    environment = found.environment | ({"commit": found.commit} if found.commit else {})
    memory = f'<div class="charts">{_memory(found.recipe, "the baseline")}</div>'
    return memory + details("Recipe of the baseline", recipe) + _where(environment)


def _run_facts(run: RunLog) -> str:
    """A run's recipe, and where it was measured."""
    return details(f"Recipe of {run.name}", run.recipe) + _where(run.environment, f" of {run.name}")


def _where(environment: dict[str, Any], whose: str = "") -> str:
    """Machine and versions in a line, and all that is known of them folded away."""
    if not environment:
        return ""
    known = [str(environment.get(key) or "") for key in ("processor", "cuda")]
    known += [plural(environment["threads"], "thread")] if "threads" in environment else []
    known += [f"{key} {environment[key]}" for key in ("torch", "scrimp", "python") if key in environment]
    rows = json.dumps(environment, indent=1, ensure_ascii=False)
    return details(f"Environment{whose}: {', '.join(filter(None, known))}", rows)


def details(title: str, content: str) -> str:
    """Text that is folded away until the reader asks for it."""
    return f"<details><summary>{text(title)}</summary><pre>{text(content)}</pre></details>\n"


def _memory(source: Path | dict[str, Any], whose: str) -> str:
    """Planned memory over two steps, or a sentence that says why there is no plan."""
    try:
        # Planning needs torch, and the parts and data that the recipe names; the rest of the page does not.
        from scrimp.planning import plan
        from scrimp.planview import columns
        from scrimp.recipe import Recipe

        recipe = Recipe.load(source) if isinstance(source, Path) else Recipe.read(source)
        if reason := _slow(recipe):
            return (
                f'<p class="soft">Memory over a step is not planned here: {reason}. See <code>scrimp plan</code>.</p>'
            )
        stage = plan(recipe).worst
        values, parts = columns(stage, SPANS)
    except Exception as error:  # whatever another machine's, version's or package's recipe meets here
        told = str(error).split("\n")[-1].strip(" -") or type(error).__name__
        return f'<p class="soft">Memory over a step cannot be planned here: {text(told)}</p>'
    title = f"Planned memory of {whose} over two steps (live tensors)"
    return area(title, values, parts, BYTES)


def _slow(recipe: Recipe) -> str:
    """Why a plan of it would take long; empty if it would not."""
    layers = getattr(recipe.model, "layers", 0)
    return f"{layers} layers take a while" if isinstance(layers, int) and layers > QUICK else ""
