"""Every technique on every task: it trains, or says why not. A new task joins by an entry in `tiny_tasks.TINY`."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scrimp.registry import BUILT_IN, modules
from tiny_tasks import TINY, entries, tried

NAMES = [name for name in sorted(modules()) if name != "compile"]
"""Compiling takes long on each task; `benchmarks/tasks_table.py` does it."""


def test_every_task_has_tiny_data() -> None:
    assert {TINY[entry].name or entry for entry in entries()} == set(BUILT_IN["tasks"])


@pytest.mark.parametrize("entry", entries())
def test_each_technique_trains_or_says_why_not(entry: str) -> None:
    found = {name: tried(entry, name) for name in NAMES}
    assert not {name: seen["reason"] for name, seen in found.items() if seen["verdict"] == "fails"}
    refused = {name: seen["reason"] for name, seen in found.items() if seen["verdict"] == "refused"}
    assert all(f"techniques.{name}" in reason for name, reason in refused.items()), refused


def test_what_is_raised_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: a data set that does not hold what it says is no refusal."""
    broken = replace(TINY["causal-lm"], items=lambda r, n: {"words": r.integers(0, 9, (n, 17))}, name="causal-lm")
    monkeypatch.setitem(TINY, "broken", broken)
    assert tried("broken") == {"verdict": "fails", "reason": "KeyError: 'tokens'"}
