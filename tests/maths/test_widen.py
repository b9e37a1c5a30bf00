"""Width growth: the function stays, copies part, moments are what the wide model's gradients would have made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scrimp.errors import UserError
from scrimp.recipe import Recipe
from scrimp.run import Run
from scrimp.techniques.incremental.stack import Stack
from scrimp.techniques.incremental.widen import Widen
from scrimp.training import train
from scrimp.widths import Side, Wider, head_units, hidden_units, widened
from tiny import MODEL, assert_equal, example, flat, recipe, run_of, step
from tiny_tasks import TINY, Memory

WIDE: dict[str, dict[str, Any]] = {
    "causal-lm": {},
    "causal-lm, swiglu": {"activation": "swiglu", "norm": "rmsnorm", "bias": False, "hidden": 96, "qk_norm": True},
    "causal-lm, grouped": {"heads": 8, "kv_heads": 4, "positions": "rotary", "head_width": 6},
    "masked-lm": {"norm_at": "post"},
    "classify, images": {},
    "seq2seq": {},
    "masked-image": {"decoder_heads": 4},
}


def made_of(entry: str, *techniques: Any, **settings: Any) -> Recipe:
    name = entry.split(",")[0] if entry not in TINY else entry
    tiny = TINY[name]
    model = {**tiny.model, **WIDE.get(entry, {}), "dropout": 0.0, "heads": WIDE.get(entry, {}).get("heads", 4)}
    return recipe(*techniques, model=model, data=Memory(name), task=tiny.name or name, dtype="float64", **settings)


def loss_of(run: Run, batch: dict[str, Tensor]) -> Tensor:
    assert run.evaluate is not None
    return run.evaluate(lambda model: run.task.loss(model, batch))


def at_growth(made: Recipe) -> tuple[list[Run], list[Tensor], list[dict[str, Tensor]]]:
    """The runs of two stages; the losses of the first as it ended and of the second as it began, and both states."""
    runs: list[Run] = []
    losses: list[Tensor] = []
    states: list[dict[str, Tensor]] = []
    batch = run_of(made).batch(0)

    def see(event: str, fields: dict[str, Any]) -> None:
        if event == "stage":
            runs.append(fields["run"])
            if len(runs) == 2:
                losses.extend(loss_of(run, batch) for run in runs)
                states.extend(flat(run.state()) for run in runs)

    train(made, save=False, observe=see, force=True)
    return runs, losses, states


@pytest.mark.parametrize(("entry", "noise"), [*((entry, 0.5) for entry in WIDE), ("causal-lm", 0.0)])
def test_growth_keeps_the_function(entry: str, noise: float) -> None:
    growing = Widen(at=("2 step",), shares=(0.3,), heads=True, noise=noise)
    _, losses, states = at_growth(made_of(entry, example("adamw"), example("ema"), growing, duration="3 step"))
    assert abs(float(losses[0] - losses[1])) < 1e-12 * abs(float(losses[0]))
    layers = ("mlp.up", "mlp.down", "mlp.gate", "attention.qkv", "attention.proj", "cross.kv", "cross.proj")
    for name, tensor in states[0].items():
        side = name.endswith(".weight") and name.removesuffix(".weight").endswith(layers)
        if side and "optimizer.step" not in name:
            assert tensor.numel() < states[1][name].numel(), name


def widths(run: Run) -> tuple[int, int, int]:
    block = run.model.blocks[0]  # type: ignore[index]
    return block.mlp.up.weight.shape[0], block.mlp.down.weight.shape[1], block.attention.kv_heads


def test_the_last_stage_is_the_recipes_model() -> None:
    made = made_of("causal-lm", Widen(at=(0.25, 0.5), shares=(0.25, 0.6), heads=True), duration="8 step")
    seen: list[tuple[int, int, int]] = []

    def see(event: str, fields: dict[str, Any]) -> None:
        if event == "stage":
            seen.append(widths(fields["run"]))

    result = train(made, save=False, observe=see, force=True)
    # 0.6 of 128 rounded up to a multiple of 8; 0.6 of 4 heads rounded up.
    assert seen == [(32, 32, 1), (80, 80, 3), (128, 128, 4)]
    plain = run_of(made_of("causal-lm"))
    assert {n: p.shape for n, p in result.run.model.named_parameters()} == {
        n: p.shape for n, p in plain.model.named_parameters()
    }


def test_units_and_copies_by_hand() -> None:
    up = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    state: Any = {
        "model": {
            "b.0.up.weight": up, "b.0.up.bias": up[0], "b.0.down.weight": up.clone(), "b.0.down.bias": up[1],
            "b.0.down.mask": up > 1,
        },
        "optimizer.exp_avg": {"b.0.up.weight": up, "b.0.down.weight": up},
        "optimizer.exp_avg_sq": {"b.0.up.weight": up, "b.0.down.weight": up},
        "optimizer.step": {"b.0.up.weight": torch.tensor(7.0), "b.0.down.weight": torch.tensor(7.0)},
    }  # fmt: skip
    units = hidden_units(Holder(3))
    grown = widened(state, units, seed=0, noise=0.0)
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]], dtype=torch.float64)
    assert torch.equal(grown["model"]["b.0.up.weight"], rows)
    assert torch.equal(grown["model"]["b.0.up.bias"], torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64))
    out = torch.tensor([[0.5, 2.0, 0.5], [1.5, 4.0, 1.5]], dtype=torch.float64)
    assert torch.equal(grown["model"]["b.0.down.weight"], out)
    assert torch.equal(grown["model"]["b.0.down.bias"], up[1])
    assert torch.equal(grown["model"]["b.0.down.mask"], torch.tensor([[False, True, False], [True, True, True]]))
    shared = torch.tensor([[2.0], [1.0], [2.0]], dtype=torch.float64)
    assert torch.equal(grown["optimizer.exp_avg"]["b.0.up.weight"], rows / shared)
    assert torch.equal(grown["optimizer.exp_avg_sq"]["b.0.up.weight"], rows / shared**2)
    assert torch.equal(grown["optimizer.exp_avg"]["b.0.down.weight"], up[:, [0, 1, 0]])
    assert float(grown["optimizer.step"]["b.0.down.weight"]) == 7
    assert widened(grown, units, seed=0, noise=1.0) is grown, "a resume within a stage grows nothing"


class Holder(nn.Module):
    """Somebody's own blocks, with torch's own layers."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        block = nn.Module()
        block.up, block.down = nn.Linear(2, hidden), nn.Linear(hidden, 2)
        self.b = nn.ModuleList([block])


