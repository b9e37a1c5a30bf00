"""Tasks on two ranks: what each task computes over all items is what one process computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distributed.jobs import state
from distributed.ranks import together
from distributed.tasks_on_ranks import COMPARING, LAYOUTS, TASKS, made, validated
from scrimp.training import train


def test_ranks_share_the_validation_set_and_its_scores_stay() -> None:
    found = together(2, "tasks_on_ranks", "everything")
    for task in TASKS:
        alone, items = validated(task)
        assert items == 7
        for layout in LAYOUTS:
            scores, part = found[f"{task}/{layout}"]
            assert scores == pytest.approx(alone, rel=1e-11), (task, layout)
            # Correlations look at all items at once.
            assert part == (7 if task == "regress" else 3), (task, layout)


def test_losses_that_compare_all_items_of_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRIMP_TEST_FILES", str(tmp_path))
    alone = {task: train(made(task), save=False, force=True) for task in COMPARING}
    for task, result in alone.items():
        torch.save(state(result.run), tmp_path / f"{task}.pt")
    for name, (gap, scores) in together(2, "tasks_on_ranks", "compared").items():
        assert gap < 1e-11, name
        assert scores == pytest.approx(alone[name.partition("/")[0]].validation, rel=1e-11), name
