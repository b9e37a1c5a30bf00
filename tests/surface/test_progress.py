"""What is printed while a recipe is trained."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scrimp.progress import Progress
from scrimp.training import train
from tiny import recipe


@pytest.mark.parametrize(
    ("settings", "words"), [({}, "finished: held-out loss "), ({"validate": {"batches": 0}}, "finished, in")]
)
def test_the_last_line_says_where_the_run_is(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    shown = io.StringIO()
    long = tmp_path / ("deep" * 30)
    made = recipe(out=str(long), name="here[1]", duration="2 step", sample={"tokens": 0}, **settings)
    with Progress(shown) as view:
        train(made, observe=view)
    last = shown.getvalue().splitlines()[-1]
    assert last.startswith(words)
    assert last.endswith(f", in {long / 'here[1]'}")


def test_a_run_without_a_folder_ends_without_one() -> None:
    shown = io.StringIO()
    with Progress(shown) as view:
        train(recipe(duration="1 step", sample={"tokens": 0}), observe=view, save=False)
    assert ", in " not in shown.getvalue().splitlines()[-1]


def test_what_techniques_found_out_is_said_at_the_end() -> None:
    shown = io.StringIO()
    run = SimpleNamespace(findings={"noise_scale": "noise_scale recommends a batch of about 50."})
    Progress(shown)("end", {"reason": "finished", "text": "", "run": run})
    assert shown.getvalue().splitlines() == ["finished", "noise_scale recommends a batch of about 50."]
