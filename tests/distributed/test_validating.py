"""Two ranks that share the validation set say what one process says."""

from __future__ import annotations

import pytest

from distributed.ranks import together
from distributed.validating import LAYOUTS, TASKS, validated


def test_ranks_share_the_validation_set_and_its_scores_stay() -> None:
    found = together(2, "validating", "everything")
    for task in TASKS:
        alone, items = validated(task)
        assert items == 7
        for layout in LAYOUTS:
            scores, part = found[f"{task}/{layout}"]
            assert scores == pytest.approx(alone, rel=1e-11), (task, layout)
            # Correlations look at all items at once.
            assert part == (7 if task == "regress" else 3), (task, layout)
