"""Progressive stacking: what is copied to where, when depth grows, and what a resume, an extension or a source does."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
import yaml
from torch import Tensor, nn

from scrimp.arrange import arrange
from scrimp.clock import Clock
from scrimp.errors import UserError
from scrimp.recipe import Recipe
from scrimp.run import Run
from scrimp.techniques.incremental.stack import Stack
from scrimp.training import train
from tiny import MODEL, TinyData, assert_equal, example, flat, recipe, run_of
from tiny_tasks import TINY, Memory

if TYPE_CHECKING:
    from scrimp.technique import State

BLOCK = re.compile(r"(?<=blocks\.)(\d+)(?=\.)")


def stages_of(made: Recipe) -> tuple[list[Run], list[dict[str, Tensor]]]:
    """The run of every stage, as it ended, and its state as it began."""
    runs: list[Run] = []
    began: list[dict[str, Tensor]] = []

    def see(event: str, fields: dict[str, Any]) -> None:
        if event == "stage":
            runs.append(fields["run"])
            began.append(flat(fields["run"].state()))

    train(made, save=False, observe=see)
    return runs, began


def grown(**settings: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The end of a stage of 2 blocks, and the beginning of the next one of 4, with moments and a moving average."""
    made = recipe(example("adamw"), example("ema"), Stack(at=("4 step",), **settings), dtype="float64")
    runs, began = stages_of(made)
    assert [len(run.model.blocks) for run in runs] == [2, 4]  # type: ignore[arg-type]
    return flat(runs[0].state()), began[1]


def copies_of(order: str) -> list[int]:
    return [2, 3] if order == "stack" else [1, 3]


@pytest.mark.parametrize(("order", "origin"), [("stack", [0, 1, 0, 1]), ("interleave", [0, 0, 1, 1])])
def test_weights_moments_and_memories_come_from_the_blocks_that_the_order_names(order: str, origin: list[int]) -> None:
    before, after = grown(order=order)
    assert {n.partition("/")[0] for n in after} == {
        "model", "optimizer.exp_avg", "optimizer.exp_avg_sq", "optimizer.step", "memory.ema",
    }  # fmt: skip
    expected = {name: before[BLOCK.sub(lambda m: str(origin[int(m[0])]), name)] for name in after}
    assert_equal(expected, after)
    assert len(after) - len(before) == 2 * len([n for n in before if "blocks.0." in n])
    assert not torch.equal(before["model/blocks.0.mlp.up.weight"], before["model/blocks.1.mlp.up.weight"])


@pytest.mark.parametrize("order", ["stack", "interleave"])
def test_states_of_copies_may_begin_anew(order: str) -> None:
    before, after = grown(order=order, states="reset")
    new = [n for n in after if any(f"blocks.{i}." in n for i in copies_of(order))]
    assert all(bool((after[n] == 0).all()) == n.startswith("optimizer.") for n in new if "mlp.up.weight" in n)
    assert float(after["optimizer.step/blocks.0.mlp.up.weight"]) == 4
    assert float(after[f"optimizer.step/blocks.{copies_of(order)[0]}.mlp.up.weight"]) == 0
    kept = [n for n in after if n not in new and "blocks." not in n]
    assert_equal({n: before[n] for n in kept}, {n: after[n] for n in kept})


def test_copies_go_their_own_way() -> None:
    runs, _ = stages_of(recipe(example("adamw"), Stack(at=("4 step",))))
    state = runs[1].state()
    for tensors in state.values():
        assert len({t.data_ptr() for t in tensors.values()}) == len(tensors)
    weights = state["model"]
    assert not torch.equal(weights["blocks.0.mlp.up.weight"], weights["blocks.2.mlp.up.weight"])


@pytest.mark.parametrize("order", ["stack", "interleave"])
def test_zeroed_copies_keep_the_function_bit_by_bit(order: Literal["stack", "interleave"]) -> None:
    made = recipe(example("adamw"), Stack(at=("4 step",), order=order, zero_new=True), dtype="float64")
    tokens = run_of(made).batch(0)["tokens"]
    runs: list[Run] = []
    logits: list[Tensor] = []

    def see(event: str, fields: dict[str, Any]) -> None:
        if event == "stage":
            runs.append(fields["run"])
            # At the second stage: the small model as it ended, and the big one as it begins.
            logits[:] = [run.evaluate(lambda model: model(tokens)) for run in runs]  # type: ignore[misc]

    train(made, save=False, observe=see)
    assert len(logits) == 2
    assert torch.equal(logits[0], logits[1])
    for i in copies_of(order):
        assert runs[1].model.get_parameter(f"blocks.{i}.mlp.down.weight").any(), "zeros receive gradients"


def test_identity_is_refused_where_zeros_do_not_give_it() -> None:
    with pytest.raises(UserError, match=r"techniques\.stack\.zero_new: .*norms after its branches"):
        run_of(recipe(Stack(at=(0.5,), zero_new=True), model=MODEL | {"norm_at": "post"}))
    with pytest.raises(UserError, match=r"no `attention\.proj\.weight` to zero"):
        _stage(Stack(at=(0.5,), zero_new=True), 0, Lecture())


