"""Automated progressive learning: what is compared and chosen, what each candidate runs, and what growth copies."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from scrimp import supernet
from scrimp.clock import Clock
from scrimp.errors import UserError
from scrimp.planning import plan
from scrimp.recipe import Recipe
from scrimp.run import Run, build
from scrimp.techniques.incremental.autoprog import AutoProg
from scrimp.training import train
from tiny import MODEL, TinyData, assert_equal, example, flat, recipe, run_of, step
from tiny_tasks import Memory

EVENLY: Any = {"parts": 3, "search": 0.5, "start": 0.25, "multiple": 4}
"""Of 24 steps: searches at 0 to 4 and 8 to 12, the whole model from 16."""


def staged(
    technique: AutoProg, number: int, path: list[list[int]], last: Any = None, rules: Any = (), **settings: Any
) -> Run:
    """A run of 24 steps at the beginning of a stage, with what was decided before."""
    made = recipe(technique, *rules, duration="24 step", **settings)
    cuts = [4, 8, 12, 16][:number]
    clock = Clock("step", 24, 24, {"step": 1.0, "tok": 64.0}, stage=number, cuts=cuts, step=cuts[-1] if cuts else 0)
    return build(made, made.data.open(), clock, last, decisions={"autoprog": {"path": path}})


def stages_of(made: Recipe) -> tuple[list[Run], list[dict[str, Tensor]], list[dict[str, Any]]]:
    """The run of every stage, as it ended; its state as it began; and every step's line."""
    runs: list[Run] = []
    began: list[dict[str, Tensor]] = []
    lines: list[dict[str, Any]] = []

    def see(event: str, fields: dict[str, Any]) -> None:
        if event == "stage":
            runs.append(fields["run"])
            began.append(flat(fields["run"].state()))
        elif event == "step":
            lines.append(fields)

    train(made, save=False, observe=see)
    return runs, began, lines


# What is compared, and what is chosen.


def test_sizes_are_even_and_rounded_up() -> None:
    assert supernet.grid(0.5, 4, 12) == [6, 8, 10, 12]
    assert supernet.grid(0.5, 4, 128, 8) == [64, 88, 112, 128]
    assert supernet.grid(0.25, 3, 4) == [1, 2, 4]
    assert supernet.grid(1.0, 4, 16, 8) == [16]
    assert supernet.grid(0.5, 4, 0, 8) == [0]


def test_candidates_are_the_next_three_and_never_smaller() -> None:
    depths, lengths = [6, 8, 10, 12], [64, 88, 112, 128]
    first = supernet.candidates(depths, lengths, None)
    assert first == [(d, n) for d in (6, 8, 10) for n in (64, 88, 112)]
    assert supernet.candidates(depths, lengths, (10, 128)) == [(10, 128), (12, 128)]


def test_each_round_visits_all_and_begins_with_the_largest() -> None:
    turns = [supernet.turn(9, 0, 20, s) for s in range(20, 20 + 36)]
    rounds = [turns[i : i + 9] for i in range(0, 36, 9)]
    assert all(sorted(r) == list(range(9)) and r[0] == 8 for r in rounds)
    assert len({tuple(r) for r in rounds}) == 4
    assert turns != [supernet.turn(9, 1, 20, s) for s in range(20, 20 + 36)]


def test_the_fit_finds_the_exponent() -> None:
    times = [1.0, 2.0, 4.0, 9.0]
    assert supernet.slope([3 * t**-0.25 for t in times], times) == pytest.approx(-0.25)
    assert math.isnan(supernet.slope([1.0, 2.0], [5.0, 5.0]))
    assert math.isnan(supernet.slope([1.0, 0.0], [5.0, 6.0]))


def test_the_choice_is_what_lies_farthest_below_the_curve() -> None:
    times = [float(t) for t in range(1, 10)]
    for best in range(9):
        losses = [4 * t**-0.3 * (0.95 if i == best else 1.0) for i, t in enumerate(times)]
        found, w = supernet.choose(losses, times)
        assert found == best
        assert w == pytest.approx(0.3, abs=0.05)


