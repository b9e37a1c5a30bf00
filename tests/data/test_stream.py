"""Windows of the stream, and the order in which they are visited."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scrimp.data import Tokens, sample_ids
from scrimp.data.order import permutation


@pytest.fixture
def stream(tmp_path: Path) -> Tokens:
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "t.bin")
    return Tokens(tmp_path / "t.bin", "uint16", 100, 8)


def test_windows_are_inputs_and_targets(stream: Tokens) -> None:
    assert len(stream) == 12
    got = stream.windows(np.array([0, 11, 3]))
    assert got.dtype == np.int64
    assert got.tolist() == [list(range(s, s + 9)) for s in (0, 88, 24)]
    assert stream.windows(np.array([2, 5]), 3).tolist() == [[16, 17, 18, 19], [40, 41, 42, 43]]
    assert stream.window(5, 3).tolist() == [40, 41, 42, 43]
    assert stream.window(5).tolist() == list(range(40, 49))
    assert stream.windows(np.array([], dtype=np.int64)).shape == (0, 9)


@pytest.mark.parametrize(("count", "windows"), [(0, 0), (8, 0), (9, 1), (16, 1), (17, 2)])
def test_a_window_needs_its_last_target(count: int, windows: int) -> None:
    assert len(Tokens(Path("none"), "uint16", count, 8)) == windows


def test_what_is_not_there_is_refused(stream: Tokens) -> None:
    for i in (-1, 12):
        with pytest.raises(IndexError, match="0 to 11"):
            stream.window(i)
    for length in (0, 9):
        with pytest.raises(ValueError, match="from 1 to 8"):
            stream.window(0, length)


def test_large_vocabularies(tmp_path: Path) -> None:
    np.array([2**32 - 1, 70_000], dtype=np.uint32).tofile(tmp_path / "t.bin")
    assert Tokens(tmp_path / "t.bin", "uint32", 2, 1).window(0).tolist() == [2**32 - 1, 70_000]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_reads_the_same(stream: Tokens) -> None:
    expected = stream.window(4).tolist()
    child = os.fork()
    if child == 0:
        os._exit(0 if stream.window(4).tolist() == expected else 1)
    assert os.waitpid(child, 0)[1] == 0


@given(st.integers(1, 40), st.integers(0, 5), st.integers(0, 100), st.integers(0, 50))
def test_order_visits_each_item_once_an_epoch(items: int, seed: int, first: int, count: int) -> None:
    index = np.arange(items) * 10
    run = sample_ids(index, seed, 0, first + count)
    assert run[first:].tolist() == sample_ids(index, seed, first, count).tolist()
    assert run.tolist() == (sample_ids(items, seed, 0, first + count) * 10).tolist()
    for epoch in range((first + count) // items):
        assert sorted(run[epoch * items : (epoch + 1) * items]) == index.tolist()


@given(st.permutations(range(12)), st.integers(1, 7))
def test_a_batch_does_not_depend_on_what_was_asked_before(asked: list[int], size: int) -> None:
    straight = sample_ids(10, 3, 0, 12 * size)
    for i in asked:
        assert sample_ids(10, 3, i * size, size).tolist() == straight[i * size : (i + 1) * size].tolist()


def test_seeds_and_epochs_differ() -> None:
    orders = {tuple(permutation(50, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    with pytest.raises(ValueError, match="read-only"):
        permutation(50, 0, 0)[0] = 1


@pytest.mark.parametrize("arguments", [(0, 0, 0, 1), (5, -1, 0, 1), (5, 0, -1, 1), (5, 0, 0, -1)])
def test_orders_that_are_none(arguments: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="no order"):
        sample_ids(*arguments)
