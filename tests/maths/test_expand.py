"""Linear overparameterization: it begins as the plain model, moves as Arora et al. say, and multiplies out exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from scrimp.arrange import clash
from scrimp.errors import UserError
from scrimp.models.seams import Linear
from scrimp.run import Run, exported
from scrimp.techniques.overparameterization.expand import Expand, Factors
from tiny import example, recipe, run_of, step

FORMS = [(2, 1.0), (2, 1.5), (3, 1.0), (3, 2.0)]


def outputs(run: Run) -> Tensor:
    assert run.evaluate
    tokens = run.batch(0)["tokens"][:, :-1]
    return run.evaluate(lambda model: model(tokens))


@pytest.mark.parametrize(("depth", "ratio"), FORMS)
def test_it_begins_as_the_plain_model_to_the_last_bit(depth: Any, ratio: float) -> None:
    plain, run = run_of(recipe()), run_of(recipe(Expand(depth=depth, ratio=ratio)))
    assert torch.equal(outputs(plain), outputs(run))
    named, same = exported(plain), exported(run)
    assert named.keys() == same.keys()
    assert all(torch.equal(named[n], same[n]) for n in named)
    given = {n: t + 0.25 for n, t in named.items()}
    from_weights = run_of(recipe(Expand(depth=depth, ratio=ratio)), source={"model": given})
    assert torch.equal(exported(from_weights)["blocks.1.mlp.up.weight"], given["blocks.1.mlp.up.weight"])


@pytest.mark.parametrize(("depth", "ratio"), FORMS)
@pytest.mark.parametrize(("dtype", "near"), [("float64", 1e-12), ("float32", 1e-5)])
def test_what_is_exported_computes_the_same(depth: Any, ratio: float, dtype: str, near: float) -> None:
    run = run_of(recipe(example("adamw", lr=0.01), Expand(depth=depth, ratio=ratio), dtype=dtype))
    first = outputs(run)
    for _ in range(4):
        step(run)
    plain = run_of(recipe(dtype=dtype))
    plain.model.load_state_dict(exported(run), strict=False)
    assert (outputs(plain) - outputs(run)).abs().max() < near
    assert (outputs(run) - first).abs().max() > 1e-3
    factors = run.model.get_submodule("blocks.0.mlp.up.expand")
    moved = {n for n, p in factors.named_parameters() if not bool(((p == 0) | (p == 1)).all())}
    assert moved == {n for n, _ in factors.named_parameters()}


def test_the_shapes_of_the_factors() -> None:
    def shapes(outputs: int, inputs: int, depth: int, ratio: float) -> dict[str, tuple[int, ...]]:
        return {n: tuple(p.shape) for n, p in Factors(Linear(inputs, outputs), depth, ratio).named_parameters()}

    assert shapes(8, 2, 2, 1.0) == {"right": (2, 2)}
    assert shapes(2, 8, 2, 1.0) == {"left": (2, 2)}
    assert shapes(8, 2, 2, 3.0) == {"right": (6, 2), "columns": (8, 4)}
    assert shapes(2, 8, 2, 3.0) == {"left": (2, 6), "rows": (4, 8)}
    # The middle factor of three is [4 outputs, 4 inputs], as in ExpandNets; W is its corner.
    assert shapes(2, 8, 3, 4.0) == {"left": (2, 8), "right": (32, 8), "columns": (2, 24), "rows": (6, 32)}


def test_a_product_written_out() -> None:
    layer = Linear(1, 2, bias=True)
    layer.on("weight", "expand", "expand", factors := Factors(layer, 2, 2.0))
    given = {"weight": [[2.0], [3.0]], "bias": [10.0, 20.0]}
    parts = {"columns": [[5.0], [7.0]], "right": [[0.5], [2.0]]}
    layer.load_state_dict({n: torch.tensor(v) for n, v in given.items()} | {
        f"expand.{n}": torch.tensor(v) for n, v in parts.items()})  # fmt: skip
    # 2 * .5 + 5 * 2 = 11, 3 * .5 + 7 * 2 = 15.5
    assert factors(layer.weight).tolist() == [[11.0], [15.5]]
    assert layer(torch.tensor([2.0])).tolist() == [32.0, 51.0]


def balanced(depth: int) -> tuple[Linear, Factors]:
    """A layer of 5 to 5 whose factors are balanced: W = U S V^T as U S^(1/N) U^T, U S^(1/N) V^T, V S^(1/N) V^T."""
    chance = torch.Generator().manual_seed(1)
    u, s, vh = torch.linalg.svd(torch.randn(5, 5, generator=chance, dtype=torch.float64))
    layer = Linear(5, 5, bias=False).double()
    factors = Factors(layer, depth, 1.0)
    root = torch.diag(s ** (1 / depth))
    with torch.no_grad():
        layer.weight.copy_(u @ root @ vh)
        assert factors.left is not None
        factors.left.copy_(u @ root @ u.T)
        if factors.right is not None:
            factors.right.copy_(vh.T @ root @ vh)
    return layer, factors


def power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.clamp_min(0) ** exponent) @ vectors.T


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize(("eta", "near"), [(1e-4, 3e-3), (1e-5, 3e-4)])
def test_the_product_of_balanced_factors_moves_by_the_rule_of_arora(depth: int, eta: float, near: float) -> None:
    layer, factors = balanced(depth)
    chance = torch.Generator().manual_seed(2)
    x, y = (torch.randn(16, 5, generator=chance, dtype=torch.float64) for _ in range(2))
    whole = factors(layer.weight)
    whole.retain_grad()
    ((x @ whole.T - y) ** 2).sum().div(16).backward()
    before, gradient = whole.detach(), whole.grad
    assert gradient is not None
    with torch.no_grad():
        for p in (layer.weight, *factors.parameters()):
            assert p.grad is not None
            p -= eta * p.grad
        moved = factors(layer.weight) - before
    n = depth
    terms = [power(before @ before.T, (n - j) / n) @ gradient @ power(before.T @ before, (j - 1) / n)
             for j in range(1, n + 1)]  # fmt: skip
    rule = -eta * torch.stack(terms).sum(0)
    error = float((moved - rule).norm() / rule.norm())
    assert error < near
    assert float((moved + eta * gradient).norm() / rule.norm()) > 0.1, "plain descent moves elsewhere"


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_the_first_step_from_the_identity_is_that_of_the_docstring(shape: tuple[int, int]) -> None:
    outputs, inputs = shape
    layer = Linear(inputs, outputs, bias=False).double()
    torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(3))
    factors, eta = Factors(layer, 2, 1.0), 1e-6
    with torch.no_grad():
        for p in factors.parameters():
            p.copy_(torch.eye(*p.shape))
    whole = factors(layer.weight)
    whole.retain_grad()
    whole.tanh().square().sum().backward()
    w, gradient = layer.weight.detach().clone(), whole.grad
    assert gradient is not None
    with torch.no_grad():
        for p in (layer.weight, *factors.parameters()):
            p -= eta * p.grad  # type: ignore[operator]
        moved = factors(layer.weight) - w
    more = gradient @ w.T @ w if outputs <= inputs else w @ w.T @ gradient
    torch.testing.assert_close(moved, -eta * (gradient + more), rtol=1e-4, atol=1e-12)


def test_factors_that_are_added_do_not_decay() -> None:
    run = run_of(recipe(example("adamw", weight_decay=0.1), Expand()))
    assert run.optimizer
    decays = {id(p): g["weight_decay"] for g in run.optimizer.param_groups for p in g["params"]}
    of = {name: decays[id(p)] for name, p in run.model.named_parameters()}
    assert of["blocks.0.mlp.up.expand.right"] == 0.0
    assert of["blocks.0.mlp.up.weight"] == 0.1
    assert {of[n] for n in of if ".expand." in n} == {0.0}


def test_two_with_disjoint_targets_go_together() -> None:
    run = run_of(recipe(Expand(targets="mlp.*", depth=3), Expand(targets="attention.qkv", ratio=2.0)))
    added = {n.split(".", 2)[2] for n, _ in run.model.named_parameters() if ".expand." in n}
    assert {"attention.qkv.expand.right", "attention.qkv.expand.columns", "mlp.down.expand.left"} <= added
    assert not [n for n in exported(run) if "expand" in n]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="at least 1"):
        Expand(ratio=0.5)
    with pytest.raises(UserError, match="shared with another layer"):
        run_of(recipe(Expand(targets="head")))
    assert "not to a factor" in clash(Expand(), example("early_bird"))
    assert "frozen too" in clash(Expand(), example("lora"))