def test_the_least_loss_is_chosen_where_a_fit_says_nothing() -> None:
    assert supernet.choose([3.0, 2.0], [1.0, 9.0]) == (1, 0.0)
    assert supernet.choose([2.0, 3.0, 4.0], [1.0, 2.0, 3.0]) == (0, 0.0)
    assert supernet.choose([2.0, 2.0, 1.9, 1.9], [5.0, 5.0, 5.0, 4.0])[0] == 3
    assert supernet.choose([2.0], [5.0]) == (0, 0.0)


def test_a_depth_runs_the_small_models_blocks_and_some_copies() -> None:
    assert supernet.origins(2, 4, "interleave") == [0, 0, 1, 1]
    assert [supernet.active(2, 4, d, "interleave") for d in (2, 3, 4)] == [[0, 2], [0, 1, 2], [0, 1, 2, 3]]
    assert [supernet.active(6, 10, d, "stack") for d in (6, 8, 10)] == [[*range(6)], [*range(8)], [*range(10)]]
    # Of the four copies in ten blocks of six, the first and the third.
    assert supernet.added(6, 10, "interleave") == [1, 3, 6, 8]
    assert supernet.active(6, 10, 8, "interleave") == [0, 1, 2, 4, 5, 6, 7, 9]


def test_flops_are_those_of_the_products() -> None:
    """Against torch's counter, which counts all of attention where the causal half is meant."""
    run = run_of(recipe())
    layers = list(run.model.blocks)  # type: ignore[arg-type]
    batch = run.batch(0)
    with FlopCounterMode(display=False) as counter:
        run.task.loss(run.model, batch).backward()
    length, width = 16, 32
    attention = 4 * 12 * length**2 * width
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if "attention" not in str(op))
    assert supernet.flops(run.model, layers, 4, length) == products / 4 + attention / 2
    assert supernet.flops(run.model, layers, 3, length) == (
        supernet.flops(run.model, layers, 4, length) - 6 * 12 * width**2 * length - attention / 8
    )


# What a step of a search runs.


def test_the_largest_candidate_is_the_whole_model_bit_by_bit() -> None:
    searching, whole = run_of(recipe(AutoProg(parts=2))), run_of(recipe())
    for run in (searching, whole):
        step(run)
    searching.memories.clear()
    assert_equal(flat(searching.state()), flat(whole.state()))


def test_a_small_candidate_is_a_small_model_on_short_sequences() -> None:
    technique = AutoProg(parts=2, order="stack")
    run = run_of(recipe(technique))
    place = next(s for s in range(1, 4) if run.batch(s)["tokens"].shape[1] == 8 and supernet.turn(4, 0, 0, s) == 0)
    run.clock.step = place
    small = run_of(recipe(model=MODEL | {"layers": 2}))
    weights = dict(run.model.named_parameters())
    with torch.no_grad():
        for name, p in small.model.named_parameters():
            p.copy_(weights[name])
    short = {n: t[:, :8] if t.ndim > 1 else t for n, t in small.batch(place).items()}
    assert run.backward and small.backward
    batch = run.batch(place)
    loss = run.backward(batch, run.task.count(batch))
    assert torch.equal(loss, small.backward(short, run.task.count(short)))
    for name, p in small.model.named_parameters():
        assert torch.equal(weights[name].grad, p.grad), name  # type: ignore[arg-type]
    skipped = [p.grad for n, p in weights.items() if n.startswith(("blocks.2.", "blocks.3."))]
    assert skipped == [None] * len(skipped) != []
    run.model.eval()
    assert not torch.equal(run.model(batch["tokens"]), small.model.eval()(batch["tokens"])), "measured as a whole"


