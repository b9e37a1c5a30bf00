"""What makes a recipe fit, and what every technique would do to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from scrimp.errors import UserError
from scrimp.fitting import Fit, each, fit, remedies
from scrimp.limits import size_of
from scrimp.machines.machine import Machine
from scrimp.planning import plan
from scrimp.planview import as_json, fit_json, fitted, page, text, tips, tips_json
from scrimp.recipe import Recipe
from scrimp.registry import catalogue, modules
from tiny import MODEL, TinyData, example, recipe

GPU = Machine(name="small", device="cpu", memory=1 << 34, flops={"float32": 1e11, "bfloat16": 1e11}, bandwidth=1e10)
LARGE = {"layers": 2, "width": 256, "heads": 2}
DATA = TinyData(context=256)
SPARED = 14_000_000


def big() -> Recipe:
    return recipe(example("adamw"), model=LARGE, data=DATA, batch=4)


def test_what_fits_needs_no_remedy() -> None:
    found = fit(big(), GPU, 1 << 34)
    assert found.given.fits and not found.options and found.tried == 0
    assert "fits as it is" in fitted(found)


@pytest.fixture(scope="module")
def fitting() -> Fit:
    """What brings the large recipe under a limit."""
    return fit(big(), GPU, plan(big(), GPU, DATA.open()).memory - SPARED)


def test_remedies_bring_a_recipe_under_the_limit(fitting: Fit) -> None:
    found = fitting
    assert not found.given.fits
    assert found.options
    assert all(o.plan.memory <= found.given.memory - SPARED for o in found.options)
    times = [o.plan.seconds for o in found.options]
    assert times == sorted(times)
    sets = [{r.name for r in o.remedies} for o in found.options]
    assert not any(a < b for a in sets for b in sets), "no set holds another that suffices"


def test_an_option_is_lines_that_a_recipe_reads(fitting: Fit) -> None:
    option = fitting.options[0]
    shown = fitted(fitting).split("1. ")[1].split("\n2. ")[0].split("\n", 1)[1]
    raw = yaml.safe_load("\n".join(line[5:] for line in shown.splitlines()))
    raw["techniques"] = {"adamw": {"lr": 1e-3}} | (raw.get("techniques") or {})
    again = Recipe.read({"model": LARGE, "batch": 4, "data": "text", "duration": "8 step", **raw})
    assert {t.name for t in again.techniques} == {"adamw"} | {r.name for r in option.remedies if r.name != "dtype"}


def test_adapters_are_no_remedy_from_scratch() -> None:
    assert "lora" not in {r.name for r in remedies(big())}


def test_when_nothing_fits_it_says_how_much_is_missing() -> None:
    found = fit(big(), GPU, 1000)
    assert not found.options
    assert found.closest.plan.memory < found.given.memory
    assert "Nothing fits" in fitted(found) and "closest lacks" in fitted(found)
    assert json.loads(json.dumps(fit_json(found)))["options"] == []


@pytest.mark.slow
def test_every_technique_has_a_row() -> None:
    made = recipe(example("adamw"), model=MODEL | {"layers": 2, "dropout": 0.0})
    rows = each(made, GPU)
    assert {row.name for row in rows} == set(modules())
    found = {row.name: row for row in rows}
    assert found["adamw"].plan is None and "already" in found["adamw"].reason
    lion, base = found["lion"], plan(made, GPU, TinyData().open())
    assert lion.plan is not None and lion.plan.live < base.live and lion.reason == "instead of adamw"
    shown = tips(base, rows)
    assert len(shown.splitlines()) == len(rows) + 2
    assert len(json.loads(json.dumps(tips_json(rows)))) == len(rows)


@pytest.mark.parametrize(("given", "size"), [("16GB", 16 * 10**9), ("24 GiB", 24 << 30), ("1.5mb", 1_500_000)])
def test_sizes(given: str, size: int) -> None:
    assert size_of(given) == size


@pytest.mark.parametrize("given", ["", "16", "GB", "-1GB", "x GB", "0GB"])
def test_what_is_no_size(given: str) -> None:
    with pytest.raises(UserError, match="is not a size"):
        size_of(given)


def test_a_plan_is_text_json_and_a_page(tmp_path: Path) -> None:
    made = recipe(example("adamw"), example("stack"))
    planned = plan(made, "A100-40", made.data.open())
    shown = text(planned)
    for words in ("Memory at its highest", "weights", "live tensors", "in segments of torch", "Stages", "kWh", "Note:"):
        assert words in shown
    assert max(len(line) for line in shown.splitlines()) < 140
    values = json.loads(json.dumps(as_json(planned)))
    assert values["memory"]["live"] == planned.live and len(values["stages"]) == 2
    assert page(planned).count("<svg") == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--machine", "elza"], "--machine: there is no machine `elza`. Did you mean elsa"),
        (["--machine", "L4", "--kept", "0.5"], "--kept: `L4` is no accelerator"),
        (["--layouts"], "--ranks 8"),
    ],
)
def test_mistakes_on_the_command_line_say_what_to_do(tmp_path: Path, words: list[str], said: str) -> None:
    from typer.testing import CliRunner

    from scrimp.cli import app

    (tmp_path / "r.yaml").write_text("{model: gpt-1m, data: {source: python-stdlib}, techniques: adamw}")
    assert said in str(CliRunner().invoke(app, ["plan", str(tmp_path / "r.yaml"), *words]).exception)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from scrimp.cli import app

    (tmp_path / "text.txt").write_text("words and more words\n\n" * 2000)
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump({
        "model": {"layers": 2, "width": 32, "heads": 2}, "techniques": {"adamw": {}}, "batch": 2, "duration": "4 step",
        "data": {"source": str(tmp_path / "text.txt"), "tokenizer": "bytes", "context": 16, "cache": str(tmp_path)},
    }))  # fmt: skip
    run = CliRunner()
    html = tmp_path / "plan.html"
    shown = run.invoke(app, ["plan", str(file), "--machine", "L4", "--html", str(html)])
    assert shown.exit_code == 0 and "live tensors" in shown.output and "<svg" in html.read_text()
    as_text = run.invoke(app, ["plan", str(file), "--machine", "L4", "--json"]).output
    assert json.loads(as_text)["machine"] == "L4"
    assert "fits as it is" in run.invoke(app, ["plan", str(file), "--machine", "L4", "--fit", "16GB"]).output
    some = {name: entry for name, entry in catalogue().items() if name in ("lion", "recompute")}
    monkeypatch.setattr("scrimp.fitting.catalogue", lambda: some)
    assert "recompute" in run.invoke(app, ["plan", str(file), "batch=4", "--machine", "L4", "--each"]).output