@pytest.mark.parametrize(
    ("settings", "depths"),
    [
        ({"at": ("2 step", "4 step")}, [1, 2, 4]),
        ({"at": (0.25, 0.5), "depths": (1, 3, 4)}, [1, 3, 4]),
        ({"at": (0.5, 0.25), "depths": (1, 3, 4)}, [1, 3, 4]),
        ({"at": ("2 step", "2 step")}, [1, 4]),
        ({"at": (0,)}, [4]),
        ({"at": ()}, [4]),
    ],
)
def test_depths(settings: dict[str, Any], depths: list[int]) -> None:
    runs, _ = stages_of(recipe(Stack(**settings)))
    assert [len(run.model.blocks) for run in runs] == depths  # type: ignore[arg-type]


def test_uneven_growth_repeats_from_the_bottom() -> None:
    runs, began = stages_of(recipe(Stack(at=("2 step", "4 step"), depths=(1, 3, 4))))
    end, start = flat(runs[1].state()), began[2]
    assert torch.equal(start["model/blocks.3.mlp.up.weight"], end["model/blocks.0.mlp.up.weight"])
    assert torch.equal(start["model/blocks.2.mlp.up.weight"], end["model/blocks.2.mlp.up.weight"])


def test_depths_that_do_not_grow_are_refused() -> None:
    for depths in ((3, 2), (0, 4), (2, 3)):
        with pytest.raises(UserError, match=r"techniques\.stack\.depths: .* do not grow"):
            run_of(recipe(Stack(at=(0.5,), depths=depths)))
    settings: Any
    for settings in ({"at": (0.1, 0.2), "depths": (3, 1, 4)}, {"at": (0.1, 0.2, 0.3)}):
        with pytest.raises(UserError, match="do not grow"):
            run_of(recipe(Stack(**settings)))
    with pytest.raises(UserError, match="2 points need 3 depths"):
        Stack(at=(0.1, 0.2), depths=(1, 4))
    with pytest.raises(UserError, match="not a duration"):
        Stack(at=("soon",))


def _reopened(folder: Path, copy: Path) -> Path:
    """A copy of a run's folder; its recipe names the tests' own data set, which is handed over opened instead."""
    shutil.copytree(folder, copy)
    raw = yaml.safe_load((copy / "recipe.yaml").read_text())
    (copy / "recipe.yaml").write_text(yaml.safe_dump(raw | {"data": "text"}))
    return copy / "checkpoints"


def test_resumes_bitwise_inside_and_between_stages(tmp_path: Path) -> None:
    parts = (example("adamw"), example("ema"), Stack(at=("2 step", "5 step")))
    made = recipe(*parts, out=str(tmp_path), name="whole", checkpoint={"every": "1 step", "keep": 99})
    whole = train(made, data=TinyData().open())
    assert whole.folder is not None
    for cut in (1, 2, 4, 5, 7):
        folder = _reopened(whole.folder, tmp_path / f"cut-{cut}")
        resumed = train(resume=folder / f"step-{cut:09d}", data=TinyData().open())
        assert resumed.run.clock.cuts == [2, 5]
        assert_equal(flat(whole.run.state()), flat(resumed.run.state()))


def test_an_extension_moves_no_growth(tmp_path: Path) -> None:
    made = recipe(Stack(at=(0.5,)), out=str(tmp_path), name="a", checkpoint={"every": "1 step", "keep": 99})
    whole = train(made, data=TinyData().open())
    assert whole.folder is not None
    for cut, depth in ((2, 2), (6, 4)):
        folder = _reopened(whole.folder, tmp_path / f"cut-{cut}")
        depths: list[int] = []

        def see(event: str, fields: dict[str, Any], depths: list[int] = depths) -> None:
            if event == "stage":
                depths.append(len(fields["run"].model.blocks))

        longer = train(resume=folder / f"step-{cut:09d}", extend="8 step", data=TinyData().open(), observe=see)
        assert (longer.run.clock.step, longer.run.clock.cuts) == (16, [4])
        assert depths == sorted({depth, 4})


def test_weights_to_start_from_are_grown_or_refused() -> None:
    small = run_of(recipe(model=MODEL | {"layers": 2}))
    source: State = {"model": {n: t.clone() for n, t in small.state()["model"].items()}}
    big = run_of(recipe(Stack(at=())), source=source).model
    for i in range(4):
        given, made = small.model.get_submodule(f"blocks.{i % 2}"), big.get_submodule(f"blocks.{i}")
        assert all(torch.equal(a, b) for a, b in zip(given.parameters(), made.parameters(), strict=True))
    with pytest.raises(UserError, match=r"techniques\.stack: .* 2 blocks in `blocks`, this stage has 1"):
        run_of(recipe(Stack(at=(0.2, 0.5))), source=source)
    first = run_of(recipe(Stack(at=(0.5,))), source=source)
    assert torch.equal(first.model.get_parameter("embed.weight"), small.model.get_parameter("embed.weight"))


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.key(x)