def test_losses_are_kept_of_the_last_visits() -> None:
    made = recipe(AutoProg(parts=2, search=0.75), duration="64 step", log={"tensorboard": False})
    runs, _, lines = stages_of(made)
    table = runs[1].decisions["autoprog"]["table"]
    assert [(d, n) for d, n, *_ in table] == [(2, 8), (2, 16), (4, 8), (4, 16)]
    for depth, length, loss, spent in table:
        seen = [at["loss"] for at in lines[:24] if (at["autoprog_depth"], at["autoprog_length"]) == (depth, length)]
        assert len(seen) == 6
        assert loss == pytest.approx(sum(seen[-4:]) / 4, rel=1e-6)
        blocks = list(runs[0].model.blocks)  # type: ignore[arg-type]
        assert spent == supernet.flops(runs[0].model, blocks, depth, length)


# The course of a run.


def test_stages_and_their_sizes() -> None:
    runs, _, lines = stages_of(recipe(AutoProg(**EVENLY), duration="24 step"))
    assert runs[-1].clock.cuts == [4, 8, 12, 16]
    decided = runs[-1].decisions["autoprog"]
    first, second = decided["path"]
    assert [decided["depth"], decided["length"]] == second
    assert first[0] <= second[0] and first[1] <= second[1]
    assert [len(run.model.blocks) for run in runs] == [4, first[0], 4, second[0], 4]  # type: ignore[arg-type]
    at = {(n["autoprog_depth"], n["autoprog_length"], n["tokens"]) for n in lines[4:8]}
    assert at == {(*first, 4 * first[1])}
    assert {(n["autoprog_depth"], n["tokens"]) for n in lines[16:]} == {(4, 64)}
    assert "autoprog compares 9 candidates of depth and length in about 4 steps." in runs[0].remarks
    assert f"autoprog trains {first[0]} of 4 blocks and {first[1]} of 16 tokens from here." in runs[1].remarks


def test_what_was_not_chosen_is_dropped_with_its_states() -> None:
    technique = AutoProg(**EVENLY)
    search = run_of(recipe(technique, example("adamw"), duration="24 step"))
    for _ in range(4):
        step(search)
    before = flat(search.state())
    after = flat(staged(technique, 1, [[3, 8]], search.state(), rules=[example("adamw")]).state())
    # The small model's block is the first; of the three others, it takes the first and the second.
    keep = supernet.active(1, 4, 3, "interleave")
    assert keep == [0, 1, 2]
    for name, tensor in after.items():
        if "blocks." in name:
            assert torch.equal(tensor, before[name]), name
    assert {n.split(".")[1] for n in after if n.startswith("model/blocks.")} == {"0", "1", "2"}
    assert {n.partition("/")[0] for n in after} >= {"optimizer.exp_avg", "memory.autoprog"}


@pytest.mark.parametrize(("order", "origin"), [("interleave", [0, 0, 1, 1]), ("stack", [0, 1, 0, 1])])
def test_new_blocks_are_copies_of_moving_averages(order: Any, origin: list[int]) -> None:
    technique = AutoProg(**EVENLY, order=order)
    small = staged(technique, 1, [[2, 8]])
    for _ in range(3):
        step(small)
    before = flat(small.state())
    after = flat(staged(technique, 2, [[2, 8]], small.state()).state())
    for name, tensor in after.items():
        if not name.startswith("model/blocks."):
            continue
        _, i, rest = name.split(".", 2)
        copied = int(i) in supernet.added(2, 4, order)
        source = f"{'memory.autoprog' if copied else 'model'}/blocks.{origin[int(i)]}.{rest}"
        assert torch.equal(tensor, before[source]), name
    assert not torch.equal(before["model/blocks.0.mlp.up.weight"], before["memory.autoprog/blocks.0.mlp.up.weight"])
    assert not after["memory.autoprog/#visits"].any()
    assert (int(after["memory.autoprog/#begun"]), int(after["memory.autoprog/#updates"])) == (8, 3)


def test_the_moving_average_is_that_of_the_equation() -> None:
    run = staged(AutoProg(**EVENLY, momentum=0.2), 1, [[2, 8]], dtype="float64")
    name = "blocks.1.mlp.up.weight"
    weight = run.model.get_parameter(name)
    average = weight.detach().clone()
    for t in (1, 2, 3):
        step(run)
        decay = min(0.2, (1 + t) / (10 + t))
        average = decay * average + (1 - decay) * weight.detach()
        torch.testing.assert_close(run.memories["autoprog"][name], average, rtol=1e-12, atol=0)
    assert (1 + 1) / (10 + 1) < 0.2 < (1 + 2) / (10 + 2), "both branches"
    assert "embed.weight" not in run.memories["autoprog"]


