"""Ranks agree on what decides how they go on, whatever one of them finds."""

from __future__ import annotations

from pathlib import Path

import pytest

from distributed.ranks import together


def test_ranks_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRIMP_TEST_FILES", str(tmp_path))
    found = together(2, "agreed", "agreed")
    assert found["any"] == [[True, False]] * 2
    assert found["numbers"] == [[0.5, 1.5]] * 2
    assert found["first"] == [True] * 2
    said = "model-00001.safetensors is truncated or altered (its checksum differs)."
    assert found["damaged"] == [[said, 1]] * 2, "each rank reads one of two files, and both know"
    assert found["norm"] == [5.0] * 2
    assert [sent for sent, _ in found["parts"]] == [4, 4], "with the first and the last of four parts, in two steps"
    assert all(gap < 1e-12 for _, gap in found["parts"])
    assert found["validation"] == [0.0] * 2
