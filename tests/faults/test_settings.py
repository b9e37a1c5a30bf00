"""Settings that are given in Python, and what is told of those that make no sense."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from torch import nn

import scrimp
from scrimp.errors import UserError
from scrimp.registry import technique_class
from scrimp.technique import Card, Technique


@dataclass(frozen=True, kw_only=True)
class Own(Technique):
    """A technique of somebody's own, whose checks trust the types."""

    card = Card(paper="none", section="Optimization")
    share: float = 0.5
    until: str | float = 1

    def __post_init__(self) -> None:
        if self.share > 1:
            raise UserError("share must be at most 1.")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: scrimp.AdamW(lr="1e-3"),
            "techniques.adamw.lr: must be a number, not '1e-3'. Give for example 0.0003.",
        ),
        (lambda: scrimp.AdamW(lr=-1), "techniques.adamw: lr must be at least 0, not -1."),
        (lambda: scrimp.SGD(weight_decay=float("nan")), "techniques.sgd: weight_decay must be at least 0, not nan."),
        (lambda: scrimp.LoRA(rank=0), "techniques.lora: rank must be at least 1, not 0. Drop the technique"),
        (lambda: scrimp.LoRA(rank=2.5), "techniques.lora.rank: must be a whole number, not 2.5."),
        (lambda: scrimp.LoRA(rank=True), "techniques.lora.rank: must be a whole number, not True."),
        (lambda: scrimp.LoRA(targets=["mlp"]), "techniques.lora.targets: must be a text, not ['mlp']."),
        (lambda: scrimp.WarmupCosine(warmup="soon"), "techniques.warmup_cosine.warmup: `soon` is not a duration."),
        (lambda: Own(share="a"), ".share: must be a number, not 'a'."),  # type: ignore[arg-type]
        (lambda: Own(until=None), ".until: must be a duration, not None."),  # type: ignore[arg-type]
        (lambda: Own(share=2), "techniques.test_settings: share must be at most 1."),
    ],
)
def test_settings_of_the_wrong_kind_are_told_in_a_sentence(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        make()
    assert words in str(error.value)


@pytest.mark.parametrize("rule", ["sgd", "adam", "adamw", "lion"])
def test_a_bad_number_says_which_setting_it_is(rule: str) -> None:
    for name in ("lr", "weight_decay"):
        with pytest.raises(UserError, match=rf"^techniques.{rule}: {name} must be at least 0, not -0.5.$"):
            technique_class(rule)(**{name: -0.5})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["lora"], "`lora` is a name, not a technique. Write `scrimp.LoRA()`."),
        (["nothing"], "'nothing' is not a technique. Write for example `scrimp.Clip(norm=1.0)`."),
        ([scrimp.LoRA], "`LoRA` is a class, not a technique. Write `LoRA()`, with its settings in the parentheses."),
        (scrimp.LoRA(), "must be a list of techniques, not a single one. Write `[LoRA(...)]`."),
        ({"lora": {}}, "must be a list of techniques, not {'lora': {}}. Write for example"),
        ("lora", "must be a list of techniques, not 'lora'. Write for example"),
    ],
)
def test_what_is_given_instead_of_techniques(given: Any, words: str) -> None:
    with pytest.raises(UserError) as applied:
        scrimp.apply(nn.Linear(2, 2), given)
    assert str(applied.value).startswith(f"apply: {words}")
    with pytest.raises(UserError) as made:
        scrimp.Recipe(techniques=given)
    assert f"techniques: {words}" in str(made.value)


def test_apply_says_what_it_needs() -> None:
    with pytest.raises(UserError, match="apply: needs an nn.Module to work on"):
        scrimp.apply([scrimp.LoRA()], nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(
        UserError, match=r"`clip` acts in `step`, which your own loop does not have. Use scrimp.train.$"
    ):
        scrimp.apply(nn.Linear(2, 2), [scrimp.Clip()])
    with pytest.raises(UserError, match="Use scrimp.train, or its optimizer class by itself"):
        scrimp.apply(nn.Linear(2, 2), [scrimp.Lion()])
