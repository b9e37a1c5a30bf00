"""Pipelines of two ranks against one process: weights, validation, norms, resumed runs. All checks share one spawn."""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scrimp.checkpoint import load
from scrimp.clock import Clock
from scrimp.recipe import Recipe
from scrimp.registry import technique_class
from scrimp.run import build
from scrimp.technique import Technique
from scrimp.training import train
from tiny import example, flat, recipe, run_of, step

STEPS = 3
ORDERS = ("gpipe", "1f1b", "interleaved", "zero_bubble", "zbv")
TWO = {"mesh": {"pipeline": 2, "data": 1}}


def made(*techniques: Technique, **more: Any) -> Recipe:
    settings = {"dtype": "float64", "batch": 8, "duration": f"{STEPS} step", "sample": {"tokens": 3},
                "validate": {"every": f"{STEPS} step", "batches": 1}}  # fmt: skip
    return recipe(*techniques, **(settings | more))


def pipeline(**settings: Any) -> Technique:
    return technique_class("pipeline")(**settings)


def beside() -> dict[str, tuple[Technique, ...]]:
    """What is compared: names -> techniques beside the pipeline."""
    share = technique_class("share")(distinct=1)
    return {"plain": (), "clip": (example("clip"), share), "sam": (example("sam"),),
            "prompt": (example("prompt"),)}  # fmt: skip


def delayed(steps: int) -> dict[str, Tensor]:
    """W(t+1) = W(t) - lr g(t-1), written out."""
    run, late = run_of(made()), None
    for number in range(steps):
        batch = run.batch(number)
        run.set_lr()
        run.backward(batch, run.task.count(batch))
        now = {n: p.grad for n, p in run.model.named_parameters()}
        for n, p in run.model.named_parameters():
            p.grad = None if late is None else late[n]
        run.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.clock.tick(8, 1)
        late = now
    return {n: p.detach().clone() for n, p in run.model.named_parameters()}


def whole(result: Any) -> dict[str, Tensor]:
    """The weights of all ranks; those that several hold must be equal."""
    found: dict[str, Tensor] = {}
    for part in result.run.world.gathered(flat({"model": result.run.state()["model"]})):
        for name, tensor in part.items():
            assert torch.equal(found.setdefault(name, tensor), tensor), f"{name} differs between ranks"
    return {name.removeprefix("model/"): tensor for name, tensor in found.items()}


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference of weights, relative to the largest of each tensor."""
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())[:4]
    return max(float((a[n] - b[n]).abs().max() / a[n].abs().max().clamp_min(1e-30)) for n in a)


def resumed(folder: Path, order: str) -> float:
    """A run that goes on before its last step against one that was not cut."""
    keep = {"every": "1 step", "keep": 9}
    chosen = made(pipeline(order=order), out=str(folder), checkpoint=keep, **TWO)
    whole_run = train(chosen, force=True)
    places = [whole_run.folder / f"checkpoints/step-{number:09d}" for number in (STEPS - 1, STEPS)]
    (before, meta), (after, _) = (load(place) for place in places)
    run = build(chosen, chosen.data.open(), Clock(**meta["clock"]), last=before, world=whole_run.run.world)
    step(run)
    run.close()
    mine = flat(run.state())
    return apart({name: tensor for name, tensor in flat(after).items() if name in mine}, mine)


def ranked(rank: int, folder: str) -> None:
    """What each rank does: every comparison, and what came of it as JSON."""
    torch.set_num_threads(1)
    place = Path(folder)
    torch.distributed.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=2)
    expected = torch.load(place / "expected.pt")
    found: dict[str, Any] = {}
    try:
        for name, techniques in [(order, ()) for order in ORDERS] + list(beside().items())[1:]:
            order = name if name in ORDERS else "1f1b"
            result = train(made(*techniques, pipeline(order=order), **TWO), save=False, force=True)
            want = expected.get(name, expected["plain"])
            found[name] = [apart(want["weights"], whole(result)), result.validation["loss"] - want["loss"],
                           result.text == want["text"]]  # fmt: skip
        result = train(made(pipeline(order="2bw"), **TWO), save=False, force=True)
        found["2bw"] = apart(expected["delayed"], whole(result))
        found["resumed"] = [resumed(place / order, order) for order in ("1f1b", "2bw")]
    except BaseException:
        found["fault"] = traceback.format_exc()
    (place / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks say."""
    folder = tmp_path_factory.mktemp("pipeline")
    expected: dict[str, Any] = {"delayed": delayed(STEPS)}
    for name, techniques in beside().items():
        result = train(made(*techniques), save=False, force=True)
        expected[name] = {"weights": flat({"m": dict(result.run.state()["model"])}), "text": result.text,
                          "loss": result.validation["loss"]}  # fmt: skip
        expected[name]["weights"] = {n.removeprefix("m/"): t for n, t in expected[name]["weights"].items()}
    torch.save(expected, folder / "expected.pt")
    torch.multiprocessing.spawn(ranked, (str(folder),), nprocs=2)
    said = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert not any("fault" in one for one in said), "\n".join(one.get("fault", "") for one in said)
    return said


@pytest.mark.parametrize("name", [*ORDERS, "clip", "sam", "prompt"])
def test_a_pipeline_trains_what_one_process_trains(found: list[dict[str, Any]], name: str):
    for one in found:
        weights, loss, same_text = one[name]
        assert weights < 1e-12
        assert abs(loss) < 1e-12
        assert same_text


def test_2bw_is_sgd_with_gradients_one_step_late(found: list[dict[str, Any]]):
    assert max(one["2bw"] for one in found) < 1e-12


def test_a_resumed_pipeline_goes_on_bitwise(found: list[dict[str, Any]]):
    assert [one["resumed"] for one in found] == [[0.0, 0.0]] * 2
