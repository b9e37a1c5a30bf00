"""The update rules' equations, in float64, against hand-written steps."""

from __future__ import annotations

import math

import pytest
import torch

from scrimp.errors import UserError
from scrimp.groups import Multipliers, Several, assign, partition
from scrimp.registry import technique_class
from scrimp.techniques.optimizers.lion import LionRule
from scrimp.training import train
from tiny import assert_equal, example, flat, recipe, run_of, step

GRADS = [torch.tensor([0.5, -2.0, 0.0], dtype=torch.float64), torch.tensor([-1.0, -1.0, 3.0], dtype=torch.float64)]


def steps(name: str, **settings: object) -> torch.Tensor:
    """Two updates of w = (1, 2, 3) by a technique's rule."""
    from scrimp.groups import Group

    w = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    technique = technique_class(name)(**settings)
    make = technique.optimizer(None, None)  # type: ignore[arg-type]
    optimizer = make([Group({"w": w}, 1.0, 1.0)])
    for grad in GRADS:
        w.grad = grad.clone()
        optimizer.step()
    return w.detach()


def test_sgd_has_no_damping_in_its_first_step() -> None:
    w, v = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for g in GRADS:
        v = 0.9 * v + g + 0.01 * w
        w = w - 0.1 * v
    assert torch.allclose(steps("sgd", lr=0.1, momentum=0.9, weight_decay=0.01), w, atol=1e-15)


def test_nesterov_looks_ahead() -> None:
    w, v = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for g in GRADS:
        v = 0.9 * v + g
        w = w - 0.1 * (g + 0.9 * v)
    assert torch.allclose(steps("sgd", lr=0.1, nesterov=True), w, atol=1e-15)


@pytest.mark.parametrize(("name", "decoupled"), [("adam", False), ("adamw", True)])
def test_adam_with_decay_inside_or_outside(name: str, decoupled: bool) -> None:
    w = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    m, v, lr, wd, eps = torch.zeros_like(w), torch.zeros_like(w), 0.01, 0.1, 1e-8
    for t, raw in enumerate(GRADS, 1):
        g = raw if decoupled else raw + wd * w
        w = w * (1 - lr * wd) if decoupled else w
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        w = w - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + eps)
    got = steps(name, lr=lr, betas=(0.9, 0.95), weight_decay=wd)
    assert torch.allclose(got, w, atol=1e-14)


def test_adamw_decays_without_gradient_by_the_closed_form() -> None:
    w = torch.nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64))
    from scrimp.groups import Group

    optimizer = technique_class("adamw")(lr=0.01, weight_decay=0.5).optimizer(None, None)([Group({"w": w}, 1.0, 1.0)])  # type: ignore[arg-type]
    for _ in range(7):
        w.grad = torch.zeros_like(w)
        optimizer.step()
    assert torch.allclose(w, torch.full_like(w, 2.0 * (1 - 0.005) ** 7), atol=1e-15)


def test_lion_uses_one_beta_for_the_update_and_another_for_the_state() -> None:
    w = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    m = torch.zeros_like(w)
    for g in GRADS:
        c = 0.9 * m + 0.1 * g
        w = w - 0.01 * (c.sign() + 0.1 * w)
        m = 0.99 * m + 0.01 * g
    assert torch.allclose(steps("lion", lr=0.01, weight_decay=0.1), w, atol=1e-15)


def test_lion_moves_every_weight_by_lr_and_keeps_one_state() -> None:
    w = torch.nn.Parameter(torch.randn(50, dtype=torch.float64))
    before = w.detach().clone()
    rule = LionRule([w], lr=0.125)
    w.grad = torch.randn_like(w)
    rule.step()
    assert torch.allclose((w - before).abs(), torch.full_like(before, 0.125))
    assert sum(s.numel() for s in rule.state[w].values()) == w.numel()


