"""Layouts that a search proposes: they fit, are sorted, and are lines of a recipe."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
import yaml

from scrimp.layouts import Found, as_json, planned, search, text
from scrimp.machines.machine import Machine
from scrimp.meshes import ORDERS, Layout, candidates, factors
from scrimp.planning import plan
from scrimp.recipe import Mesh, Recipe
from scrimp.registry import technique_class
from scrimp.timetable import actions, idle, timed
from tiny import TinyData, example, recipe

DATA = TinyData(context=16)
MODEL = {"layers": 4, "width": 128, "heads": 2}
GPU = Machine(name="small", device="cpu", memory=1 << 34, flops={"float32": 1e11}, bandwidth=1e10, link=1e9, node=4)


@pytest.fixture(scope="module")
def made() -> Recipe:
    return recipe(example("adamw"), model=MODEL, data=DATA, batch=8)


@pytest.fixture(scope="module")
def limit(made: Recipe) -> int:
    """Less than plain replicas need."""
    return plan(made, GPU, DATA.open(), ranks=4).memory - 2_000_000


@pytest.fixture(scope="module")
def found(made: Recipe, limit: int) -> Found:
    return search(made, replace(GPU, memory=limit), 4, DATA.open())


def test_a_layout_fits_where_replicas_do_not(found: Found, limit: int) -> None:
    assert found.options and all(o.memory <= limit for o in found.options)
    assert all(t.name != "replicate" for o in found.options for t in o.layout.techniques if o.layout.mesh.data == 4)


def test_options_are_sorted_by_time(found: Found) -> None:
    times = [o.slowest.seconds for o in found.options]
    assert times == sorted(times)
    assert all(sum(o.shares().values()) == pytest.approx(1) for o in found.options)


def test_lines_read_back_as_a_recipe(found: Found) -> None:
    for option in found.options:
        raw = yaml.safe_load(option.layout.lines())
        raw["techniques"] = {"adamw": {"lr": 1e-3}} | raw["techniques"]
        again = Recipe.read({"model": MODEL, "batch": 8, "data": "text", **raw})
        assert set(option.layout.techniques) <= set(again.techniques)
    assert len(json.loads(json.dumps(as_json(found)))["options"]) == len(found.options)


def test_an_impossible_limit_says_what_is_missing(made: Recipe) -> None:
    none = search(made, replace(GPU, memory=1000), 2, DATA.open())
    assert not none.options and "The closest lacks" in text(none)
    assert len(none.large) <= 2, "those that need least were planned, and no more"


def test_a_single_rank_has_nothing_to_share(made: Recipe) -> None:
    alone = search(made, GPU, 1, DATA.open())
    assert [o.layout.techniques for o in alone.options] == [()] and "mesh" not in text(alone)


def test_meshes_are_all_factorizations() -> None:
    assert sorted(factors(4, 2)) == [(1, 4), (2, 2), (4, 1)]
    assert len(list(factors(4096, 4))) == 455


def test_groups_between_machines_send_through_their_adapters() -> None:
    on = replace(GPU, link=100.0, network=10.0)
    assert on.speed(4, 1) == 100.0
    assert on.speed(8, 1) == 40.0 and on.speed(2, 4) == 10.0
    assert on.speed(8, 1, alone=True) == 10.0


@pytest.mark.parametrize("order", ORDERS)
def test_what_an_order_idles_is_that_of_its_timetable(order: str) -> None:
    each, less = ORDERS[order]
    for ranks, parts in ((2, 4), (4, 16)):
        wanted = (ranks - 1) / (less * parts + ranks - 1)
        assert idle(timed(actions(order, ranks, parts, each))) == pytest.approx(wanted)


def proposed(made: Recipe, ranks: int) -> list[Layout]:
    return [layout for layout, _ in candidates(made, GPU, None, ranks, Counter())]  # type: ignore[arg-type]


def test_all_orders_of_a_pipeline_are_proposed(made: Recipe) -> None:
    found = {t.order for layout in proposed(made, 2) for t in layout.techniques if t.name == "pipeline"}  # type: ignore[attr-defined]
    assert found == {"1f1b", "interleaved", "zero_bubble", "zbv"}


def test_orders_that_split_a_backward_pass_go_with_no_head_that_does_not(made: Recipe) -> None:
    layouts = proposed(replace(made, techniques=(*made.techniques, example("fused_loss"))), 2)
    assert {t.order for layout in layouts for t in layout.techniques if t.name == "pipeline"} == {"1f1b", "interleaved"}  # type: ignore[attr-defined]


def test_settings_of_a_recipe_stay(made: Recipe) -> None:
    own = [technique_class("zero")(bucket=7.0), technique_class("pipeline")(order="zbv", split=(2, 2)),
           technique_class("tensor")(vocabulary=False)]  # fmt: skip
    layouts = proposed(replace(made, techniques=(*made.techniques, *own)), 4)
    chosen = [t for layout in layouts for t in layout.techniques]
    assert {t.bucket for t in chosen if t.name == "zero"} == {7.0}  # type: ignore[attr-defined]
    assert {(t.order, t.split) for t in chosen if t.name == "pipeline"} == {("zbv", ())}  # type: ignore[attr-defined]
    assert not any(t.vocabulary for t in chosen if t.name == "tensor")  # type: ignore[attr-defined]
    assert any("bucket: 7.0" in layout.lines() and "vocabulary: false" in layout.lines() for layout in layouts)


@pytest.mark.parametrize("order", ["1f1b", "zbv"])
def test_many_micro_batches_are_told_from_few(made: Recipe, order: str) -> None:
    layout = Layout(Mesh(pipeline=2), (technique_class("pipeline")(order=order, micro_batches=16),))
    large = replace(made, batch=32)
    quick = planned(layout, large, GPU, 2, DATA.open())
    for place, told in enumerate(quick.plans):
        whole = plan(layout.added(large), GPU, DATA.open(), ranks=2, rank=place)
        for name, slack in {"seconds": 1e-6, "sending": 1e-6, "waiting": 1e-6, "tokens": 0.0, "steps": 0.0}.items():
            assert getattr(told.stages[0], name) == pytest.approx(getattr(whole.stages[0], name), rel=slack), name
        assert told.live == pytest.approx(whole.live, rel=0.01)
        assert told.recipe == whole.recipe
