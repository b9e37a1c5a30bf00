"""Ranks that share tokens: resumed elsewhere, with padding, compiled, and planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distributed.context_on_ranks import KINDS, MESH, counted, long, padded, shared
from distributed.jobs import apart, made, state
from distributed.ranks import together
from scrimp.planning import plan
from scrimp.training import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("context")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    """What two ranks did."""
    torch.save(state(train(padded(), save=False).run), folder / "padded.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCRIMP_TEST_FILES", str(folder))
        return together(2, "context_on_ranks", "everything")


def test_a_checkpoint_is_resumed_by_one_process(folder: Path, found: dict[str, Any]) -> None:
    assert found
    alone = state(train(made(), save=False).run)
    place = folder / "run/checkpoints/step-000000002"
    result = train(resume=place, mesh={"data": 1}, data=made().data.open(), force=True)
    assert apart(state(result.run), alone) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["padded", "compiled"])
def test_texts_that_are_filled_up_give_the_numbers_of_one_process(found: dict[str, Any], how: str, kind: str) -> None:
    assert found[how][kind] < 1e-11


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_planned(found: dict[str, Any], kind: str) -> None:
    planned = plan(long(shared(kind), mesh=MESH), "here", ranks=2).live
    assert planned == pytest.approx(found["live"][kind], rel=0.03)
    assert planned < 0.8 * counted(long())