@pytest.mark.parametrize("order", ["stack", "interleave"])
def test_zeroed_copies_keep_the_function_bit_by_bit(order: Any) -> None:
    technique = AutoProg(**EVENLY, order=order, zero_new=True)
    small = staged(technique, 1, [[2, 8]], dtype="float64")
    for _ in range(2):
        step(small)
    big = staged(technique, 2, [[2, 8]], small.state(), dtype="float64")
    tokens = small.task.batch({"tokens": TinyData().open().train.windows(np.arange(4))}, np.arange(4))["tokens"]
    assert len(big.model.blocks) == 4  # type: ignore[arg-type]
    logits = [run.model.eval()(tokens) for run in (small, big)]
    assert torch.equal(*logits)
    with pytest.raises(UserError, match="norms after its branches"):
        run_of(recipe(AutoProg(zero_new=True), model=MODEL | {"norm_at": "post"}))


def test_states_of_copies_may_begin_anew() -> None:
    technique = AutoProg(**EVENLY, states="reset")
    small = staged(technique, 1, [[2, 8]], rules=[example("adamw")])
    step(small)
    after = flat(staged(technique, 2, [[2, 8]], small.state(), rules=[example("adamw")]).state())
    kind = "optimizer.exp_avg/blocks.{}.mlp.up.weight"
    assert [bool(after[kind.format(i)].any()) for i in range(4)] == [True, False, True, False]


@pytest.mark.parametrize("zero_new", [False, True])
def test_masks_of_copies_are_those_of_their_originals_and_hold_at_once(zero_new: bool) -> None:
    technique, rules = AutoProg(**EVENLY, zero_new=zero_new), [example("static_sparse", params="*.mlp.*")]
    small = staged(technique, 1, [[2, 8]], rules=rules)
    for _ in range(3):
        step(small)
    # As an average that began before a weight was pruned.
    for name, average in small.memories["autoprog"].items():
        if name.endswith("mlp.down.weight"):
            average += 1
    big = staged(technique, 2, [[2, 8]], small.state(), rules=rules)
    masks = big.memories["static_sparse"]
    for i, origin in enumerate([0, 0, 1, 1]):
        name = "blocks.{}.mlp.down.weight"
        mask, weight = masks[f"{name.format(i)}#mask"], big.model.get_parameter(name.format(i))
        assert torch.equal(mask, small.memories["static_sparse"][f"{name.format(origin)}#mask"]), i
        assert not weight[~mask].any(), i
        assert bool(weight.any()) == (not zero_new or i in (0, 2)), i


def _reopened(folder: Path, copy: Path) -> Path:
    """A copy of a run's folder; its recipe names the tests' own data set, which is handed over opened instead."""
    shutil.copytree(folder, copy)
    raw = yaml.safe_load((copy / "recipe.yaml").read_text())
    (copy / "recipe.yaml").write_text(yaml.safe_dump(raw | {"data": "text"}))
    return copy / "checkpoints"


def test_resumes_bitwise_and_remembers_what_was_decided(tmp_path: Path) -> None:
    parts = (example("adamw"), example("ema"), AutoProg(**EVENLY))
    keep = {"every": "1 step", "keep": 99}
    made = recipe(*parts, duration="12 step", out=str(tmp_path), name="whole", checkpoint=keep)
    whole = train(made, data=TinyData().open())
    assert whole.folder is not None
    decided = whole.run.decisions["autoprog"]
    assert len(decided["path"]) == 2
    for cut in (1, 3, 4, 5):
        folder = _reopened(whole.folder, tmp_path / f"cut-{cut}")
        resumed = train(resume=folder / f"step-{cut:09d}", data=TinyData().open())
        assert resumed.run.decisions["autoprog"] == decided == json.loads(json.dumps(decided))
        assert_equal(flat(whole.run.state()), flat(resumed.run.state()))