class Layer(nn.Module):
    """A block with a list of its own, which is longer than that of the blocks once they are cut."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head() for _ in range(4))
        self.mix = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(x + torch.cat([head(x) for head in self.heads][:2], -1))


class Lecture(nn.Module):
    """Somebody's own model, which calls its list of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Layer() for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def _stage(stack: Stack, stage: int, model: nn.Module) -> Run:
    """Somebody's own model at a stage of a run of 8 steps that grows at the fourth."""
    clock = Clock("step", 8, 8, {"step": 1.0}, step=4 * stage, stage=stage, cuts=[4] * stage)
    given: Any = SimpleNamespace(techniques=(stack,))
    run = Run(given, arrange([stack]), clock, None, torch.device("cpu"))
    run.model = run.fold("model", model)
    return run


@pytest.mark.parametrize(("model", "prefix"), [(Lecture, "layers."), (lambda: Lecture().layers, "")])
def test_any_list_of_blocks_grows(model: Any, prefix: str) -> None:
    stack = Stack(at=(0.5,))
    small, big = _stage(stack, 0, model()), _stage(stack, 1, model())
    assert small.model(torch.ones(1, 4)).shape == (1, 4)
    given = {n: p.detach() for n, p in small.model.named_parameters()}
    assert {n.removeprefix(prefix)[0] for n in given} == {"0", "1"}
    assert small.fold("carry", {"model": given})["model"] == given, "a resume within a stage grows nothing"
    state = big.fold("carry", {"model": given, "optimizer.m": given})
    assert state["model"].keys() == {n for n, _ in big.model.named_parameters()}
    for kind in ("model", "optimizer.m"):
        for name, tensor in state[kind].items():
            i, rest = name.removeprefix(prefix).split(".", 1)
            assert tensor is given[f"{prefix}{int(i) % 2}.{rest}"]


def test_blocks_without_numbers_are_refused() -> None:
    named = nn.Sequential()
    for name in ("one", "two", "three", "four", "five"):
        named.add_module(name, Layer())
    with pytest.raises(UserError, match="not numbered from 0"):
        _stage(Stack(at=(0.5,)), 0, named)


def blocks_of(run: Run) -> dict[str, int]:
    """Path of every list of blocks -> how many it holds."""
    names = {n.partition(".mlp.")[0] for n, _ in run.model.named_parameters() if ".mlp.up.weight" in n}
    paths = [name.rpartition(".")[0] for name in names]
    return {path: paths.count(path) for path in paths}


def of_task(entry: str, *techniques: Any, **model: Any) -> Recipe:
    tiny = TINY[entry]
    return recipe(*techniques, model={**tiny.model, **model}, data=Memory(entry), task=tiny.name or entry,
                  dtype="float64")  # fmt: skip


@pytest.mark.parametrize(
    ("entry", "settings", "model", "depths"),
    [
        ("seq2seq", {}, {"decoder_layers": 2}, [(2, 1), (4, 2)]),
        ("seq2seq", {"depths": (3, 4)}, {"decoder_layers": 2}, [(3, 1), (4, 2)]),
        ("seq2seq", {"stacks": "decoder.*"}, {}, [(4, 2), (4, 4)]),
        ("contrastive", {}, {"image_layers": 2}, [(2, 1), (4, 2)]),
        ("masked-image", {}, {}, [(2, 1), (4, 1)]),
    ],
)
def test_lists_of_blocks_grow_in_proportion(entry: str, settings: Any, model: Any, depths: list[Any]) -> None:
    order = {"seq2seq": ("encoder.blocks", "decoder.blocks"), "contrastive": ("text.blocks", "image.blocks"),
             "masked-image": ("blocks", "decoder.blocks")}[entry]  # fmt: skip
    runs, began = stages_of(of_task(entry, example("adamw"), Stack(at=("4 step",), **settings), **model))
    assert [tuple(blocks_of(run)[path] for path in order) for run in runs] == depths
    end = flat(runs[0].state())
    for path, first, last in zip(order, *depths, strict=True):
        for i in range(first, last):
            grown = [n for n in began[1] if f"/{path}.{i}." in n]
            assert any(n.startswith("optimizer.exp_avg/") for n in grown)
            for name in grown:
                origin = end[name.replace(f"/{path}.{i}.", f"/{path}.{i % first}.")]
                assert torch.equal(began[1][name], origin), name


def test_zeroed_copies_of_a_decoder_keep_the_function() -> None:
    made = of_task("seq2seq", Stack(at=("4 step",), zero_new=True))
    batch = run_of(made).batch(0)
    runs: list[Run] = []
    losses: list[Tensor] = []

    def loss_of(run: Run) -> Tensor:
        assert run.evaluate is not None
        return run.evaluate(lambda model: run.task.loss(model, batch))

    def see(event: str, fields: dict[str, Any]) -> None:
        if event == "stage":
            runs.append(fields["run"])
            losses[:] = [loss_of(run) for run in runs]

    train(made, save=False, observe=see)
    assert torch.equal(losses[0], losses[1])


def test_a_pattern_of_no_list_is_refused() -> None:
    with pytest.raises(UserError, match=r"techniques\.stack\.stacks: `encoder` matches no list of blocks"):
        run_of(recipe(Stack(at=(0.5,), stacks="encoder")))
