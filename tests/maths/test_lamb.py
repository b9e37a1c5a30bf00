"""LAMB, against its equations by hand and against torch's Adam inside it, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scrimp.chunks import CHUNK
from scrimp.errors import UserError
from scrimp.groups import Group
from scrimp.meter import LiveBytes
from scrimp.techniques.optimizers.lamb import LAMB, LAMBRule
from tiny import stand_in

W = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
"""Of norm 5."""
GRADS = [torch.tensor([g], dtype=torch.float64) for g in ([0.6, -0.8], [5.0, 12.0], [-8.0, 6.0])]


def trained(grads: list[Tensor] = GRADS, start: Tensor = W, **settings: Any) -> Tensor:
    """Weights after an update by each gradient."""
    w = nn.Parameter(start.clone())
    made = LAMB(**{"lr": 0.1, **settings}).optimizer(None, stand_in())([Group({"w": w}, 1.0, 1.0)])  # type: ignore[arg-type]
    for grad in grads:
        w.grad = grad.clone()
        made.step()
    return w.detach()


def by_hand(lr: float = 0.1, wd: float = 0.01, correct: bool = True, clamp: float = math.inf, cap: float = math.inf,
            clip: float = math.inf) -> Tensor:  # fmt: skip
    w, m, v = W.clone(), torch.zeros_like(W), torch.zeros_like(W)
    for t, g in enumerate(GRADS, 1):
        g = g * min(1.0, clip / float(g.norm()))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        mh, vh = (m / (1 - 0.9**t), v / (1 - 0.999**t)) if correct else (m, v)
        u = mh / (vh.sqrt() + 1e-6) + wd * w
        w = w - lr * min(min(float(w.norm()), clamp) / float(u.norm()), cap) * u
    return w


@pytest.mark.parametrize(
    ("settings", "hand"),
    [
        ({}, {}),
        ({"weight_decay": 0.5}, {"wd": 0.5}),
        ({"bias_correction": False}, {"correct": False}),
        ({"clamp": 2.0}, {"clamp": 2.0}),
        ({"trust_clip": True}, {"cap": 1.0}),
        ({"clip": 1.0}, {"clip": 1.0}),
    ],
    ids=["plain", "decay", "uncorrected", "clamp", "trust_clip", "clip"],
)
def test_three_steps_by_hand(settings: dict[str, Any], hand: dict[str, Any]) -> None:
    found = trained(**settings)
    assert torch.allclose(found, by_hand(**hand), rtol=0, atol=1e-14)
    assert settings == {} or not torch.allclose(found, by_hand(), rtol=0, atol=1e-4)


def test_every_matrix_moves_by_the_rate_of_its_norm() -> None:
    """||dw|| = lr ||w||, whatever the gradient and the decay."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(4, 5, dtype=torch.float64) * scale) for scale in (1e-3, 1.0, 50.0)]
    rule = LAMBRule(params, lr=0.03, weight_decay=0.7)
    for size in (1e-4, 1.0, 1e5):
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.randn_like(p) * size
        rule.step()
        for p, old in zip(params, before, strict=True):
            assert float((p.detach() - old).norm()) == pytest.approx(0.03 * float(old.norm()), rel=1e-12)


def test_inside_is_torchs_adam() -> None:
    """The update before its scaling is the step of Adam at a rate of 1, and vectors get it unscaled."""
    torch.manual_seed(0)
    w, b = (nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((4, 5), (6,)))
    shadow = [nn.Parameter(torch.zeros_like(p)) for p in (w, b)]
    adam = torch.optim.Adam(shadow, lr=1.0, betas=(0.9, 0.999), eps=1e-6)
    rule = LAMBRule([w, b], lr=0.02, weight_decay=0.1)
    for n in range(50):
        before, old = [p.detach().clone() for p in shadow], [p.detach().clone() for p in (w, b)]
        for p, s in zip((w, b), shadow, strict=True):
            # The matrix sits out every third step, and counts its own steps.
            p.grad = torch.randn_like(p) if p is b or n % 3 else None
            s.grad = None if p.grad is None else p.grad.clone()
        adam.step()
        rule.step()
        r, rb = (x - s.detach() for x, s in zip(before, shadow, strict=True))
        want = old[0] if w.grad is None else old[0] - 0.02 * old[0].norm() * (u := r + 0.1 * old[0]) / u.norm()
        assert torch.allclose(w, want, rtol=0, atol=1e-13)
        assert torch.allclose(b, old[1] - 0.02 * rb, rtol=0, atol=1e-13)


