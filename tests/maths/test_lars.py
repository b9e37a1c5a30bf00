"""LARS, against its equations by hand, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scrimp.chunks import CHUNK
from scrimp.errors import UserError
from scrimp.groups import Group
from scrimp.meter import LiveBytes
from scrimp.techniques.optimizers.lars import LARS, LARSRule

W = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
"""Of norm 5."""
GRADS = [torch.tensor([g], dtype=torch.float64) for g in ([0.6, -0.8], [5.0, 12.0], [-8.0, 6.0])]
"""Of norms 1, 13 and 10."""


def trained(rates: tuple[float, ...] = (2.0, 2.0, 2.0), factor: float = 1.0, **settings: Any) -> Tensor:
    """W after an update by each gradient, with a rate of its own."""
    w = nn.Parameter(W.clone())
    optimizer = LARS(**{"lr": 2.0, **settings}).optimizer(None, None)([Group({"w": w}, 1.0, 1.0)])  # type: ignore[arg-type]
    for lr, grad in zip(rates, GRADS, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        w.grad = grad * factor
        optimizer.step()
    return w.detach()


def by_hand(rates: tuple[float, ...], beta: float, nesterov: bool = False, clip: bool = False) -> Tensor:
    w, v = W.clone(), torch.zeros_like(W)
    for lr, g in zip(rates, GRADS, strict=True):
        lam = 0.01 * w.norm() / (g.norm() + beta * w.norm() + 1e-8)
        lam = min(lam / lr, torch.tensor(1.0)) if clip else lam
        u = lam * (g + beta * w)
        v = 0.9 * v + lr * u
        w = w - (0.9 * v + lr * u if nesterov else v)
    return w


def test_the_first_step_has_the_length_of_the_rate() -> None:
    """eta ||w|| / ||g|| g, of length eta ||w||: 2 * 0.01 * 5 along (0.6, -0.8)."""
    w = nn.Parameter(W.clone())
    w.grad = GRADS[0] * 1e6
    LARSRule([w], lr=2.0, eta=0.01, eps=0.0).step()
    assert torch.allclose(w, torch.tensor([[3.0 - 0.06, 4.0 + 0.08]], dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("rates", [(2.0, 2.0, 2.0), (1.0, 0.3, 4.0)])
@pytest.mark.parametrize("more", [{}, {"nesterov": True}, {"trust_clip": True}], ids=["plain", "nesterov", "clipped"])
def test_the_rate_is_inside_the_momentum(rates: tuple[float, ...], more: dict[str, bool]) -> None:
    found = trained(rates, eta=0.01, weight_decay=0.1, **more)
    want = by_hand(rates, 0.1, more.get("nesterov", False), more.get("trust_clip", False))
    assert torch.allclose(found, want, rtol=0, atol=1e-14)


def test_the_size_of_the_loss_cancels() -> None:
    plain, large = trained(weight_decay=0.0, eps=0.0), trained(weight_decay=0.0, eps=0.0, factor=1000.0)
    assert torch.allclose(plain, large, rtol=1e-14, atol=0)
    assert float((plain - W).abs().max()) > 1e-3


def test_clipped_it_never_steps_beyond_plain_momentum() -> None:
    """lam / lr = 10 * 5 / (1 * 2) is more than 1, so that the step is lr g."""
    w = nn.Parameter(W.clone())
    w.grad = GRADS[0].clone()
    LARSRule([w], lr=2.0, eta=10.0, eps=0.0, trust_clip=True).step()
    assert torch.allclose(w, W - 2.0 * GRADS[0], rtol=0, atol=1e-14)


def test_vectors_are_neither_adapted_nor_decayed() -> None:
    bias, scalar = nn.Parameter(W[0].clone()), nn.Parameter(W.new_tensor(2.0))
    rule = LARSRule([bias, scalar], lr=0.5, weight_decay=0.3)
    for _ in range(2):
        bias.grad, scalar.grad = GRADS[0][0].clone(), W.new_tensor(1.0)
        rule.step()
    assert torch.allclose(bias, W[0] - 0.5 * (1 + 1.9) * GRADS[0][0], rtol=0, atol=1e-14)
    assert float(scalar.detach()) == pytest.approx(2.0 - 0.5 * 2.9, abs=1e-14)


@pytest.mark.parametrize("trust_clip", [False, True])
def test_without_weights_or_without_a_gradient_nothing_is_scaled(trust_clip: bool) -> None:
    zero, still = nn.Parameter(torch.zeros_like(W)), nn.Parameter(W.clone())
    rule = LARSRule([zero, still], lr=0.5, weight_decay=0.1, eps=0.0, trust_clip=trust_clip)
    zero.grad, still.grad = GRADS[0].clone(), torch.zeros_like(W)
    rule.step()
    assert torch.allclose(zero, -0.5 * GRADS[0], rtol=0, atol=1e-15)
    assert torch.allclose(still, W - 0.5 * 0.1 * W, rtol=0, atol=1e-15)


@pytest.mark.parametrize("limit", [1, 6, 35])
def test_the_size_of_a_chunk_changes_no_bit(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[list[Tensor]] = []
    for size in (limit, 1 << 30):
        monkeypatch.setitem(CHUNK, "cpu", size)
        torch.manual_seed(0)
        shapes = [(7, 5), (0, 3), (), (3,), (1, 40), (2, 3, 4)]
        params = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]
        params.append(nn.Parameter(torch.randn(6, 8, dtype=torch.float64).t()))
        rule = LARSRule(params, weight_decay=0.1)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn_like(p)
            rule.step()
        found.append([p.detach() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_transient_copy_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHUNK, "cpu", 1000)
    params = [nn.Parameter(torch.ones(500, 100)), *(nn.Parameter(torch.ones(300)) for _ in range(20))]
    rule = LARSRule(params, weight_decay=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    rule.step()
    meter = LiveBytes()
    meter.register([[p, p.grad, rule.state[p]["momentum_buffer"]] for p in params])
    steady = meter.live
    assert steady == 3 * 4 * sum(p.numel() for p in params)
    with meter:
        rule.step()
    assert 0 < meter.peak - steady <= 1000 * 4 + 200


def test_a_closure_gives_loss_and_gradients_and_the_idle_are_left_alone() -> None:
    w, idle = nn.Parameter(torch.ones(1, 2)), nn.Parameter(torch.ones(1, 2))
    rule = LARSRule([w, idle], weight_decay=1.0)

    def closure() -> float:
        rule.zero_grad()
        loss = (w**2).sum()
        loss.backward()
        return float(loss.detach())

    assert rule.step(closure) == 2.0
    assert torch.equal(idle, torch.ones(1, 2)) and idle not in rule.state
    assert not torch.equal(w, torch.ones(1, 2))


@pytest.mark.parametrize(
    "settings", [{"lr": -1.0}, {"weight_decay": -1.0}, {"momentum": 1.0}, {"eta": 0.0}, {"eps": float("nan")}]
)
def test_settings_without_meaning_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="must be"):
        LARS(**settings)
    with pytest.raises(ValueError, match="must be"):
        LARSRule([nn.Parameter(torch.ones(1))], **settings)
