"""Tensor parallelism on two ranks equals one process: weights, states, exports, validation and text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from scrimp import checkpoint
from scrimp.folder import RunFolder
from scrimp.sharding import Cut
from scrimp.training import train
from tensor_ranks import CASES, saved
from tiny import TinyData


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks have left what they found."""
    place = tmp_path_factory.mktemp("ranks")
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = Path(__file__).parents[1] / "tensor_ranks.py"
    done = subprocess.run([*ranks, str(script), str(place)], capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr[-4000:]
    return place


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    """What the first rank found; the second found the same."""
    first, second = (json.loads((folder / f"found-{rank}.json").read_text()) for rank in (0, 1))
    for name in CASES:
        assert {**first[name], "share": 0} == {**second[name], "share": 0}
    return first


@pytest.mark.parametrize("case", CASES)
def test_ranks_train_as_one_process(found: dict[str, Any], case: str) -> None:
    told = found[case]
    assert told["same"] and told["text"], told
    assert told["worst"] < 1e-11 and told["validation"] < 1e-12, told


def test_weights_are_shared(found: dict[str, Any]) -> None:
    assert found["decoder"]["share"] < 0.53
    assert found["whole stream"]["share"] > found["decoder"]["share"], "the table of tokens is whole"


def test_loss_of_a_shared_vocabulary(found: dict[str, Any]) -> None:
    assert max(found["loss"].values()) < 1e-12, found["loss"]


def test_tokens_are_shared_between_layers(found: dict[str, Any]) -> None:
    assert found["lengths"] == {"training": 8, "uneven": 15, "evaluation": 16}


def test_refusals(found: dict[str, Any]) -> None:
    told = found["refused"]
    assert "`blocks.0.attention` has 3 heads, which 2 ranks cannot share evenly" in told["heads"]
    assert "`blocks.0.mlp` has 33 hidden units" in told["hidden"]
    assert "`ssf_scale` changes the whole of `blocks.0.attention.qkv`" in told["scaled"]
    assert "Set `sequence: false`." in told["dropped"]


def test_one_process_resumes_what_ranks_saved(folder: Path, tmp_path: Path) -> None:
    train(saved(tmp_path, together=False), data=TinyData().open(), force=True)
    weights: list[dict[str, torch.Tensor]] = []
    for place, mesh in ((folder / "run/run", {"tensor": 1}), (tmp_path / "run", None)):
        train(resume=place, extend="3 step", mesh=mesh, data=TinyData().open(), force=True)
        weights.append(dict(checkpoint.load(RunFolder.newest(place))[0]["model"]))
    a, b = weights
    assert a.keys() == b.keys()
    worst = max(float((a[n] - b[n]).abs().max() / b[n].abs().max()) for n in a)
    assert worst < 1e-11, worst


@pytest.mark.parametrize("sections", [(4, 2, 2), (3, 5), (1,)])
def test_parts_are_cut_section_by_section(sections: tuple[int, ...]) -> None:
    whole = torch.arange(1.0, sum(sections) + 1)[:, None].expand(-1, 3)
    parts = [Cut(0, sections, 2, place, None).part(whole)[:, 0].tolist() for place in (0, 1)]
    if sections == (4, 2, 2):
        assert parts == [[1, 2, 5, 7], [3, 4, 6, 8]]
    assert len(parts[0]) == len(parts[1])
    assert sorted(n for part in parts for n in part if n) == whole[:, 0].tolist()
    columns = Cut(1, sections, 2, 1, None).part(whole.T)
    assert columns[0].tolist() == parts[1]
