"""The demonstration's recipe is the one that was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from scrimp import demo
from scrimp.demo import recipes
from scrimp.recipe import Recipe

ROOT = Path(__file__).parents[2]


def test_the_demo_trains_the_thrifty_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "_multiplies_16_bits", lambda: True)
    shown, written = recipes(tmp_path, demo.STEPS)["thrifty"], Recipe.load(ROOT / "recipes" / "thrifty.yaml")
    assert {t.name: t for t in shown.techniques} == {t.name: t for t in written.techniques}
    assert (shown.model, shown.data, shown.batch, shown.groups) == (
        written.model, written.data, written.batch, written.groups,
    )  # fmt: skip
    assert shown.duration == written.duration


def test_without_16_bit_products_nothing_runs_in_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "_multiplies_16_bits", lambda: False)
    names = {t.name: t for t in recipes(tmp_path, 20)["thrifty"].techniques}
    assert "autocast" not in names and getattr(names["muon"], "precision") == "float32"  # noqa: B009
