"""Denoising: gaps of the right lengths, at places all alike, from which the text comes back."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from scrimp.errors import UserError
from scrimp.tasks.denoise import Denoise, GapsTask, placed, span_lengths
from tiny import Letters, recipe, run_of

WINDOW = np.arange(200, 264)
MASK = 32


@dataclass
class Held:
    """Data of which only the tokenizer matters."""

    tokenizer: Any


def task(**settings: Any) -> GapsTask:
    return Denoise(**settings).prepared(Held(Letters()))


@pytest.mark.parametrize(("share", "budget"), [(0.3, 19), (0.15, 10), (0.001, 1)])
def test_lengths_sum_to_the_share(share: float, budget: int) -> None:
    for seed in range(50):
        assert sum(span_lengths(64, share, 3.0, np.random.default_rng(seed))) == budget


def test_lengths_are_those_of_poisson() -> None:
    chance = np.random.default_rng(0)
    drawn = [n for _ in range(200) for n in span_lengths(1000, 0.3, 3.0, chance)[:-1]]  # the last one is shortened
    counts = Counter(drawn)
    assert abs(np.mean(drawn) - 3.0) < 0.05
    assert abs(counts[0] / len(drawn) - np.exp(-3)) < 0.005
    assert abs(counts[3] / len(drawn) - np.exp(-3) * 27 / 6) < 0.01
    assert 0 not in span_lengths(1000, 0.3, 3.0, chance, least=1)


def test_too_many_spans_become_one() -> None:
    assert all(len(span_lengths(10, 0.8, 1.0, np.random.default_rng(s))) <= 3 for s in range(50))
    lengths = span_lengths(100, 0.5, 1.0, np.random.default_rng(0), least=1, most=4)
    assert len(lengths) == 4 and sum(lengths) == 50


def test_places_are_all_alike_and_spans_never_touch() -> None:
    # Of four tokens two stay, so that two spans of one lie in two of three gaps.
    chance = np.random.default_rng(0)
    found = Counter(tuple(placed(4, [1, 1], chance)) for _ in range(3000))
    assert set(found) == {((0, 1), (2, 3)), ((0, 1), (3, 4)), ((1, 2), (3, 4))}
    assert all(abs(n - 1000) < 100 for n in found.values())


def refilled(read: np.ndarray, spans: dict[int, list[list[int]]]) -> list[int]:
    out: list[int] = []
    for token in read.tolist():
        out += spans[token].pop(0) if token in spans else [token]
    return out


def test_bart_reads_one_mask_a_span_and_writes_everything() -> None:
    made = task()
    for sample in range(30):
        read, written, cut = made.pair(WINDOW, sample)
        assert written.tolist() == WINDOW.tolist()
        kept = [t for t in read.tolist() if t != MASK]
        gone = [t for t in WINDOW.tolist() if t not in kept]
        assert kept == [t for t in WINDOW.tolist() if t in kept] and len(gone) == 19
        assert WINDOW[cut].tolist() == gone
        runs = 1 + sum(b != a + 1 for a, b in pairwise(gone))
        lengths = span_lengths(64, 0.3, 3.0, np.random.default_rng([0xDE01, sample]))
        assert list(read).count(MASK) == len(lengths)
        # Each run of lost tokens is one span, since spans never touch.
        assert runs == sum(n > 0 for n in lengths)
        places = [i for i, t in enumerate(read.tolist()) if t == MASK]
        assert all(b > a + 1 for a, b in pairwise(places))


def test_t5_writes_each_mark_with_its_span_and_the_end() -> None:
    made = task(style="t5", share=0.15)
    for sample in range(30):
        read, written, cut = made.pair(WINDOW, sample)
        assert written[-1] == 0 and len(read) <= 64 and len(cut) == len(written)
        assert set(written[cut].tolist()) == set(WINDOW.tolist()) - set(read.tolist())
        spans: dict[int, list[list[int]]] = {}
        for token in written[:-1].tolist():
            if token in made.marks:
                spans[token] = [[]]
                mark = token
            else:
                spans[mark][0].append(token)
        assert list(spans) == list(made.marks[: len(spans)]) and all(found[0] for found in spans.values())
        assert refilled(read, spans) == WINDOW.tolist()


def test_draws_are_a_function_of_the_sample() -> None:
    made, windows = task(), np.arange(4 * 33).reshape(4, 33)
    whole = made.batch({"tokens": windows}, np.array([7, 8, 9, 10]))
    part = made.batch({"tokens": windows[2:3]}, np.array([9]))
    length = int(part["attended"].sum())
    assert part["tokens"][0, :length].equal(whole["tokens"][2, :length])
    assert int(whole["attended"][2].sum()) == length
    other = made.batch({"tokens": windows[2:3]}, np.array([5]))
    assert other["tokens"].tolist() != part["tokens"].tolist()


def test_the_decoder_sees_what_was_written_before() -> None:
    made = task()
    batch = made.batch({"tokens": np.arange(1, 34)[None]}, np.array([3]))
    assert batch["decoder_tokens"][0].tolist() == [0, *range(1, 32)]
    assert batch["targets"][0].tolist() == list(range(1, 33))
    assert int(made.count(batch)) == 32 and int(batch["gaps"].sum()) == 10
    assert batch["tokens"].shape[1] % 8 == 0


def test_a_mask_is_the_tokenizers_own_or_one_more_id() -> None:
    class Found(Letters):
        class inner:  # noqa: N801
            @staticmethod
            def token_to_id(name: str) -> int | None:
                return 7 if name == "<mask>" else None

    own, added = Denoise(), Denoise()
    assert own.prepared(Held(Found())).marks == (7,) and own.adds(Held(Found())) == 0
    assert added.prepared(Held(Letters())).marks == (MASK,) and added.adds(Held(Letters())) == 1
    t5 = Denoise(style="t5")
    assert t5.prepared(Held(Letters())).marks == tuple(range(32, 132)) and t5.adds(Held(Letters())) == 100


def test_a_model_gets_the_ids_that_the_task_adds() -> None:
    model = {"name": "encoder_decoder", "layers": 1, "width": 16, "heads": 2}
    assert run_of(recipe(model=model, task="denoise")).model.get_parameter("embed.weight").shape[0] == 33
    with pytest.raises(UserError, match="the data's vocab is 33, the model's 32"):
        run_of(recipe(model=model | {"vocab": 32}, task="denoise"))


def test_a_model_learns_to_fill_gaps() -> None:
    """One window over and over: what stands in its gaps is soon known, also without dropout."""
    model = {"name": "encoder_decoder", "layers": 1, "width": 16, "heads": 2, "dropout": 0.1}
    run = run_of(recipe(model=model, task="denoise"))
    batch = run.batch(0)
    optimizer = torch.optim.Adam(run.model.parameters(), 1e-2)
    before = run.task.evaluate(run.model.eval(), [batch])
    for _ in range(60):
        optimizer.zero_grad()
        (run.task.loss(run.model.train(), batch) / run.task.count(batch)).backward()
        optimizer.step()
    after = run.task.evaluate(run.model.eval(), [batch])
    assert after["loss"] < 0.5 * before["loss"] and after["accuracy"] > before["accuracy"] + 0.3
    assert after["gap_accuracy"] > before["gap_accuracy"] + 0.2


@pytest.mark.parametrize("settings", [{"share": 0.0}, {"share": 0.9}, {"span": 0.5}], ids=str)
def test_bad_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        Denoise(**settings)  # type: ignore[arg-type]
