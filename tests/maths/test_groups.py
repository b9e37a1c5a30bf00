"""Parameter groups: each parameter once, multipliers, and several update rules in one run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from scrimp.errors import UserError
from scrimp.groups import (
    Group,
    Multipliers,
    Several,
    assign,
    load_moments,
    moments,
    param_groups,
    partition,
    trainable,
)
from scrimp.models.seams import matching
from scrimp.run import Run
from scrimp.technique import Technique
from scrimp.techniques.optimizers.adamw import AdamW
from scrimp.techniques.optimizers.lion import Lion
from scrimp.techniques.optimizers.sgd import SGD
from scrimp.techniques.schedules.warmup_cosine import WarmupCosine
from scrimp.techniques.schedules.warmup_linear import WarmupLinear
from tiny import MODEL, assert_equal, flat, recipe, run_of, step


def named(*names: str, shape: tuple[int, ...] = (2, 2)) -> dict[str, nn.Parameter]:
    """Parameters of these names."""
    return {name: nn.Parameter(torch.ones(shape)) for name in names}


def rules(run: Run) -> dict[str, str]:
    """Parameter -> class of the rule that owns it."""
    assert isinstance(run.optimizer, Several)
    names = {id(p): n for n, p in run.model.named_parameters()}
    owned = [(names[id(p)], type(part).__name__) for part in run.optimizer.parts
             for group in part.param_groups for p in group["params"]]  # fmt: skip
    assert len(owned) == len(dict(owned))
    return dict(owned)


def lion_on_blocks(**settings: Any) -> tuple[Technique, ...]:
    """Lion on the blocks, AdamW on the rest."""
    return (
        Lion(lr=1e-3, weight_decay=0.5, params="blocks.*", **settings),
        AdamW(lr=1e-2),
    )


def test_multipliers_of_all_patterns_multiply_and_each_parameter_is_in_one_group() -> None:
    names = named("a.weight", "a.bias", "b.weight", "b.bias")
    table = {"*.bias": Multipliers(decay=0.0), "a.*": Multipliers(lr=0.5), "a.bias": Multipliers(lr=0.5, decay=3.0)}
    groups = assign(names, table)
    assert [list(g.params) for g in groups] == [["a.weight"], ["a.bias"], ["b.weight"], ["b.bias"]]
    assert [(g.lr, g.decay) for g in groups] == [(0.5, 1.0), (0.25, 0.0), (1.0, 1.0), (1.0, 0.0)]
    reverse = assign(names, dict(reversed(table.items())))
    assert [(list(g.params), g.lr, g.decay) for g in reverse] == [(list(g.params), g.lr, g.decay) for g in groups]


def test_parameters_of_equal_multipliers_share_a_group() -> None:
    groups = assign(named("a", "b", "c"), {"b": Multipliers(lr=2.0)})
    assert [list(g.params) for g in groups] == [["a", "c"], ["b"]]


def test_a_pattern_without_a_parameter_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"`blokcs\.0\.up` matches no trainable parameter.*Did you mean.*up"):
        assign(named("blocks.0.up", "blocks.1.up", "head"), {"blokcs.0.up": Multipliers()})
    with pytest.raises(UserError, match=r"^techniques.lion: `embde\.weight` matches no.*Did you mean embed\.weight"):
        run_of(recipe(Lion(params="embde.weight"), AdamW()))


def test_a_pattern_without_a_match_is_answered_with_whole_names() -> None:
    names = ["blocks.0.mlp.up", "blocks.0.mlp.down", "blocks.1.mlp.up", "head"]
    hints = {"upp": "Did you mean blocks.*.mlp.up?", "zzz": "Known: blocks.*.mlp.down, blocks.*.mlp.up, head."}
    for pattern, hint in hints.items():
        with pytest.raises(UserError) as error:
            matching(pattern, names, "linear layer")
        assert str(error.value) == f"`{pattern}` matches no linear layer. {hint}"
    with pytest.raises(UserError, match="matches no linear layer. The model has none"):
        matching("mlp.*", [], "linear layer")


def test_a_vector_takes_no_decay_from_a_matrix_of_a_similar_name() -> None:
    model = nn.Sequential(nn.LayerNorm(2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    decay = {n: g.decay for g in assign(trainable(model), {}) for n in g.params}
    assert {n for n, d in decay.items() if d} == {"1.0.weight", "1.1.weight"}


def test_groups_reach_the_rule_as_base_rate_and_decay() -> None:
    (group,) = param_groups([Group(named("a"), 0.5, 0.25), Group({}, 1.0, 1.0)], lr=0.1, weight_decay=0.4, more=1)
    assert (group["lr"], group["base_lr"], group["weight_decay"], group["more"]) == (0.05, 0.05, 0.1, 1)


def test_by_default_vectors_do_not_decay() -> None:
    run = run_of(recipe(AdamW(weight_decay=0.1)))
    assert run.optimizer is not None
    seen = [p for group in run.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in seen} == {id(p) for p in run.model.parameters()}
    assert len(seen) == len(set(map(id, seen)))
    for group in run.optimizer.param_groups:
        assert all((p.ndim < 2) == (group["weight_decay"] == 0) for p in group["params"])


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_counts_once(tied: bool) -> None:
    run = run_of(recipe(SGD(), model=MODEL | {"tied": tied}))
    assert run.optimizer is not None
    seen = [id(p) for group in run.optimizer.param_groups for p in group["params"]]
    embed, head = (run.model.get_submodule(name).get_parameter("weight") for name in ("embed", "head"))
    assert (embed is head) == tied
    assert seen.count(id(embed)) == seen.count(id(head)) == 1
    assert len(seen) == len(trainable(run.model))


def test_a_recipe_sets_multipliers_by_pattern() -> None:
    run = run_of(recipe(SGD(lr=0.1), groups={"embed.*": {"lr": 0.0}, "*up.weight": {"lr": 2.0}}))
    before = flat({"model": dict(run.model.named_parameters())})
    names = {id(p): n for n, p in run.model.named_parameters()}
    assert run.optimizer is not None
    rates = {names[id(p)]: g["base_lr"] for g in run.optimizer.param_groups for p in g["params"]}
    assert rates["embed.weight"] == 0.0
    assert rates["blocks.3.mlp.up.weight"] == 0.2
    assert rates["blocks.3.mlp.up.bias"] == 0.1
    step(run)
    after = flat({"model": dict(run.model.named_parameters())})
    assert torch.equal(before["model/embed.weight"], after["model/embed.weight"])
    assert not torch.equal(before["model/blocks.0.mlp.up.weight"], after["model/blocks.0.mlp.up.weight"])


def test_partition_gives_each_parameter_one_owner() -> None:
    names = named("blocks.0.up", "blocks.1.up", "embed", "norm")
    owned = partition(names, {"sgd": "*", "lion": "blocks.*", "lion.2": "embed"})
    assert {rule: list(params) for rule, params in owned.items()} == {
        "sgd": ["norm"],
        "lion": ["blocks.0.up", "blocks.1.up"],
        "lion.2": ["embed"],
    }
    assert partition(names, {"sgd": "*"}) == {"sgd": names}


def test_overlap_and_leftovers_are_refused() -> None:
    names = named("a.x", "a.y")
    with pytest.raises(UserError, match=r"techniques.adamw: `a\.x` is claimed by `lion` and by `adamw`.*disjoint"):
        partition(names, {"lion": "a.*", "adamw": "a.x"})
    with pytest.raises(UserError, match=r"no update rule takes `a\.y`.*`\*`"):
        partition(names, {"lion": "a.x"})
    with pytest.raises(UserError, match=r"techniques.sgd: the other update rules leave `sgd` no parameter"):
        partition(names, {"lion": "a.*", "sgd": "*"})
    with pytest.raises(UserError, match=r"techniques.sgd: `b\.\*` matches no trainable parameter"):
        partition(names, {"lion": "*", "sgd": "b.*"})


def test_two_rules_own_what_their_patterns_say() -> None:
    run = run_of(recipe(*lion_on_blocks()))
    owners = rules(run)
    assert owners.keys() == trainable(run.model).keys()
    assert all((kind == "LionRule") == name.startswith("blocks.") for name, kind in owners.items())
    step(run)
    state = run.state()
    blocks = {n for n in owners if n.startswith("blocks.")}
    assert set(state["optimizer.exp_avg"]) == set(owners)
    assert set(state["optimizer.exp_avg_sq"]) == set(state["optimizer.step"]) == set(owners) - blocks


def test_two_rules_train_as_each_would_on_its_share() -> None:
    run = run_of(recipe(*lion_on_blocks(), dtype="float64"))
    whole = {n: nn.Parameter(p.detach().clone()) for n, p in trainable(run.model).items()}
    shares = [{n: p for n, p in whole.items() if n.startswith("blocks.") == inside} for inside in (True, False)]
    alone: list[Optimizer] = []
    for rule, share in zip(lion_on_blocks(), shares, strict=True):
        alone.append(rule.optimizer(None, run)(assign(share, {})))  # type: ignore[arg-type]
    assert run.backward and run.step and run.optimizer
    for n in range(3):
        batch = run.batch(n)
        run.backward(batch, run.task.count(batch))
        for name, p in trainable(run.model).items():
            whole[name].grad = None if p.grad is None else p.grad.clone()
        run.step()
        for optimizer in alone:
            optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
    assert_equal(flat({"m": trainable(run.model)}), flat({"m": whole}))


@pytest.mark.parametrize("kinds", ["lion and adamw", "lion twice"])
def test_two_rules_resume_exactly(kinds: str) -> None:
    techniques = lion_on_blocks()
    if kinds == "lion twice":
        techniques = (techniques[0], Lion(lr=1e-4, betas=(0.95, 0.98)))
    made = recipe(*techniques, WarmupCosine())
    run = run_of(made)
    for _ in range(3):
        step(run)
    state = {kind: {n: t.detach().clone() for n, t in ts.items()} for kind, ts in run.state().items()}
    again = run_of(made, last=state)
    again.clock.step, again.clock.sample, again.clock.tok = run.clock.step, run.clock.sample, run.clock.tok
    assert_equal(flat(run.state()), flat(again.state()))
    for _ in range(2):
        step(run)
        step(again)
    assert_equal(flat(run.state()), flat(again.state()))


def test_the_schedule_moves_the_rates_of_all_rules() -> None:
    run = run_of(recipe(*lion_on_blocks(), WarmupLinear(warmup="4 step")))
    assert run.optimizer is not None
    assert run.set_lr() == pytest.approx(1e-2 / 4)
    rates = {type(part).__name__: {g["lr"] for g in part.param_groups} for part in run.optimizer.parts}  # type: ignore[attr-defined]
    assert rates == {"LionRule": {1e-3 / 4}, "AdamW": {1e-2 / 4}}


def test_moments_are_exactly_what_the_rules_keep() -> None:
    params = named("a", "b")
    several = Several([torch.optim.SGD([params["a"]], lr=0.1, momentum=0.9), torch.optim.SGD([params["b"]], lr=0.1)])
    assert moments(several, params) == {}
    for p in params.values():
        p.grad = torch.full_like(p, 2.0)
    several.step()
    several.zero_grad()
    assert all(p.grad is None for p in params.values())
    kept = moments(several, params)
    assert {kind: set(found) for kind, found in kept.items() if found} == {"optimizer.momentum_buffer": {"a"}}
    fresh = named("a", "b")
    other = Several([torch.optim.SGD([fresh["a"]], lr=0.1, momentum=0.9), torch.optim.SGD([fresh["b"]], lr=0.1)])
    load_moments(other, fresh, kept)
    loaded: Tensor = other.parts[0].state[fresh["a"]]["momentum_buffer"]
    assert torch.equal(loaded, torch.full((2, 2), 2.0))
    assert loaded is not kept["optimizer.momentum_buffer"]["a"]
    assert fresh["b"] not in other.parts[0].state


def test_a_moment_of_nobody_is_refused() -> None:
    params = named("a")
    sgd = torch.optim.SGD(params.values(), lr=0.1, momentum=0.9)
    with pytest.raises(UserError, match=r"has `optimizer.momentum_buffer` of `b`, which is not trained here"):
        load_moments(sgd, params | named("b"), {"optimizer.momentum_buffer": {"b": torch.ones(2, 2)}})
    sgd.state[params["a"]]["count"] = 3
    with pytest.raises(TypeError, match="SGD keeps a int called `count`"):
        moments(sgd, params)


def test_a_parameter_in_two_rules_is_refused() -> None:
    (p,) = named("a").values()
    with pytest.raises(ValueError, match="more than one parameter group"):
        Several([torch.optim.SGD([p], lr=0.1), torch.optim.SGD([p], lr=0.1)])


def test_a_closure_is_called_once_with_gradients() -> None:
    (p,) = named("a").values()
    calls: list[float] = []

    def closure() -> float:
        loss = (p**2).sum()
        loss.backward()
        calls.append(float(loss.detach()))
        return calls[-1]

    assert Several([torch.optim.SGD([p], lr=0.1)]).step(closure) == 4.0
    assert calls == [4.0]
    assert torch.allclose(p, torch.full((2, 2), 0.8))
