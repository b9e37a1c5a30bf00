"""Whatever is written into a recipe, it is read or refused with a `UserError`; what is read, reads back the same."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from scrimp.errors import UserError
from scrimp.reading import Loader
from scrimp.recipe import Recipe
from scrimp.registry import modules, technique_class
from scrimp.rules import LEAST
from scrimp.training import train
from tiny import recipe

ODD: list[Any] = [
    None, [], {}, "", "x", -1, 0, 1.5, math.inf, True, 10**30, "1 step", "1e999 step", b"x", (1, 2), [[]], {1: 2},
]  # fmt: skip
SECTIONS = ["model", "data", "validate", "checkpoint", "log", "stop", "sample"]


def rules(name: str) -> dict[str, Any]:
    """What a technique needs beside it."""
    return {} if "update rule" in technique_class(name).card.sets else {"sgd": {}}


def places() -> list[list[str]]:
    """Path of every key that a recipe may hold."""
    whole = Recipe.read({"techniques": {"sgd": {}}})
    found = [[f.name] for f in dataclasses.fields(Recipe)]
    found += [[s, f.name] for s in SECTIONS for f in dataclasses.fields(getattr(whole, s))]
    found += [["groups", "*"], ["groups", "*", "lr"], ["techniques", "nothing"]]
    for name in sorted(modules()):
        found.append(["techniques", name])
        found += [["techniques", name, f.name] for f in dataclasses.fields(technique_class(name))]
    return found


@pytest.mark.parametrize("place", places(), ids=".".join)
def test_any_value_at_any_place(place: list[str]) -> None:
    for value in ODD:
        raw: Any = value
        for key in reversed(place):
            raw = {key: raw}
        if place[0] != "techniques":
            raw["techniques"] = {"sgd": {}}
        elif len(place) > 1 and place[1] in modules():
            raw["techniques"] |= rules(place[1])
        read(raw)


def read(raw: dict[str, Any]) -> None:
    """Read it, or be told why not; what was read comes back from its own YAML."""
    try:
        found = Recipe.read(raw)
    except UserError:
        return
    assert Recipe.read(yaml.load(found.yaml(), Loader=Loader)) == found, raw


KEYS = st.sampled_from(["model", "techniques", "adamw", "lr", "batch", "duration", "data", "<<", "groups", "*", ""])
WORDS = st.sampled_from(["on", "gpt-4m", "1 step"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200)
@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_any_mapping(raw: dict[str, Any]) -> None:
    read(raw)


OVERRIDES = [
    "batch=2", "adamw=off", "sgd.lr=1", "x", "=", "=1", "model.width=", "a.b.c=1", "clip=on", "techniques=3",
    "techniques.sgd=off", "model=", "data.x.y=[", "lora.rank=off",
]  # fmt: skip


@settings(max_examples=200)
@given(st.lists(st.sampled_from(OVERRIDES)))
def test_any_overrides(words: list[str]) -> None:
    try:
        Recipe.read({"techniques": {"adamw": {}}}, words)
    except UserError:
        return


@settings(max_examples=300)
@given(st.text("ab:-? \n\t[]{},&*!<'\"|>%@`#0.e", max_size=40) | st.binary(max_size=40))
def test_any_file(tmp_path_factory: pytest.TempPathFactory, text: str | bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(UserError):
        Recipe.load(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"\xff\xfe", "not valid YAML"),
        (b"? [a]\n: b", "the key `['a']` is no plain word"),
        (b"name: 2001-13-45", "month must be in 1..12"),
        (b"[" * 3000, "not valid YAML"),
        (b"batch: 1" + b"0" * 5000, "not valid YAML"),
    ],
)
def test_odd_files(tmp_path: Path, text: bytes, words: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(text)
    with pytest.raises(UserError) as error:
        Recipe.load(path)
    assert words in str(error.value)


def test_merged_mappings_are_read(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("validate: &often {every: 1 step}\ncheckpoint:\n  <<: *often\n  keep: 3\ntechniques: {adamw: {}}\n")
    found = Recipe.load(path)
    assert (found.checkpoint.every, found.checkpoint.keep) == ("1 step", 3)


@pytest.mark.parametrize("place", LEAST)
def test_numbers_below_their_least_are_told(place: str) -> None:
    section, _, name = place.rpartition(".")
    value = LEAST[place] - 1
    with pytest.raises(UserError) as error:
        Recipe.read({"techniques": {"sgd": {}}, **({section: {name: value}} if section else {name: value})})
    assert f"{place}: must be at least {LEAST[place]}, not {value}" in str(error.value)


def test_a_seed_that_torch_cannot_take_is_told() -> None:
    with pytest.raises(UserError, match=r"seed: must be below 2\*\*63"):
        recipe(seed=2**63)


@pytest.mark.parametrize("never", [{"every": "1 step", "batches": 0}, {"every": 0}, {"every": "0 tok"}], ids=str)
def test_never_is_no_validation_at_the_end_either(never: dict[str, Any]) -> None:
    result = train(recipe(duration="2 step", validate=never), save=False)
    assert (result.run.clock.step, result.validation) == (2, {})


def test_a_resolved_recipe_says_every_setting() -> None:
    for name in modules():
        rule = {} if "update rule" in technique_class(name).card.sets else {"sgd": {}}
        text = Recipe.read({"techniques": {name: {}} | rule}).yaml()
        written = yaml.load(text, Loader=Loader)["techniques"][name]
        assert set(written) == {f.name for f in dataclasses.fields(technique_class(name))}
    again = Recipe.read(yaml.load(Recipe.read({"techniques": {"adamw": {}}}).yaml(), Loader=Loader))
    assert again == Recipe.read({"techniques": {"adamw": {}}})