def test_noise_sums_to_zero_over_copies_and_is_the_same_again() -> None:
    state: Any = {"model": {"b.0.up.weight": torch.randn(3, 2), "b.0.down.weight": torch.randn(2, 3).double()}}
    units = hidden_units(Holder(7))
    plain, noisy, again = (widened(state, units, 0, noise)["model"]["b.0.down.weight"] for noise in (0.0, 0.3, 0.3))
    assert torch.equal(noisy, again)
    moved = noisy - plain
    for unit in range(3):
        torch.testing.assert_close(moved[:, unit::3].sum(1), torch.zeros(2).double(), atol=1e-15, rtol=0)
    assert 0.01 < float(moved.std() / plain.std()) < 1


def test_copies_part_with_noise_and_not_without() -> None:
    for noise, alike in ((0.0, True), (0.1, False)):
        made = made_of("causal-lm", example("adamw"), Widen(at=("2 step",), noise=noise), duration="6 step")
        up = train(made, save=False, force=True).run.model.get_parameter("blocks.0.mlp.up.weight")
        assert torch.allclose(up[:64], up[64:], rtol=0, atol=1e-9) == alike


def test_moments_are_those_of_the_wide_models_gradients() -> None:
    """SGD with momentum on held weights: the wide model's own momentum equals what is carried."""
    made = made_of("causal-lm", example("sgd", lr=0.0, momentum=0.9), Widen(at=("3 step",), heads=True, noise=0.0),
                   duration="6 step")  # fmt: skip
    _, _, states = at_growth(made)
    wide = run_of(made_of("causal-lm", example("sgd", lr=0.0, momentum=0.9), duration="6 step"))
    with torch.no_grad():
        for name, p in wide.model.named_parameters():
            p.copy_(states[1][f"model/{name}"])
    for _ in range(3):
        step(wide)
    own = {n: t for n, t in flat(wide.state()).items() if n.startswith("optimizer.")}
    assert own
    for name, tensor in own.items():
        torch.testing.assert_close(states[1][name], tensor, atol=1e-15, rtol=1e-9, msg=name)


