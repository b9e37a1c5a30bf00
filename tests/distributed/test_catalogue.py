"""Every technique in every layout of two ranks: the numbers of one process, or a refusal before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from distributed.jobs import CROWDS, crowd, layout, short, state
from distributed.ranks import together
from scrimp.arrange import clash
from scrimp.registry import catalogue, modules
from scrimp.techniques.offloading import zero_offload
from scrimp.training import train
from tiny import example

NAMES = [name for name in sorted(modules()) if not catalogue()[name].card.axes and name != "compile"]
ROUNDED = {"act", "fp8", "int8"}
"""Those that round by the largest value of what a rank sees at once: its samples, heads or micro-batch."""
SIGNS = {"lion"}
"""Takes the sign of gradients that are zero but for rounding, as those of biases of keys."""
BUILT: dict[str, set[str]] = {
    "replicate": set(),
    "zero, stage 3": set(),
    "tensor": {"compacter", "expand", "fixup", "fp8", "ia3", "ladder", "prefix", "ssf", "token_drop"},
    "pipeline": {"act", "flip", "mae", "mass", "vpt"},
}
"""Refused for what they make of a model, or for their task: cards do not say so."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what each technique gives in one process."""
    folder = tmp_path_factory.mktemp("catalogue")
    runs = {name: train(short(name), save=False, force=True).run for name in NAMES}
    torch.save({name: state(run) for name, run in runs.items()}, folder / "catalogue.pt")
    return folder


def refused(name: str, chosen: str) -> bool:
    """Whether cards say that a technique does not go with a layout."""
    return bool(catalogue()[name].card.alone) or any(clash(example(name), other) for other in layout(chosen))


@pytest.mark.parametrize("chosen", BUILT)
def test_every_technique_goes_with_ranks_or_says_why_not(
    alone: Path, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCRIMP_TEST_FILES", str(alone))
    found: dict[str, Any] = together(2, "jobs", "catalogue", chosen)
    said = {name: told for name, told in found.items() if isinstance(told, str)}
    failed = {name: told for name, told in said.items() if not told.startswith("refused: ")}
    assert not failed
    assert set(said) == {name for name in NAMES if refused(name, chosen)} | BUILT[chosen]
    wrong = {name: gap for name, gap in found.items() if name not in said and not gap < 1e-11}
    assert set(wrong) <= ROUNDED | SIGNS, wrong


def test_crowds_of_techniques_go_with_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRIMP_TEST_FILES", str(tmp_path))
    with patch.object(zero_offload, "at_home", lambda p: False):
        runs = {name: train(crowd(name), save=False, force=True).run for name in CROWDS}
    torch.save({name: state(run) for name, run in runs.items()}, tmp_path / "crowds.pt")
    found = together(2, "jobs", "crowds")
    assert max(found.values()) < 1e-10, found
