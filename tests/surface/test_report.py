"""The page of `scrimp report`: what it shows, that its pictures are valid, and what it says of bad paths."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from scrimp import report as module
from scrimp.charts import Axis, Line, line_chart, spread, text, ticks
from scrimp.cli import app
from scrimp.errors import UserError
from scrimp.forest import Effect, forest
from scrimp.report import report

NASTY = "<script>alert('&\"')</script>\x00\ud800"
RECIPE: dict[str, Any] = {
    "model": {"name": "transformer", "layers": 1, "width": 16, "heads": 2},
    "data": {"tokenizer": "bytes", "context": 16},
    "techniques": {"adamw": {"lr": 1e-3}},
    "batch": 2,
    "duration": "100 step",
}


def arm(name: str, kind: str = "alone", gain: float = 0.0, seeds: int = 3, **summary: Any) -> dict[str, Any]:
    """An arm whose loss falls as 6 / step ** 0.1, less a gain, a little different with each seed."""

    def curve(seed: int) -> list[tuple[int, int, float, float]]:
        steps = range(10, 101, 10)
        return [(n, 32 * n, n * (0.1 + 0.01 * seed), 6 / n**0.1 - gain + 0.01 * seed) for n in steps]

    cells = [
        {"seed": s, "lr": 1.0, "loss": curve(s)[-1][3], "bits_per_byte": 1.5, "seconds": curve(s)[-1][2],
         "peak_bytes": 5e8, "tokens": 3200, "tokens_per_second": 320.0, "trained": 100, "curve": curve(s)}
        for s in range(seeds)
    ]  # fmt: skip
    told = {
        "loss": cells[0]["loss"], "difference": -gain, "interval": [-gain - 0.02, -gain + 0.02] if seeds > 1 else None,
        "p": 0.01, "verdict": "better" if gain > 0 else "worse" if gain < 0 else "no difference seen", "speed": 1.25,
        "memory": 0.5, "seconds_to_baseline": None if gain < 0 else 8.0, "tokens_to_baseline": None,
    }  # fmt: skip
    planned = {"memory": 4e8, "live": 3e8, "seconds": 0.1, "flops": 2e12}
    return {"name": name, "kind": kind, "techniques": ["adamw", name], "lr": 1.0, "claim": f"Claim of {name}.",
            "planned": planned, "cells": cells, "summary": told | summary}  # fmt: skip


def comparison(*arms: dict[str, Any], **fields: Any) -> dict[str, Any]:
    rows = arms or (arm("baseline", "baseline"), arm("lion", gain=0.1), arm("recompute"), arm("sam", gain=-0.05))
    return {
        "name": "sweep", "recipe": RECIPE, "mode": "same-steps", "seeds": [0, 1, 2], "lrs": [0.5, 1.0],
        "environment": {"processor": "Abacus", "torch": "2.13"}, "commit": "abc123", "arms": list(rows),
    } | fields  # fmt: skip


def write(folder: Path, found: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "comparison.json").write_text(found if isinstance(found, str) else json.dumps(found))
    return folder


def run_folder(folder: Path, recipe: str = "techniques: {adamw: {lr: 1e-3}, clip: {}}\n", count: int = 400) -> Path:
    """What a run leaves, without training it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(recipe)
    (folder / "environment.json").write_text(json.dumps({"processor": "Abacus", "threads": 2, "cuda": None}))
    lines: list[dict[str, Any]] = []
    for n in range(1, count + 1):
        lines.append({"step": n, "loss": 9 / n**0.1, "tokens": 64, "seconds": 0.5, "stage": 0, "peak_bytes": 10**8 + n})
        if n % 100 == 0:
            lines.append({"step": n, "tokens": 64 * n, "validation_loss": 9.5 / n**0.1})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 401, "lo')
    return folder


def pictures(page: str) -> list[ElementTree.Element]:
    """Every SVG of a page, parsed as XML."""
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg .*?</svg>", page, re.DOTALL)]


def captions(page: str) -> list[str]:
    return re.findall("<figcaption>(.*?)</figcaption>", page)