def test_rows_of_queries_keys_and_values_keep_their_sections() -> None:
    # Two heads of width 2, with one query head each: rows q0 q0 q1 q1 k0 k0 k1 k1 v0 v0 v1 v1; three heads afterwards.
    wider = Wider(Side("qkv", 0, (2, 2, 2)), old=2, new=3)
    assert wider.index() == [0, 1, 2, 3, 0, 1, 4, 5, 6, 7, 4, 5, 8, 9, 10, 11, 8, 9]


def test_heads_are_counted_with_the_queries_that_share_them() -> None:
    run = run_of(made_of("causal-lm, grouped", Widen(at=(0.5,), shares=(0.5,), heads=True)))
    attention = run.model.blocks[0].attention  # type: ignore[index]
    assert (attention.heads, attention.kv_heads) == (4, 2)
    assert attention.qkv.weight.shape[0] == (4 + 2 * 2) * 6
    assert {units.count for units in head_units(run.model)} == {2}


def test_depth_and_width_grow_at_the_same_point() -> None:
    both = (Stack(at=("2 step",), zero_new=True), Widen(at=("2 step",), heads=True))
    made = made_of("causal-lm", example("adamw"), *both, duration="3 step")
    _, losses, _ = at_growth(made)
    assert abs(float(losses[0] - losses[1])) < 1e-12 * abs(float(losses[0]))


def test_states_of_another_shape_begin_anew() -> None:
    up = torch.ones(2, 2)
    state: Any = {
        "model": {"b.0.up.weight": up, "b.0.down.weight": up},
        "optimizer.codes": {"b.0.up.weight": torch.ones(3), "b.0.down.weight": up},
        "optimizer.step": {"b.0.up.weight": torch.tensor(7.0), "b.0.down.weight": torch.tensor(7.0)},
    }
    grown = widened(state, hidden_units(Holder(4)), 0, 0.0)
    assert grown["optimizer.codes"].keys() == grown["optimizer.step"].keys() == {"b.0.down.weight"}


def test_weights_to_start_from_are_widened_or_refused() -> None:
    small = run_of(recipe(model=MODEL | {"hidden": 64}))
    source: Any = {"model": {n: t.clone() for n, t in small.state()["model"].items()}}
    big = run_of(recipe(Widen(at=(), shares=())), source=source).model
    up, given = big.get_parameter("blocks.1.mlp.up.weight"), source["model"]["blocks.1.mlp.up.weight"]
    assert torch.equal(up, given.repeat(2, 1))
    with pytest.raises(UserError, match=r"techniques\.widen: .* 64 units in `blocks\.0\.mlp`, this stage has 32"):
        run_of(recipe(Widen(at=(0.5,), shares=(0.25,))), source=source)


def test_settings() -> None:
    with pytest.raises(UserError, match="2 points need as many shares"):
        Widen(at=(0.1, 0.2))
    with pytest.raises(UserError, match="must grow"):
        Widen(at=(0.1, 0.2), shares=(0.5, 0.2))
    with pytest.raises(UserError, match="must grow"):
        Widen(shares=(0.0,))


def test_a_neutral_schedule_changes_nothing() -> None:
    base, tried = (train(recipe(*more), save=False) for more in ((), (Widen(at=(), shares=(), heads=True),)))
    assert_equal(flat(base.run.state()), flat(tried.run.state()))


def test_a_share_that_rounds_to_the_whole_is_refused() -> None:
    with pytest.raises(UserError, match="is the whole width"):
        run_of(recipe(example("widen", multiple=128, heads=False)))
    run_of(recipe(example("widen", multiple=128, heads=True)))
