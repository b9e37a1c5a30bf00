"""Several ranks against one process: the same numbers, whatever the layout."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from distributed.jobs import LAYOUTS, apart, made, measured, mesh, short, state
from distributed.ranks import together
from scrimp.planning import plan
from scrimp.registry import catalogue, modules
from scrimp.training import train
from tiny import example

NUMBERS_DEPEND_ON_RANKS = {"act", "int8", "fp8", "lion"}
"""Those that round by the largest value of a rank's own samples, and the sign of gradients that are zero but for
rounding."""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SCRIMP_TEST_FILES", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("ranks", [2, 4])
def test_each_layout_gives_the_numbers_of_one_process(files: Path, ranks: int) -> None:
    alone = train(made(example("clip")), save=False)
    torch.save(state(alone.run), files / "alone.pt")
    found = together(ranks, "jobs", "parity")
    assert set(found) == {name for name in LAYOUTS if mesh(name, ranks) is not None}
    for name, (difference, loss) in found.items():
        assert difference < 1e-12, name
        assert loss == pytest.approx(alone.validation["loss"], rel=1e-12), name


def test_every_technique_goes_with_ranks_or_says_why_not(files: Path) -> None:
    names = [n for n in sorted(modules()) if not catalogue()[n].card.axes and n != "compile"]
    (files / "catalogue").mkdir()
    for name in names:
        torch.save(state(train(short(example(name)), save=False, force=True).run), files / f"catalogue/{name}.pt")
    found = together(2, "jobs", "catalogue")
    failed = {key: told for key, told in found.items() if isinstance(told, str) and not told.startswith("refused: ")}
    assert not failed
    wrong = {key: told for key, told in found.items() if isinstance(told, float) and not told < 1e-11}
    assert {key.split("/")[1] for key in wrong} <= NUMBERS_DEPEND_ON_RANKS, wrong
    alone = {name for name in names if isinstance(found[f"replicate/{name}"], str)}
    assert alone == {n for n in names if catalogue()[n].card.alone} | {"flip"}, alone
    whole = {name for name in names if isinstance(found[f"zero, stage 3/{name}"], str)} - alone
    assert whole == {n for n in names if catalogue()[n].card.whole} - alone, whole


@pytest.mark.parametrize("ranks", [2, 4])
def test_memory_of_a_rank_is_planned(files: Path, ranks: int) -> None:
    for name, live in together(ranks, "jobs", "live").items():
        planned = plan(measured(name), "here", ranks=ranks).live
        assert planned == pytest.approx(live, rel=0.03), name


def test_a_checkpoint_of_four_ranks_is_resumed_by_two_and_by_one(files: Path) -> None:
    alone = train(made(), save=False)
    torch.save(state(alone.run), files / "alone.pt")
    run = Path(together(4, "jobs", "saved"))
    for copy in ("copy-2", "copy-1"):
        shutil.copytree(run, files / copy)
    assert together(2, "jobs", "resumed") < 1e-12
    result = train(resume=files / "copy-1/checkpoints/step-000000002", data=made().data.open(), force=True)
    assert apart(state(result.run), state(alone.run)) < 1e-12
    assert len(os.listdir(run / "checkpoints/step-000000002")) > 3, "ranks write files of their own"
