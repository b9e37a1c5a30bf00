"""What was published and what is simulated: goldens, verdicts, and the words for where a value comes from."""

from __future__ import annotations

import json
from functools import cache
from math import ceil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from scrimp.cli import app
from scrimp.machines.accelerators.architecture import accelerator
from scrimp.machines.accelerators.dataflows import outerspace
from scrimp.machines.accelerators.published import MODELS, UNIFORM
from scrimp.machines.accelerators.validation import Row, references, validate
from scrimp.machines.accelerators.views import CLASSES, cells


@cache
def rows() -> dict[str, Row]:
    return {row.reference.name: row for row in validate()}


@pytest.mark.parametrize(
    ("name", "value"),
    [("vitcod-total", 9492), ("vitcod-loads", 9492), ("vitcod-decode", 4728), ("vitcod-products", 4709),
     ("vitcod-ffn", 2043156), ("spatten-bert", 222487), ("two-four-16", 0.5625), ("two-four-8", 0.625),
     ("systolic-gemm", 20448)],
)  # fmt: skip
def test_goldens_are_exact(name: str, value: float) -> None:
    assert rows()[name].found == value and rows()[name].verdict == "exact"


def test_closed_forms_are_within_their_tolerance() -> None:
    closed = [row for row in rows().values() if row.reference.kind == "L0"]
    assert len(closed) == 26 and {row.verdict for row in closed} == {"exact", "within"}
    assert max(row.reference.tolerance for row in closed) <= 0.1
    traffic = [row.error for name, row in rows().items() if name.startswith("outerspace-bytes")]
    assert np.round(100 * np.array(traffic), 1).tolist() == [-1.2, -6.4, 0.1, 0.1, -0.0]


def test_waiting_is_judged_by_what_it_was_not_fitted_on() -> None:
    errors = [rows()[f"outerspace-time-{n}"].error for n, *_ in UNIFORM]
    assert np.round(100 * np.array(errors), 1).tolist() == [-12.9, 13.5, -10.4, 4.3, -3.8]
    n, entries, products, seconds = (np.array(column) for column in zip(*UNIFORM, strict=True))
    machine = accelerator("outerspace")
    fitted = outerspace.fit(n, entries, products, seconds) * 1e9
    assert fitted == pytest.approx([machine.setting(f"{k}_ns") for k in ("product", "element", "row")], rel=0.01)


def test_verdicts() -> None:
    row = rows()["vitcod-reorder"]
    assert row.verdict == "outside" and row.error == pytest.approx(-0.371, abs=0.001)
    assert Row(row.reference, row.reference.value * 1.25).verdict == "within"
    assert Row(row.reference, row.reference.value * 1.26).verdict == "outside"
    assert Row(row.reference, None).verdict == "not simulated"


def test_a_fitted_value_is_never_printed_as_predicted() -> None:
    fits = [row for row in rows().values() if row.reference.fit]
    assert len(fits) == 5
    for row in fits:
        assert row.verdict == "fitted" and row.reference.fitted_on
        assert cells(row)[3:6] == ["", "", ""] and row.as_json()["error"] is None
        assert cells(row)[6].startswith(f"fitted on {row.reference.fitted_on}")
    gpus = [r for r in references() if r.kind == "L3" and r.model]
    assert all(r.fitted_on for r in gpus)


def test_only_what_was_read_is_called_published() -> None:
    words = {row.reference.tag: row.as_json()["status"] for row in rows().values()}
    assert words == {"V": "published", "S": "second-hand", "C": "computed"}
    recalled = Row(rows()["elsa-headline"].reference.model_copy(update={"tag": "R"}), 1.0)
    assert "recalled" in cells(recalled)[2] and "published" not in " ".join(cells(recalled))


def test_every_reference_names_a_model_and_a_machine() -> None:
    names = [reference.name for reference in references()]
    assert len(set(names)) == len(names)
    for reference in references():
        assert accelerator(reference.machine)
        assert reference.model in MODELS if reference.model else reference.note
    assert {reference.model for reference in references()} - {""} == set(MODELS)


def test_the_evidence_is_what_is_simulated_now() -> None:
    kept = json.loads((Path(__file__).parents[2] / "evidence" / "machines.json").read_text())["rows"]
    assert {row["name"]: row["verdict"] for row in kept} == {name: row.verdict for name, row in rows().items()}
    for row in kept:
        assert row["model_value"] is None or row["model_value"] == pytest.approx(rows()[row["name"]].found, rel=1e-6)


def test_the_command_prints_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    found = list(rows().values())
    monkeypatch.setattr("scrimp.machines.accelerators.validation.validate", lambda: found)
    done = CliRunner().invoke(app, ["validate", "machines", "--json"])
    assert done.exit_code == 0, done.output
    golden = {row["name"]: row for row in json.loads(done.output)["rows"]}["vitcod-total"]
    assert golden["model_value"] == 9492 and golden["verdict"] == "exact"
    done = CliRunner().invoke(app, ["validate"])
    assert done.exit_code == 0 and "9 exact, 17 within" in done.output
    assert all(title in done.output for title in CLASSES.values())
    words = " ".join(done.output.split())
    assert "spatten a layer of BERT-base" in words and "222,487 cycles computed 222,487 +0.0%" in words


@pytest.mark.parametrize("name", ["vitcod-total", "elsa-moderate", "sanger-a3", "elsa-moderate-race"])
def test_a_row_that_is_off_is_a_failure_in_every_class(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = [Row(row.reference, row.reference.value * 2) if key == name else row for key, row in rows().items()]
    monkeypatch.setattr("scrimp.machines.accelerators.validation.validate", lambda: changed)
    done = CliRunner().invoke(app, ["validate"])
    assert done.exit_code == 1 and f"should not be: {name}." in done.output


def test_rows_that_are_known_to_be_outside_are_and_say_why() -> None:
    known = {name for name, row in rows().items() if not row.reference.holds}
    assert known == {name for name, row in rows().items() if row.verdict == "outside"}
    assert known == {"outerspace-schedule-4986", "vitcod-reorder", "vitcod-tx2-512"}
    assert all(rows()[name].reference.note for name in known)


def released(tokens: int, heads: int, kept: int) -> int:
    """The released model of BERT, for heads of 64 numbers that all keep as many keys, without its ranking."""
    batch = ceil(kept / 8)
    bursts = ceil(batch * 8 * 64 * 8 // 8 // 32 / 16)
    return sum(2 * bursts + tokens * batch for _ in range(heads)) + 1 + 1 + 9 + 7 + 21 + 23 + 29 + 7 + batch + 1 + 1 + 3


@pytest.mark.parametrize(("tokens", "heads"), [(384, 12), (100, 3)])
def test_spatten_counts_what_its_released_model_counts(tokens: int, heads: int) -> None:
    assert MODELS["spatten_layer"](accelerator("spatten"), tokens, heads) == released(tokens, heads, tokens)


def test_what_sangers_steps_bring_at_other_densities() -> None:
    """What the notes of its rows say."""

    def gain(step: str, density: float) -> float:
        return round(float(MODELS["sanger_ablation"](accelerator("sanger"), step, density, 384)), 2)

    assert [gain("stationary", d) for d in (0.15, 0.331)] == [2.92, 2.15]
    assert [gain("packed", d) for d in (0.087, 0.15, 0.331)] == [1.0, 1.5, 1.1]
    assert [gain("all", d) for d in (0.15, 0.331)] == [3.89, 2.09]
