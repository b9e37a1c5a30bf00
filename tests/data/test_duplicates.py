"""Duplicates are left out: exactly equal texts, and nearly equal ones by MinHash."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from scrimp.data.duplicates import PLACES, first_of_its_kind, signature, unique
from scrimp.data.labelled import LabelledData
from scrimp.data.text import TextData


def words(seed: int, count: int) -> list[str]:
    return [f"w{n}" for n in np.random.default_rng(seed).integers(0, 10_000, count)]


def jaccard(one: list[str], two: list[str]) -> float:
    a, b = ({tuple(w[i : i + 5]) for i in range(len(w) - 4)} for w in (one, two))
    return len(a & b) / len(a | b)


@pytest.mark.parametrize("changed", [0, 5, 20, 60, 400])
def test_signatures_agree_in_the_share_that_sets_have_in_common(changed: int) -> None:
    one = words(0, 400)
    two = one[: 400 - changed] + words(1, changed)
    share = float((signature(" ".join(one)) == signature(" ".join(two))).mean())
    true = jaccard(one, two)
    assert abs(share - true) <= 3.5 * (true * (1 - true) / PLACES) ** 0.5 + 1e-9


def test_near_duplicates_are_left_out_and_others_kept() -> None:
    one = words(0, 300)
    texts = [" ".join(one), " ".join([*one[:-3], "x", "y", "z"]), " ".join(words(1, 300)), "short", "short", "brief"]
    left = list[int]()
    kept = list(unique(texts, "near", lambda: left.append(1)))
    assert kept == [texts[0], texts[2], "short", "brief"]
    assert len(left) == 2
    assert list(unique(texts, "exact")) == [texts[0], texts[1], texts[2], "short", "brief"]
    assert list(unique(texts, "keep")) == texts


def test_exact_ones_may_differ_in_space_around_them() -> None:
    new = first_of_its_kind("exact")
    assert [new(text) for text in ("a b", " a b\n", "a  b")] == [True, False, True]


def test_a_corpus_without_copies(tmp_path: Path) -> None:
    for n in range(12):
        (tmp_path / f"{n:02}.txt").write_text(" ".join(words(n % 6, 200)))
    cache = str(tmp_path / "cache")
    whole, once = (
        TextData(source=str(tmp_path / "*.txt"), tokenizer="bytes", context=16, holdout=0.3, duplicates=kind,
                 cache=cache).open() for kind in ("keep", "exact")
    )  # fmt: skip
    assert sum(whole.meta["documents"].values()) == 12
    assert sum(once.meta["documents"].values()) == 6 and once.meta["duplicates"] == 6


def test_trained_rows_that_are_held_out_too_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\n" + "".join(f"text number {n},{n % 2}\n" for n in (1, 2, 3, 3, 4)))
    (tmp_path / "held.csv").write_text("text,label\ntext number 2,0\n")
    data = LabelledData(source=str(tmp_path / "train.csv"), validation=str(tmp_path / "held.csv"), label="label",
                        vocab=300, duplicates="exact", cache=str(tmp_path / "cache")).open()  # fmt: skip
    assert (len(data.train), len(data.validation)) == (3, 1)
