"""Several ranks against one process: the same numbers, whatever the layout."""

from __future__ import annotations

import os
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch

from distributed.jobs import LAYOUTS, RULES, WAYS, made, measured, mesh, resumed, state
from distributed.ranks import together
from scrimp.errors import UserError
from scrimp.planning import plan
from scrimp.registry import technique_class
from scrimp.training import train
from tiny import Letters, example, home


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


def test_tokens_are_not_shared_between_stages_that_a_rank_has_several_of() -> None:
    stages, axes = technique_class("pipeline")(order="interleaved"), {"pipeline": 2, "tensor": 2, "data": 1}
    shared = made(stages, technique_class("tensor")(), mesh=axes)
    with pytest.raises(UserError, match=r"tensor\.sequence.*2 stages.*Set it to false"):
        plan(shared, "here", ranks=4)


@pytest.mark.parametrize(("place", "tables"), [(0, 1), (1, 0), (2, 1)])
def test_stages_share_the_embedding_and_the_head_that_they_have(place: int, tables: int) -> None:
    """Of an untied model the first of three stages has no head, the last no embedding, the middle one neither."""
    model = home()["model"] | {"layers": 3, "tied": False}
    weights = []
    for shared in (True, False):
        cut = (technique_class("pipeline")(micro_batches=4), technique_class("tensor")(vocabulary=shared))
        layout = made(*cut, mesh={"pipeline": 3, "tensor": 2, "data": 1}, model=model)
        weights.append(plan(layout, "here", ranks=6, rank=2 * place).worst.peak.kinds["weights"])
    assert weights[1] - weights[0] == tables * Letters.vocab * model["width"] * 8 // 2


@pytest.mark.parametrize("ranks", [2, 4])
def test_memory_of_a_rank_is_planned(files: Path, ranks: int) -> None:
    for name, live in together(ranks, "jobs", "live").items():
        planned = plan(measured(name), "here", ranks=ranks).live
        assert planned == pytest.approx(live, rel=0.03), name


def test_ranks_share_the_batches_of_a_run_that_one_process_began(files: Path) -> None:
    """Its recipe names no technique for ranks, and a resumed run keeps its recipe."""
    given = {"data": "text", "out": str(files), "name": "plain", "checkpoint": {"every": "2 step", "keep": 9}}
    alone = train(made(technique_class("sgd")(**RULES["sgd"]), **given), data=made().data.open(), force=True)
    torch.save(state(alone.run), files / "sgd.pt")
    shutil.copytree(files / "plain", files / "sgd-plain", ignore=shutil.ignore_patterns("lock"))
    assert together(2, "jobs", "plain_resumed") < 1e-12


def test_a_checkpoint_of_four_ranks_is_resumed_on_other_meshes(files: Path) -> None:
    for rule, settings in RULES.items():
        torch.save(state(train(made(technique_class(rule)(**settings)), save=False).run), files / f"{rule}.pt")
    together(4, "jobs", "saved")
    for rule, way in product(RULES, WAYS):
        shutil.copytree(files / rule, files / f"{rule}-{way}")
    found = together(2, "jobs", "resumed_by_two") | {f"{rule}, alone": resumed(rule, "alone") for rule in RULES}
    assert len(found) == len(RULES) * len(WAYS)
    # AdamW divides gradients that are zero but for rounding by little more than its epsilon.
    assert all(gap < (1e-12 if label.startswith("sgd") else 1e-11) for label, gap in found.items()), found
    assert len(os.listdir(files / "sgd/checkpoints/step-000000002")) > 3, "ranks write files of their own"