def test_a_stage_that_ends_early_goes_on_with_its_search() -> None:
    """Another technique cuts the search in the middle: measures are kept, and the choice is made at its end."""
    made = recipe(AutoProg(**EVENLY), duration="24 step")
    first = run_of(made)
    step(first)
    step(first)
    halfway = first.order.techniques[0].decide(first)
    clock = Clock("step", 24, 24, {"step": 1.0}, step=2, stage=1, cuts=[2])
    second = build(made, made.data.open(), clock, first.state(), decisions={"autoprog": halfway})
    assert_equal(flat(first.state()), flat(second.state()))
    step(second)
    assert int(second.memories["autoprog"]["#visits"].sum()) == 3
    assert len(second.order.techniques[0].decide(second)["table"]) == 3


def test_by_the_clock() -> None:
    runs, _, _ = stages_of(recipe(AutoProg(**EVENLY, measure="seconds"), duration="24 step"))
    for run in (runs[1], runs[3]):
        assert all(0 < spent < 60 for *_, spent in run.decisions["autoprog"]["table"])


def test_points_that_coincide_leave_parts_out() -> None:
    for count, parts in ((1, 2), (3, 4), (5, 4)):
        runs, _, lines = stages_of(recipe(AutoProg(parts=parts), duration=f"{count} step"))
        assert len(lines) == count
        assert count == 1 or len(runs[-1].model.blocks) == 4  # type: ignore[arg-type]


def test_plans_count_with_the_largest_choice() -> None:
    made = recipe(AutoProg(parts=2))
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = run_of(made)
    decided = fake.order.techniques[0].decide(fake)
    assert (decided["depth"], decided["length"], decided["table"]) == (4, 16, [])
    stages = plan(made, data=TinyData().open()).stages
    assert [(s.steps, s.tokens) for s in stages] == [(1, 64), (3, 64), (4, 64)]
    assert len({s.parameters for s in stages}) == 1


def test_what_is_not_known_to_be_decided_is_the_largest() -> None:
    """As in the plan of a run that is resumed."""
    later = staged(AutoProg(**EVENLY), 1, [])
    assert (len(later.model.blocks), later.batch(4)["tokens"].shape[1]) == (4, 16)  # type: ignore[arg-type]


def test_images_grow_in_depth_only() -> None:
    model = {**MODEL, "name": "vision", "patch": 4}
    made = recipe(AutoProg(parts=2), model=model, data=Memory("classify, images"), task="classify")
    run = run_of(made)
    assert [run.batch(s)["images"].shape[-1] for s in range(4)] == [16] * 4
    for _ in range(4):
        step(run)
    decided = run.order.techniques[0].decide(run)
    assert [(d, n) for d, n, *_ in decided["table"]] == [(2, 0), (4, 0)]


def test_several_lists_and_too_many_blocks_are_refused() -> None:
    made = recipe(AutoProg(), model={**MODEL, "name": "encoder_decoder"}, data=Memory("seq2seq"), task="seq2seq")
    with pytest.raises(UserError, match=r"techniques\.autoprog: .*several lists"):
        run_of(made)
    whole = run_of(recipe())
    with pytest.raises(UserError, match=r"techniques\.autoprog: .* have 4 blocks, the first part has 3 at most"):
        run_of(recipe(AutoProg(parts=4, start=0.25)), source={"model": whole.state()["model"]})
    small = run_of(recipe(model=MODEL | {"layers": 2}))
    grown = run_of(recipe(AutoProg(parts=2)), source={"model": small.state()["model"]}).model
    assert torch.equal(
        grown.get_parameter("blocks.1.mlp.up.weight"), small.model.get_parameter("blocks.0.mlp.up.weight")
    )


def test_settings_are_checked() -> None:
    for settings in (
        {"parts": 0},
        {"search": 0.0},
        {"search": 1.0},
        {"start": 0.0},
        {"length": 1.5},
        {"momentum": 1.0},
    ):
        with pytest.raises(UserError):
            AutoProg(**settings)  # type: ignore[arg-type]