def test_lion_takes_a_closure_and_skips_what_has_no_gradient() -> None:
    w, idle = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    rule = LionRule([w, idle], lr=0.1)

    def closure() -> float:
        rule.zero_grad()
        loss = (w**2).sum()
        loss.backward()
        return float(loss.detach())

    assert rule.step(closure) == 2.0
    assert torch.equal(idle, torch.ones(2))
    assert idle not in rule.state


def test_ema_is_the_average_of_the_updates() -> None:
    run = run_of(recipe(example("ema", decay=0.9), dtype="float64"))
    name = "blocks.0.mlp.up.weight"
    w = run.model.get_parameter(name)
    average = w.detach().clone()
    for t in range(1, 6):
        step(run)
        decay = min(0.9, (1 + t) / (10 + t))
        average = decay * average + (1 - decay) * w.detach()
    memory = run.memories["ema"]
    assert torch.allclose(memory[name], average, atol=1e-15)
    last = w.detach().clone()
    assert run.evaluate is not None
    assert torch.equal(run.evaluate(lambda model: model.get_parameter(name).detach().clone()), memory[name])
    assert torch.equal(w, last)


def test_several_rules_own_disjoint_parameters_and_resume() -> None:
    rules = (technique_class("lion")(lr=1e-3, params="blocks.*"), technique_class("adamw")(lr=1e-2))
    made = recipe(*rules)
    run = run_of(made)
    assert isinstance(run.optimizer, Several)
    kinds = [type(part).__name__ for part in run.optimizer.parts]
    assert sorted(kinds) == ["AdamW", "LionRule"]
    owned = [id(p) for part in run.optimizer.parts for g in part.param_groups for p in g["params"]]
    assert len(owned) == len(set(owned)) == len(list(run.model.parameters()))
    for _ in range(3):
        step(run)
    state = {kind: {n: t.detach().clone() for n, t in ts.items()} for kind, ts in run.state().items()}
    again = run_of(made, last=state)
    again.clock.step = 3
    step(run)
    step(again)
    assert_equal(flat(run.state()), flat(again.state()))


def test_overlapping_patterns_are_refused() -> None:
    names = {"a.x": torch.nn.Parameter(torch.ones(1)), "a.y": torch.nn.Parameter(torch.ones(1))}
    with pytest.raises(UserError, match=r"`a\.x` is claimed by `lion` and by `adamw`"):
        partition(names, {"lion": "a.*", "adamw": "a.x"})
    with pytest.raises(UserError, match=r"no update rule takes `a\.y`"):
        partition(names, {"lion": "a.x"})


def test_groups_multiply_and_cover_each_parameter_once() -> None:
    names = {n: torch.nn.Parameter(torch.ones(1)) for n in ("a.weight", "a.bias", "b.weight")}
    table = {"*.bias": Multipliers(decay=0.0), "a.*": Multipliers(lr=0.5)}
    groups = {n: (g.lr, g.decay) for g in assign(names, table) for n in g.params}
    assert groups == {"a.weight": (0.5, 1.0), "a.bias": (0.5, 0.0), "b.weight": (1.0, 1.0)}
    with pytest.raises(UserError, match=r"`c\.\*` matches no trainable parameter"):
        assign(names, {"c.*": Multipliers()})


def test_vectors_have_no_decay_and_a_tied_head_is_one_parameter() -> None:
    run = run_of(recipe(technique_class("adamw")(weight_decay=0.1)))
    assert run.optimizer is not None
    for group in run.optimizer.param_groups:
        assert all((p.ndim < 2) == (group["weight_decay"] == 0) for p in group["params"])
    assert run.model.head.weight is run.model.embed.weight


def test_a_recipe_may_set_multipliers_by_pattern() -> None:
    rule = technique_class("sgd")(lr=0.1)
    result = train(recipe(rule, groups={"embed.*": {"lr": 0.0}}), save=False)
    fresh = run_of(recipe(rule))
    assert torch.equal(result.run.model.embed.weight, fresh.model.embed.weight)
    assert not torch.equal(result.run.model.head.get_parameter("weight"), torch.zeros(1))
    assert math.isfinite(result.validation["loss"])
