"""Comparisons: which arms there are, that finished cells are not run again, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scrimp.arms import arms, at_rate, in_question
from scrimp.compareview import text
from scrimp.comparing import Comparison, measured, reach, summary
from scrimp.errors import UserError
from scrimp.recipe import Recipe
from scrimp.tasks.causal_lm import CausalLM
from tiny import TinyData, example, recipe


def made() -> Recipe:
    return recipe(*(example(name) for name in ("adamw", "warmup_cosine", "clip", "recompute", "fused_loss")))


def test_the_arms() -> None:
    whole = made()
    found, left_out = arms(whole, in_question(whole), [["clip", "recompute"]])
    assert not left_out
    assert [arm.name for arm in found] == [
        "baseline", "clip", "recompute", "fused_loss", "all", "all without clip", "all without recompute",
        "all without fused_loss", "clip+recompute",
    ]  # fmt: skip
    names = {arm.name: {t.name for t in arm.recipe.techniques} for arm in found}
    assert names["baseline"] == {"adamw", "warmup_cosine"}
    assert names["clip"] == {"adamw", "warmup_cosine", "clip"}
    assert names["all"] == {t.name for t in whole.techniques}
    assert names["all without clip"] == names["all"] - {"clip"}


def test_what_sets_the_same_thing_takes_its_place() -> None:
    whole = made()
    found, left_out = arms(whole, in_question(whole, ["lion", "sgd", "wsd"]))
    names = {arm.name: {t.name for t in arm.recipe.techniques} for arm in found}
    assert names["lion"] & {"adamw", "lion"} == {"lion"}
    assert names["wsd"] & {"warmup_cosine", "wsd"} == {"wsd"}
    assert "update rule" in left_out["all"]
    assert "all without sgd" in names


def test_the_whole_catalogue_but_the_basis() -> None:
    found = {t.name for t in in_question(made(), everything=True)}
    assert "adamw" not in found and "warmup_cosine" not in found
    assert {"lion", "clip", "lora"} <= found


def test_the_baselines_rule_and_unknown_kinds() -> None:
    with pytest.raises(UserError, match="own update rule"):
        in_question(made(), ["adamw"])
    with pytest.raises(UserError, match="alone"):
        arms(made(), in_question(made()), kinds=["alon"])


def test_a_rate_that_diverges_is_not_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found, _ = arms(made(), in_question(made()), kinds=["alone"])
    compared = Comparison(tmp_path, found, {}, [0], [1.0, 100.0])

    def cell(arm: Any, recipe: Recipe, rate: float, seed: int, what: str = "cell") -> dict[str, Any]:
        if rate > 1:
            raise UserError("the loss is nan.")
        return {"lr": rate, "loss": 1.0}

    monkeypatch.setattr(compared, "_cell", cell)
    assert [c["lr"] for c in compared._sweep(found[0], found[0].recipe)] == [1.0]  # pyright: ignore[reportPrivateUsage]
    compared.rates = [100.0]
    with pytest.raises(UserError, match="nan"):
        compared._sweep(found[0], found[0].recipe)  # pyright: ignore[reportPrivateUsage]


def test_nothing_to_compare() -> None:
    with pytest.raises(UserError, match="--with"):
        in_question(recipe(example("adamw")))
    with pytest.raises(UserError, match="not one of the techniques"):
        arms(made(), in_question(made()), [["lora"]])


def test_the_learning_rate_of_the_rule_only() -> None:
    changed = at_rate(made(), 0.5)
    rates = {t.name: getattr(t, "lr", None) for t in changed.techniques}
    assert rates["adamw"] == 0.5e-3
    assert at_rate(made(), 1.0) == made()


def test_reaching_a_loss_is_interpolated() -> None:
    curve = [(1, 10, 1.0, 5.0), (2, 20, 2.0, 4.0), (3, 30, 3.0, 3.0)]
    assert reach(curve, 3.5) == pytest.approx((2.5, 25))
    assert reach(curve, 6.0) == (1.0, 10)
    assert reach(curve, 2.0) is None


def cell(loss: float, seconds: float = 10.0) -> dict[str, Any]:
    return {"loss": loss, "seconds": seconds, "tokens_per_second": 100 / seconds, "peak_bytes": 100,
            "curve": [(1, 50, seconds / 2, loss + 1), (2, 100, seconds, loss)]}  # fmt: skip


def test_a_gain_is_one_only_when_the_seeds_agree() -> None:
    base = {"cells": [cell(2.0), cell(2.1), cell(2.2)]}
    sure = summary({"cells": [cell(1.9, 5), cell(2.0, 5), cell(2.101, 5)]}, base, 2.2)
    assert sure["verdict"] == "better" and sure["speed"] == pytest.approx(2.0) and sure["p"] < 0.05
    assert sure["seconds_to_baseline"] < 5
    own = summary(base, base, None)
    assert own["verdict"] == "baseline" and own["seconds_to_baseline"] == pytest.approx(10, rel=1e-2)
    unsure = summary({"cells": [cell(1.9), cell(2.2), cell(2.1)]}, base, None)
    assert unsure["verdict"] == "no difference seen"
    one = summary({"cells": [cell(1.0)]}, {"cells": [cell(2.0)]}, None)
    assert one["verdict"] == "no difference seen" and one["interval"] is None
    assert summary({"cells": [cell(9.0)]}, {"cells": [cell(2.0)]}, None)["seconds_to_baseline"] is None


@pytest.mark.parametrize(("seeds", "said"), [([0], " 1 seed, same steps"), ([0, 1], " 2 seeds, same steps")])
def test_one_seed_is_one(seeds: list[int], said: str) -> None:
    base: dict[str, Any] = {"name": "baseline", "techniques": ["sgd"], "claim": "", "lr": 1.0, "cells": [cell(2.0)],
                            "planned": {"memory": 1, "seconds": 1}}  # fmt: skip
    base["summary"] = summary(base, base, None)
    assert said in text({"arms": [base], "seeds": seeds, "mode": "same-steps", "left_out": {}})


def test_the_clock_leaves_out_first_steps(tmp_path: Path) -> None:
    steps = [(1, 0, 9.0), (2, 0, 1.0), (3, 0, 1.2), (4, 1, 8.0), (5, 1, 2.0)]
    shared: dict[str, Any] = {"loss": 1.0, "tokens": 10, "peak_bytes": 7}
    lines = [{"step": n, "stage": stage, "seconds": s, **shared} for n, stage, s in steps]
    lines.append({"step": 5, "validation_loss": 3.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = measured(tmp_path, TinyData().open(), CausalLM())
    assert found["seconds"] == pytest.approx(1.1 + 1.0 + 1.2 + 2.0 + 2.0)
    assert found["tokens"] == 50 and found["loss"] == 3.0
    (tmp_path / "metrics.jsonl").write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(UserError, match="needs validation"):
        measured(tmp_path, TinyData().open(), CausalLM())


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["same-steps", "same-time"])
def test_a_comparison_from_end_to_end(mode: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("words and more words of text\n\n" * 3000)
    whole = Recipe.read({
        "model": {"layers": 1, "width": 16, "heads": 2}, "batch": 2, "duration": "8 step",
        "data": {"source": str(tmp_path / "text.txt"), "tokenizer": "bytes", "context": 16, "cache": str(tmp_path)},
        "techniques": {"sgd": {}, "clip": {}}, "validate": {"every": 0.5, "batches": 2},
    })  # fmt: skip
    found, left_out = arms(whole, in_question(whole))
    said: list[str] = []
    run = Comparison(tmp_path / "out", found, left_out, [0, 1], [0.5, 1.0], mode, say=said.append)
    result = run.run()
    assert [arm["name"] for arm in result["arms"]] == ["baseline", "clip"]
    assert all(len(arm["cells"]) == 2 and len(arm["sweep"]) == 2 for arm in result["arms"])
    assert result["arms"][0]["cells"][0]["bits_per_byte"] > 0
    assert json.loads((tmp_path / "out/comparison.json").read_text())["mode"] == mode
    assert not list((tmp_path / "out/runs").glob("*/"))
    assert "baseline" in text(result) and "verdict" in text(result)
    before = len(said)
    again = Comparison(tmp_path / "out", found, {}, [0, 1], [0.5, 1.0], mode, say=said.append).run()
    for arm in (*again["arms"], *result["arms"]):
        arm["planned"].pop("seconds")  # by the machine's speed, which is measured anew
    assert again["arms"] == result["arms"]
    assert not any("tokens/s" in line for line in said[before:]), "no finished cell is run again"
