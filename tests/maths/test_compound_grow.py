"""Compound growth: what each stage is, what pooling computes, and what a resume finds."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pairs.grid import train as trained
from scrimp.errors import UserError
from scrimp.recipe import Recipe
from scrimp.run import Run
from scrimp.techniques.incremental.compound_grow import CompoundGrow, means
from scrimp.training import train
from tiny import TinyData, assert_equal, example, flat, recipe, run_of
from tiny_tasks import TINY, Memory


def of_task(entry: str, *techniques: Any, **settings: Any) -> Recipe:
    tiny = TINY[entry]
    model = {**tiny.model, "dropout": 0.0, **settings.pop("model", {})}
    return recipe(*techniques, model=model, data=Memory(entry), task=tiny.name or entry, dtype="float64", **settings)


def stages_of(made: Recipe) -> tuple[list[Run], list[dict[str, Tensor]], list[int]]:
    """The run of every stage as it ended, its state as it began, and the tokens of a sequence in it."""
    runs: list[Run] = []
    began: list[dict[str, Tensor]] = []
    lengths: list[int] = []

    def see(event: str, fields: dict[str, Any]) -> None:
        if event == "stage":
            runs.append(fields["run"])
            began.append(flat(fields["run"].state()))
            lengths.append(fields["run"].batch(0)["tokens"].shape[1])

    train(made, save=False, observe=see, force=True)
    return runs, began, lengths


def test_depth_width_and_length_grow_together() -> None:
    growing = CompoundGrow(at=("2 step", "4 step"), hidden=(0.25, 0.6), lengths=(0.5, 1.0))
    runs, _, lengths = stages_of(recipe(growing, data=TinyData(context=32), duration="6 step"))
    shapes = [(len(run.model.blocks), run.model.blocks[0].mlp.up.weight.shape[0]) for run in runs]  # type: ignore[arg-type,index]
    assert shapes == [(1, 32), (2, 80), (4, 128)]
    assert lengths == [16, 32, 32]


def test_growth_of_width_alone_keeps_the_function_and_of_depth_copies() -> None:
    batch = run_of(of_task("masked-lm")).batch(0)
    growing = CompoundGrow(at=("2 step",), depths=(4, 4), hidden=(0.5,), lengths=(1.0,))
    losses: list[Tensor] = []
    runs: list[Run] = []

    def see(event: str, fields: dict[str, Any]) -> None:
        if event == "stage":
            runs.append(fields["run"])
            losses[:] = [loss_of(run, batch) for run in runs]

    train(of_task("masked-lm", example("adamw"), growing, duration="3 step"), save=False, observe=see, force=True)
    assert len(losses) == 2
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
    runs, began, _ = stages_of(of_task("masked-lm", example("adamw"), CompoundGrow(at=("2 step",)), duration="3 step"))
    end, start = flat(runs[0].state()), began[1]
    for i in range(4):
        rows = start[f"model/blocks.{i}.mlp.up.weight"]
        assert torch.equal(rows, end[f"model/blocks.{i % 2}.mlp.up.weight"].repeat(2, 1))
        moments = start[f"optimizer.exp_avg/blocks.{i}.mlp.up.weight"]
        assert torch.equal(moments, end[f"optimizer.exp_avg/blocks.{i % 2}.mlp.up.weight"].repeat(2, 1) / 2)


def loss_of(run: Run, batch: dict[str, Tensor]) -> Tensor:
    assert run.evaluate is not None
    return run.evaluate(lambda model: run.task.loss(model, batch))


def test_means_of_neighbors() -> None:
    x = torch.arange(10.0).view(1, 5, 2)
    assert torch.equal(means(x, 2), torch.tensor([[[1.0, 2.0], [5.0, 6.0], [8.0, 9.0]]]))


def pooled_run(**settings: Any) -> Run:
    growing = CompoundGrow(at=(0.5,), depths=(4, 4), hidden=(1.0,), length="pool", **settings)
    return run_of(of_task("masked-lm", growing))


def test_pooled_states_are_those_of_the_means_given_back_to_every_token() -> None:
    run, plain = pooled_run(), run_of(of_task("masked-lm"))
    run.model.eval(), plain.model.eval()
    tokens = torch.randint(3, 32, (2, 15), generator=torch.Generator().manual_seed(0))
    attended = torch.arange(15) < torch.tensor([[15], [7]])
    model: Any = plain.model
    x = model.embed(tokens) + model.positions(torch.arange(15))
    last = x[:, 14:]
    x = torch.cat([(x[:, 0:14:2] + x[:, 1:14:2]) / 2, last], 1)
    whole = torch.cat([attended, torch.zeros(2, 1, dtype=torch.bool)], 1)
    mask = (whole[:, 0::2] | whole[:, 1::2])[:, None, None, :]
    assert mask[1, 0, 0].tolist() == [True] * 4 + [False] * 4
    for block in model.blocks:
        x = block(x, None, mask)
    expected = model.norm(x).repeat_interleave(2, 1)[:, :15]
    got = run.model.states(tokens, attended=attended)  # type: ignore[operator]
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_every_position_is_trained_and_blocks_see_fewer_tokens() -> None:
    run = pooled_run(lengths=(0.25,))
    widths: list[int] = []
    run.model.blocks[0].mlp.up.register_forward_hook(lambda m, x, y: widths.append(y.shape[1]))  # type: ignore[index]
    batch = run.batch(0)
    assert run.backward is not None
    run.backward(batch, run.task.count(batch))
    assert widths == [4]
    grad = run.model.get_parameter("positions.weight").grad
    assert grad is not None
    assert bool((grad != 0).any(1).all())


def test_the_last_stage_is_not_pooled() -> None:
    made = of_task("masked-lm", example("adamw"), CompoundGrow(at=("2 step",), length="pool"), duration="3 step")
    runs, _, lengths = stages_of(made)
    assert lengths == [16, 16]
    assert ["states" in vars(run.model) for run in runs] == [True, False]


@pytest.mark.parametrize("entry", ["masked-lm", "classify", "regress", "embed"])
def test_tasks_of_encoders_train_when_pooled(entry: str) -> None:
    growing = CompoundGrow(at=("1 step",), length="pool", lengths=(0.5,))
    result = train(of_task(entry, example("adamw"), growing, duration="2 step"), save=False, force=True)
    assert result.validation["loss"] == result.validation["loss"]


def test_pooled_tokens_are_planned_to_the_byte() -> None:
    growing = CompoundGrow(at=(0.5,), length="pool")
    made = of_task("regress", growing)
    real = run_of(made)
    batch = real.batch(0)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        planned, _ = trained(run_of(made), [{k: mode.from_tensor(v) for k, v in batch.items()}])
    assert planned == trained(real, [batch])[0]


def test_resumes_bitwise_inside_and_between_stages(tmp_path: Path) -> None:
    growing = CompoundGrow(at=("2 step", "4 step"), length="pool")
    made = of_task("masked-lm", example("adamw"), example("ema"), growing, duration="6 step", out=str(tmp_path),
                   name="a", checkpoint={"every": "1 step", "keep": 99})  # fmt: skip
    whole = train(made, data=Memory("masked-lm").open(), force=True)
    for cut in (2, 3):
        copy = tmp_path / f"cut-{cut}"
        shutil.copytree(tmp_path / "a", copy)
        raw = yaml.safe_load((copy / "recipe.yaml").read_text())
        (copy / "recipe.yaml").write_text(yaml.safe_dump(raw | {"data": "text"}))
        resumed = train(resume=copy / f"checkpoints/step-{cut:09d}", data=Memory("masked-lm").open(), force=True)
        assert_equal(flat(whole.run.state()), flat(resumed.run.state()))


def test_what_cannot_be_pooled_or_shortened_is_refused() -> None:
    with pytest.raises(UserError, match=r"techniques\.compound_grow\.length: pooling needs an encoder"):
        run_of(recipe(CompoundGrow(length="pool")))
    with pytest.raises(UserError, match="rotary positions"):
        run_of(of_task("masked-lm", CompoundGrow(length="pool"), model={"positions": "rotary"}))
    with pytest.raises(UserError, match=r"techniques\.compound_grow\.lengths: the data has no sequences"):
        run_of(of_task("classify, images", CompoundGrow()))
    run_of(of_task("classify, images", CompoundGrow(lengths=(1.0,))))
    with pytest.raises(UserError, match="must be 1 / k"):
        CompoundGrow(lengths=(0.7,), length="pool")
    with pytest.raises(UserError, match="2 points need as many shares"):
        CompoundGrow(at=(0.1, 0.2), hidden=(0.5,))
    with pytest.raises(UserError, match="do not grow"):
        run_of(recipe(CompoundGrow(depths=(3, 5))))