def test_zero_weights_get_adams_step() -> None:
    found = trained(GRADS[:1], torch.zeros_like(W), eps=0.0)
    assert torch.allclose(found, -0.1 * GRADS[0].sign(), rtol=0, atol=1e-14)


def test_nothing_moves_what_has_neither_gradient_nor_decay() -> None:
    assert torch.equal(trained([torch.zeros_like(W)], weight_decay=0.0), W)


def test_clipping_takes_all_gradients_together_and_leaves_them_as_they_are() -> None:
    a, b = nn.Parameter(torch.zeros(1, 1, dtype=torch.float64)), nn.Parameter(torch.zeros(1, dtype=torch.float64))
    rule = LAMBRule([{"params": [a]}, {"params": [b]}], clip=1.0)
    a.grad, b.grad = torch.full_like(a, 30.0), torch.full_like(b, 40.0)
    rule.step()
    assert float(a.grad) == 30.0
    assert float(rule.state[a]["exp_avg"]) == pytest.approx(0.1 * 0.6, rel=1e-12)
    assert float(rule.state[b]["exp_avg_sq"]) == pytest.approx(0.001 * 0.64, rel=1e-12)


@pytest.mark.parametrize("limit", [1, 6, 35])
def test_a_parameter_in_pieces_has_one_norm(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[list[Tensor]] = []
    for size in (limit, 1 << 30):
        monkeypatch.setitem(CHUNK, "cpu", size)
        torch.manual_seed(0)
        shapes = [(7, 5), (0, 3), (), (3,), (1, 40), (2, 3, 4)]
        params = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]
        params.append(nn.Parameter(torch.randn(6, 8, dtype=torch.float64).t()))
        rule = LAMBRule(params, weight_decay=0.1, clip=1.0)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn_like(p)
            rule.step()
        found.append([p.detach() for p in params])
    assert all(torch.allclose(a, b, rtol=0, atol=1e-14) for a, b in zip(*found, strict=True))


def test_the_transient_copy_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHUNK, "cpu", 1000)
    params = [nn.Parameter(torch.ones(500, 100)), *(nn.Parameter(torch.ones(300)) for _ in range(20))]
    rule = LAMBRule(params, weight_decay=0.1, clip=1.0)
    for p in params:
        p.grad = torch.ones_like(p)
    rule.step()
    meter = LiveBytes()
    meter.register([[p, p.grad, rule.state[p]["exp_avg"], rule.state[p]["exp_avg_sq"]] for p in params])
    steady = meter.live
    assert steady == 4 * 4 * sum(p.numel() for p in params)
    with meter:
        rule.step()
    assert 0 < meter.peak - steady <= 2 * 1000 * 4 + 3000


def test_a_closure_gives_loss_and_gradients_and_the_idle_are_left_alone() -> None:
    w, idle = nn.Parameter(torch.ones(1, 2)), nn.Parameter(torch.ones(1, 2))
    rule = LAMBRule([w, idle], weight_decay=1.0)

    def closure() -> float:
        rule.zero_grad()
        loss = (w**2).sum()
        loss.backward()
        return float(loss.detach())

    assert rule.step(closure) == 2.0
    assert torch.equal(idle, torch.ones(1, 2)) and idle not in rule.state


@pytest.mark.parametrize(
    "settings", [{"lr": -1.0}, {"weight_decay": -1.0}, {"betas": (0.9, 1.0)}, {"clamp": 0.0}, {"clip": float("nan")}]
)
def test_settings_without_meaning_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="must be"):
        LAMB(**settings)
    with pytest.raises(ValueError, match="must be"):
        LAMBRule([nn.Parameter(torch.ones(1))], **settings)
