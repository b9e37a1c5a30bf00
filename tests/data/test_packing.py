"""Conversations that are too long are cut or left out, and the others fill windows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scrimp.data.packing import packed, shortened, together


@pytest.mark.parametrize(("policy", "kept"), [("end", 2), ("start", 2), ("drop", 1)])
def test_what_is_too_long(policy: str, kept: int) -> None:
    spans, learn = np.array([[0, 10], [10, 14], [14, 30]]), np.zeros(30, dtype=np.uint8)
    learn[[8, 9, 12, 13, 16, 17, 29]] = 1
    found, long, silent = shortened(spans, learn, 7, policy)
    assert long == 2
    assert found.tolist() == {
        "end": [[10, 14], [14, 22]], "start": [[2, 10], [10, 14], [22, 30]], "drop": [[10, 14]],
    }[policy]  # fmt: skip
    assert silent == {"end": 1, "start": 0, "drop": 0}[policy]
    assert len(found) >= kept


@given(st.lists(st.integers(1, 20), max_size=60))
def test_windows_hold_each_conversation_once_and_never_too_many(lengths: list[int]) -> None:
    windows = together(np.array(lengths, dtype=np.int64), 20)
    assert sorted(i for window in windows for i in window) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in window) for window in windows]
    assert all(0 < total <= 20 for total in sums)
    assert sum(total <= 10 for total in sums) <= 1, "two half-empty windows would have been one"


def test_windows_by_hand() -> None:
    tokens, learn = np.arange(100, 112, dtype=np.uint16), np.array([0, 0, 1, 1] * 3, dtype=np.uint8)
    made = packed(tokens, learn, np.array([[0, 4], [4, 8], [8, 11]]), 7, True, 9)
    assert made.windows == [[0, 1], [2]]
    items = made.read(np.array([0, 1]))
    assert items["tokens"].tolist() == [[100, 101, 102, 104, 105, 106, 9], [108, 109, 9, 9, 9, 9, 9]]
    assert items["targets"].tolist() == [[-100, 102, 103, -100, 106, 107, -100], [-100, 110, *[-100] * 5]]
    assert items["documents"].tolist() == [[0, 0, 0, 1, 1, 1, 2], [0, 0, 1, 1, 1, 1, 1]]
    with pytest.raises(IndexError, match="0 to 1"):
        made.read(np.array([2]))