@pytest.fixture(autouse=True)
def _quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No plans, but where they are tested."""
    if not request.node.name.startswith("test_memory"):
        monkeypatch.setattr(module, "_memory", lambda source, whose: "")


def test_a_comparison_has_a_table_a_forest_plot_and_three_charts(tmp_path: Path) -> None:
    out = report([write(tmp_path / "c", comparison())], tmp_path / "new" / "page.html")
    page = out.read_text()
    assert captions(page) == [
        "Loss against the baseline, 95 % intervals", "Held-out loss by training time", "Held-out loss by tokens",
        "Held-out loss by FLOPs, as planned",
    ]  # fmt: skip
    assert len(pictures(page)) == 4 + 4, "four charts, and a sample of each line in the legend"
    assert "3 sets of techniques against a baseline, 3 seeds each, for the same number of steps," in page
    assert "Loss is lower than the baseline&#x27;s with 1, higher with 1; with 1 no difference was seen." in page
    row = re.findall("<tr>.*?</tr>", page)[-3]
    assert all(
        words in row for words in ("lion", "Claim of lion.", "\u22120.1000 [\u22120.1200, \u22120.0800]", "0.50\u00d7")
    )
    assert '<span class="better">\u25cf better</span>' in row
    assert "not reached" in re.findall("<tr>.*?</tr>", page)[-1]
    assert "abc123" in page
    assert "Abacus" in page


def test_nothing_comes_from_elsewhere_and_nothing_runs(tmp_path: Path) -> None:
    paths = [write(tmp_path / "c", comparison()), run_folder(tmp_path / "r")]
    page = report(paths, tmp_path / "page.html").read_text()
    assert set(re.findall(r"https?://[^\"']*", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.findall(r"<(script|link|img|iframe)|url\((?!#)|@import| on\w+=", page)
    assert 'name="viewport"' in page
    assert "prefers-color-scheme: dark" in page


def test_one_seed_has_no_interval_and_unknown_flops_no_chart(tmp_path: Path) -> None:
    rows = [arm("baseline", "baseline", seeds=1), arm("lion", gain=0.1, seeds=1, verdict="no difference seen")]
    for row in rows:
        row["planned"]["flops"] = None
    page = report([write(tmp_path / "c", comparison(*rows, seeds=[0], lrs=[1.0]))], tmp_path / "p.html").read_text()
    assert "<td>\u22120.1000<br>" in page
    assert "learning rates" not in page
    assert "1 seed each" in page
    assert captions(page)[1:] == ["Held-out loss by training time", "Held-out loss by tokens"]


def test_a_comparison_of_the_same_time_needs_the_planned_steps_for_flops(tmp_path: Path) -> None:
    epochs = comparison(mode="same-time", recipe=RECIPE | {"duration": "1 epoch"})
    assert "FLOPs" not in report([write(tmp_path / "c", epochs)], tmp_path / "p.html").read_text()
    steps = comparison(mode="same-time")
    assert "FLOPs" in report([write(tmp_path / "c", steps)], tmp_path / "p.html").read_text()


def test_what_users_named_is_escaped(tmp_path: Path) -> None:
    rows = [arm("baseline", "baseline"), arm(NASTY, gain=0.1, verdict=NASTY)]
    more = {"environment": {NASTY: NASTY}, "recipe": {NASTY: NASTY}, "left_out": {NASTY: NASTY}, "mode": NASTY}
    paths = [write(tmp_path / "c", comparison(*rows, name=NASTY, commit=NASTY, **more))]
    paths += [run_folder(tmp_path / "<b>x" / name, recipe="techniques: {'<b>x': {}}\n") for name in ("a<b>x", "b<b>x")]
    page = report(paths, tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert "<b>x" not in page
    assert "\x00" not in page
    assert "a&lt;b&gt;x" in page
    assert pictures(page)


def test_runs_have_a_table_and_charts(tmp_path: Path) -> None:
    paths = [run_folder(tmp_path / "a" / "same"), run_folder(tmp_path / "b" / "same")]
    page = report(paths, tmp_path / "page.html").read_text()
    assert captions(page) == [
        "Training loss by tokens", "Held-out loss by tokens", "Held-out loss by training time", "Tokens a second",
        "Peak memory so far",
    ]  # fmt: skip
    assert len(pictures(page)) == 5 + 2
    assert f"{tmp_path}/a/same" in page, "runs of the same name are told apart"
    row = re.findall("<tr>.*?</tr>", page)[-1]
    assert all(words in row for words in ("adamw, clip", "5.2182", ">400<", "25,600", "128", "95.4 MiB"))


def test_a_run_of_one_step_without_validation_is_shown(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "r", recipe="[not a recipe", count=1)
    (run / "environment.json").unlink()
    page = report([run], tmp_path / "page.html").read_text()
    assert captions(page) == ["Training loss by tokens", "Tokens a second", "Peak memory so far"]
    assert "[not a recipe" in page
    assert pictures(page)


def test_memory_over_a_step_is_planned(tmp_path: Path) -> None:
    tiny = json.dumps(
        {"model": {"layers": 1, "width": 16, "heads": 2}} | {k: RECIPE[k] for k in RECIPE if k != "model"}
    )
    page = report([run_folder(tmp_path / "r", recipe=tiny)], tmp_path / "page.html").read_text()
    assert "Planned memory of r over two steps (live tensors)" in captions(page)
    assert pictures(page)


def test_memory_that_cannot_be_planned_is_a_sentence(tmp_path: Path) -> None:
    deep = json.dumps(RECIPE | {"model": {"layers": 48, "width": 16, "heads": 2}})
    runs = [run_folder(tmp_path / "a", recipe="techniques: {lyon: {}}\n"), run_folder(tmp_path / "b", recipe=deep)]
    page = report(runs, tmp_path / "page.html").read_text()
    assert "cannot be planned here: techniques.lyon: there is no technique `lyon`." in page
    assert "is not planned here: 48 layers take a while." in page


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "x: is neither a run, which has a recipe.yaml, nor a comparison, which has a comparison.json."),
        ({"plain/recipe.yaml": "", "other/comparison.json": ""}, "comparison.json. In it are: other, plain."),
        ({"recipe.yaml": ""}, "x: has no metrics.jsonl, so that there is nothing to report. Train it first."),
        ({"recipe.yaml": "", "metrics.jsonl": ""}, "x: has no steps to report yet."),
        ({"recipe.yaml": "", "metrics.jsonl": '{"step": 1, "loss": 2}\n'}, "x: a file of the run is damaged: KeyError"),
        ({"recipe.yaml": "", "metrics.jsonl": "", "environment.json": "["}, "x: a file of the run is damaged: JSON"),
        ({"comparison.json": "[1"}, "x/comparison.json: is not JSON."),
        ({"comparison.json": "{}"}, "comparison.json: is no comparison: `name`: Field required. Run `scrimp compare`"),
        ({"comparison.json": json.dumps(comparison() | {"arms": []})}, "is a comparison without results."),
    ],
)
def test_what_is_no_run_and_no_comparison_is_refused(files: dict[str, str], message: str, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    for name, content in files.items():
        path = tmp_path / "x" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    with pytest.raises(UserError) as error:
        report([tmp_path / "x"], tmp_path / "page.html")
    assert message in str(error.value)
    assert not (tmp_path / "page.html").exists()


def test_absent_paths_and_pages_that_cannot_be_written_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent: does not exist. Name a run's folder"):
        report([tmp_path / "absent"], tmp_path / "page.html")
    with pytest.raises(UserError, match="cannot be written: Is a directory. Set --out to a file."):
        report([run_folder(tmp_path / "r")], tmp_path)


def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    app(["report", str(run_folder(tmp_path / "r")), "--out", str(out)], standalone_mode=False)
    assert capsys.readouterr().out == f"Wrote {out}\n"
    assert out.read_text().startswith("<!doctype html>")


def test_lines_without_finite_points_are_left_out() -> None:
    bad = [Line("a", 0, [(0.0, math.nan), (math.inf, 1.0)]), Line("b", 1, [])]
    assert line_chart("t", bad, Axis("x"), Axis("y")) == ""
    flat = line_chart("t", [*bad, Line("c", 2, [(0.0, 0.0)])], Axis("x"), Axis("y"))
    assert len(pictures(flat)) == 1
    assert "nan" not in flat


def test_a_wide_interval_ends_in_an_arrow() -> None:
    plot = forest("t", [Effect("a", 0.1, -9.0, 9.0, "", ""), Effect("b", -0.1, -0.2, 0.0, "better", "")], "x")
    assert plot.count("<polygon") == 2
    assert pictures(plot)
    assert ">" + "n" * 25 + "\N{HORIZONTAL ELLIPSIS}<" in forest("t", [Effect("n" * 40, 0.1, None, None, "", "")], "x")
    assert forest("t", [Effect("a", math.nan, None, None, "", "")], "x") == ""


def test_numbers_at_the_ends_of_lines_do_not_touch() -> None:
    placed = spread([50.0, 50.0, 51.0, 199.0, 200.0], 12, 10, 200)
    assert placed == [38.5, 50.5, 62.5, 188.0, 200.0]
    assert spread([5.0] * 100, 12, 0, 99) == pytest.approx(range(100))


def test_ticks_are_round() -> None:
    assert [words for _, words in ticks(0, 1000, 4)] == ["0", "500", "1,000"]
    assert [words for _, words in ticks(-0.021, 0.031, 5)] == ["\u22120.02", "0.00", "0.02"]
    assert text("a\x01\ud800<") == "a\N{REPLACEMENT CHARACTER}?&lt;"


def test_runs_are_told_apart_by_what_differs_in_their_recipes(tmp_path: Path) -> None:
    same = [run_folder(tmp_path / name) for name in "ab"]
    assert "2 runs; their recipes are the same." in report(same, tmp_path / "p.html").read_text()
    other = run_folder(tmp_path / "c", recipe="name: c\nbatch: 2\ntechniques: lion\n")
    page = report([*same, other], tmp_path / "p.html").read_text()
    assert "3 runs; their recipes differ in techniques, batch." in page
    assert ">lion</td>" in page


def test_without_claims_there_is_no_column_of_them(tmp_path: Path) -> None:
    rows = [arm("baseline", "baseline") | {"claim": ""}, arm("lion") | {"claim": ""}]
    page = report([write(tmp_path / "c", comparison(*rows))], tmp_path / "p.html").read_text()
    assert ">claimed<" not in page
    assert page.count("<td") == 2 * 7
