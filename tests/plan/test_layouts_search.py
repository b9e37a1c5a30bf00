"""Layouts that a search proposes: they fit, are sorted, and are lines of a recipe."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import yaml

from scrimp.layouts import Found, as_json, factors, search, text
from scrimp.machines.machine import Machine
from scrimp.planning import plan
from scrimp.recipe import Recipe
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
