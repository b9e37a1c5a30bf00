"""The linear scaling rule: its ramp, what it multiplies, and why it holds."""

from __future__ import annotations

from typing import Any

import pytest

from scrimp.errors import RecipeError, UserError
from scrimp.technique import Technique
from scrimp.training import train
from tiny import assert_equal, example, flat, recipe, run_of


def factors(*techniques: Technique, **settings: Any) -> list[float]:
    """Of a run of 8 steps."""
    run = run_of(recipe(*techniques, **settings))
    return [run.factor(i / 8) for i in range(8)]


def test_ramps_from_the_unscaled_rate() -> None:
    """k = 4 / 1; half the run is the ramp: 1, 1 + 3/4, 1 + 6/4, 1 + 9/4, then 4."""
    found = factors(example("linear_scaling", base=1, warmup=0.5))
    assert found == pytest.approx([1, 1.75, 2.5, 3.25, 4, 4, 4, 4], abs=1e-12)
    assert factors(example("linear_scaling", base=1, warmup="4 step")) == found
    assert factors(example("linear_scaling", base=1, warmup=0)) == [4.0] * 8


def test_the_square_root_and_smaller_batches() -> None:
    assert factors(example("linear_scaling", base=1, rule="sqrt", warmup=0)) == [2.0] * 8
    assert factors(example("linear_scaling", base=16, rule="linear", warmup=0.5)) == [0.25] * 8
    assert factors(example("linear_scaling", base=16, rule="sqrt", warmup=0.5)) == [0.5] * 8


def test_multiplies_a_schedule_with_a_warm_up_of_its_own() -> None:
    shape = factors(example("warmup_cosine", warmup=0.25))
    ramp = factors(example("linear_scaling", base=1, warmup=0.5))
    for order in (("warmup_cosine", "linear_scaling"), ("linear_scaling", "warmup_cosine")):
        settings: dict[str, Any] = {"warmup_cosine": {"warmup": 0.25}, "linear_scaling": {"base": 1, "warmup": 0.5}}
        found = factors(*(example(name, **settings[name]) for name in order))
        assert found == pytest.approx([a * b for a, b in zip(shape, ramp, strict=True)], abs=1e-12)
    assert shape[0] == 0.5


def test_the_same_batch_changes_nothing() -> None:
    base, tried = train(recipe(), save=False), train(recipe(example("linear_scaling", base=4)), save=False)
    assert_equal(flat(base.run.state()), flat(tried.run.state()))


def test_the_linear_rule_under_another_update_rule_is_remarked() -> None:
    def said(*rules: Technique, **settings: Any) -> bool:
        remarks = run_of(recipe(*rules, example("linear_scaling", **settings))).remarks
        return any("for AdamW try `rule: sqrt`" in remark for remark in remarks)

    assert said(example("adamw"), base=1)
    assert not said(example("adamw"), base=1, rule="sqrt")
    assert not said(example("adamw"), base=4)
    assert not said(base=1)


def test_the_decay_of_a_rule_is_not_scaled() -> None:
    run = run_of(recipe(example("adamw"), example("linear_scaling", base=1, warmup=0)))
    plain = run_of(recipe(example("adamw")))
    assert run.optimizer and plain.optimizer
    assert run.set_lr() == 4 * plain.set_lr()
    decays = [[g["weight_decay"] for g in r.optimizer.param_groups] for r in (run, plain)]  # type: ignore[union-attr]
    assert decays[0] == decays[1]


def distance(lr: float, k: int = 4) -> float:
    """Between k steps of SGD on small batches and one on all of them at k lr."""
    plain = {"dtype": "float64", "model": {"layers": 2, "width": 16, "heads": 2, "dropout": 0.0}}
    sgd = example("sgd", lr=lr, momentum=0.0)
    large = run_of(recipe(sgd, example("linear_scaling", base=1, warmup=0), batch=k, **plain))
    small = run_of(recipe(sgd, batch=1, **plain))
    whole = large.batch(0)
    parts = [{n: t[i : i + 1] for n, t in whole.items()} for i in range(k)]
    for run, batches in ((large, [whole]), (small, parts)):
        assert run.backward and run.step and run.optimizer
        for batch in batches:
            run.set_lr()
            run.backward(batch, run.task.count(batch))
            run.step()
            run.optimizer.zero_grad(set_to_none=True)
    pairs = zip(large.model.parameters(), small.model.parameters(), strict=True)
    return float(sum((a - b).detach().square().sum() for a, b in pairs)) ** 0.5


def test_small_steps_end_where_a_scaled_one_does() -> None:
    """To O(lr^2): half the rate, a quarter of the distance."""
    far, near = distance(4e-4), distance(2e-4)
    assert far / near == pytest.approx(4, rel=0.02)
    assert far > 0


def test_faults() -> None:
    with pytest.raises(UserError, match=r"techniques.linear_scaling: base must be at least 1"):
        example("linear_scaling", base=0)
    with pytest.raises(UserError, match="warm-up of `9 step` is longer than the run"):
        run_of(recipe(example("linear_scaling", warmup="9 step")))
    with pytest.raises(RecipeError, match="both set the learning rate scale"):
        run_of(recipe(example("linear_scaling"), example("adascale")))
