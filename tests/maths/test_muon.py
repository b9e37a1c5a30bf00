"""Muon's equations."""

from __future__ import annotations

import pytest
import torch

from scrimp.groups import parts
from scrimp.registry import technique_class
from scrimp.techniques.optimizers.muon import COEFFICIENTS, Muon, MuonRule, orthogonal
from tiny import MODEL, example, recipe, run_of


@pytest.mark.parametrize("shape", [(8, 8), (4, 12), (12, 4)])
def test_singular_values_go_to_one_and_vectors_stay(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    made = orthogonal(matrix)
    values = s / s.norm()
    for _ in range(5):
        values = COEFFICIENTS[0] * values + COEFFICIENTS[1] * values**3 + COEFFICIENTS[2] * values**5
    assert torch.allclose(made, u @ values.diag() @ v, atol=1e-10)
    assert (torch.linalg.svdvals(made) > 0.6).all() and (torch.linalg.svdvals(made) < 1.3).all()


def test_fewer_iterations_leave_values_further_from_one() -> None:
    matrix = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    off = [float((torch.linalg.svdvals(orthogonal(matrix, steps=steps)) - 1).abs().max()) for steps in (1, 5)]
    assert off[0] > 0.5 > off[1]
    weights = [torch.nn.Parameter(torch.zeros(6, 9, dtype=torch.float64)) for _ in range(2)]
    for w, iterations in zip(weights, (5, 2), strict=True):
        w.grad = matrix.clone()
        MuonRule([w], lr=1.0, momentum=0.0, iterations=iterations).step()
        assert torch.allclose(w, -0.2 * 3 * orthogonal(matrix, torch.float64, iterations))


def test_one_step_by_hand() -> None:
    w = torch.nn.Parameter(torch.eye(2, dtype=torch.float64))
    w.grad = torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    rule = MuonRule([w], lr=0.1, momentum=0.9, weight_decay=0.5)
    rule.step()
    update = orthogonal(1.9 * w.grad)
    assert torch.allclose(rule.state[w]["momentum"], w.grad)
    assert torch.allclose(w, 0.95 * torch.eye(2, dtype=torch.float64) - 0.1 * 0.2 * 2**0.5 * update)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9")
def test_equals_torch() -> None:
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 96).view(8, 12)) for _ in range(2))
    a = MuonRule([ours], lr=1e-2, momentum=0.95, weight_decay=0.1, dtype=torch.bfloat16)
    b = torch.optim.Muon([theirs], lr=1e-2, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    draw = torch.Generator().manual_seed(1)
    for _ in range(4):
        grad = torch.randn(8, 12, generator=draw)
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        a.step()
        b.step()
    # The iteration is in bfloat16 there, and scales its input otherwise.
    assert torch.allclose(ours, theirs, atol=2e-3)


def test_hidden_matrices_only() -> None:
    run = run_of(recipe(example("muon"), model=MODEL | {"tied": False}))
    rule, adam = parts(run.optimizer)  # type: ignore[arg-type]
    names = {id(p): n for n, p in run.model.named_parameters()}
    hidden = {names[id(p)] for g in rule.param_groups for p in g["params"]}
    assert hidden == {n for n, p in run.model.named_parameters() if n.startswith("blocks") and p.ndim == 2}
    rest = {names[id(p)] for g in adam.param_groups for p in g["params"]}
    assert {"embed.weight", "head.weight", "positions.weight"} <= rest and not rest & hidden


def test_goes_with_another_rule() -> None:
    muon = technique_class("muon")
    assert muon is Muon
    made = recipe(Muon(params="blocks.*.weight"), technique_class("sgd")())
    assert len(parts(run_of(made).optimizer)) == 3  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="trains matrices"):
        MuonRule([torch.nn.Parameter(torch.zeros(3))])
