"""SSF: both sides of its equation, gradients, an exact merge, and what a block keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import scrimp
from scrimp.errors import UserError
from scrimp.techniques.tuning.lora import LoRA
from scrimp.techniques.tuning.ssf import SSF
from tiny import step
from tiny_tuning import SMALL, kept_more, made, merge_error, outputs, shaken


def test_outputs_and_gradients_by_the_equation() -> None:
    torch.manual_seed(0)
    layer: Any = nn.Sequential(nn.Linear(5, 3)).double()
    weight, bias = (p.detach().clone() for p in layer[0].parameters())
    tuned: Any = scrimp.apply(layer, [SSF(targets="0")])
    shaken(tuned)
    gamma, beta = tuned[0].ssf_scale.gamma, tuned[0].ssf_shift.beta
    x, upstream = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    y = tuned(x)
    y.backward(upstream)
    plain = x @ weight.T + bias
    torch.testing.assert_close(y, gamma * plain + beta, rtol=0, atol=1e-13)
    torch.testing.assert_close(gamma.grad, (upstream * plain).sum(0), rtol=0, atol=1e-13)
    torch.testing.assert_close(beta.grad, upstream.sum(0), rtol=0, atol=1e-13)
    assert tuned[0].weight.grad is None


def test_norms_are_scaled_and_shifted() -> None:
    run = made(SSF())
    shaken(run.model)
    norm = run.model.blocks[0].mlp_norm
    x = torch.randn(3, 16, dtype=torch.float64)
    plain = F.layer_norm(x, (16,), norm.weight, norm.bias, norm.eps)
    wanted = norm.ssf_scale.gamma * plain + norm.ssf_shift.beta
    torch.testing.assert_close(norm(x), wanted, rtol=0, atol=1e-13)


def test_first_values() -> None:
    assert torch.equal(outputs(made(SSF(std=0.0))), outputs(made()))
    gamma = made(SSF(std=0.05)).model.blocks[0].mlp.up.ssf_scale.gamma
    assert 0.02 < float(gamma.detach().std()) < 0.08
    assert float(gamma.detach().mean()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(("dtype", "far"), [("float64", 1e-12), ("float32", 1e-5)])
@pytest.mark.parametrize("model", [SMALL, {**SMALL, "bias": False, "norm": "rmsnorm"}], ids=["biases", "none"])
def test_the_merge_is_exact(dtype: str, far: float, model: dict[str, Any]) -> None:
    run = made(SSF(), dtype=dtype, model=model)
    shaken(run.model)
    assert merge_error(run, dtype=dtype, model=model) < far


def test_only_its_vectors_move_and_it_merges_with_lora() -> None:
    run = made(
        SSF(), LoRA(rank=2, magnitude=True), LoRA(rank=2, targets="patches|head"), model={**SMALL, "tied": False}
    )
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    for _ in range(3):
        step(run)
    moved = {n for n, p in run.model.named_parameters() if not torch.equal(before[n], p)}
    assert moved == {n for n in before if ".ssf_" in n or ".lora." in n}
    shaken(run.model)
    assert merge_error(run, model={**SMALL, "tied": False}) < 1e-12


def test_a_block_keeps_what_full_tuning_does_and_a_copy_of_the_weights() -> None:
    unit = 64 * 32
    copies = 12 * 32**2 / unit
    small = 3 * 32 / unit * 2  # scaled norms' weights and biases, and their like
    assert 6 + copies <= kept_more(SSF(targets="blocks.*")) <= 6 + copies + small


def test_a_shared_weight_is_refused() -> None:
    with pytest.raises(UserError, match="the weight of `head` is shared"):
        made(SSF(targets="head"))
