"""The public names of the library, and the hints for names that are nearly right."""

from __future__ import annotations

import pytest

import scrimp
from scrimp.errors import did_you_mean
from scrimp.technique import Technique


def test_dir_lists_the_public_names() -> None:
    names = dir(scrimp)
    assert {"Recipe", "train", "apply", "UserError", "LoRA", "AdamW"} <= set(names)
    assert all(getattr(scrimp, name) for name in names)
    assert issubclass(scrimp.LoRA, Technique)


@pytest.mark.parametrize(
    ("name", "meant"), [("Lora", "LoRA"), ("lora", "LoRA"), ("Adamw", "AdamW"), ("recpie", "Recipe")]
)
def test_a_name_that_is_nearly_right_is_named(name: str, meant: str) -> None:
    with pytest.raises(AttributeError, match=rf"module 'scrimp' has no attribute '{name}'. Did you mean.*{meant}"):
        getattr(scrimp, name)


def test_abbreviations_and_full_words_find_each_other() -> None:
    settings = ["lr", "betas", "eps", "weight_decay", "params"]
    assert did_you_mean("learning_rate", settings) == "Did you mean lr?"
    assert did_you_mean("wd", settings).startswith("Did you mean weight_decay")
    assert did_you_mean("LR", settings) == "Did you mean lr?"
    assert did_you_mean("x", ["a", "b"]) == "Known: a, b."
