"""Lion's equations, and what a plain optimizer owes to any loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scrimp.chunks import CHUNK
from scrimp.errors import UserError
from scrimp.groups import Group
from scrimp.meter import LiveBytes
from scrimp.techniques.optimizers.lion import Lion, LionRule

W = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
GRADS = [torch.tensor(g, dtype=torch.float64) for g in ([0.5, -2.0, 0.0], [-4.0, 1.0, 3.0], [0.25, 4.0, -1.0])]


def by_hand(lr: float, wd: float, b1: float, b2: float) -> tuple[Tensor, Tensor]:
    """Weights and momentum after three updates, by the paper's equations."""
    w, m = W.clone(), torch.zeros_like(W)
    for g in GRADS:
        c = b1 * m + (1 - b1) * g
        w = w - lr * (c.sign() + wd * w)
        m = b2 * m + (1 - b2) * g
    return w, m


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.95, 0.98), (0.2, 0.7)])
def test_one_beta_for_the_update_and_another_for_the_state(betas: tuple[float, float]) -> None:
    w = nn.Parameter(W.clone())
    technique = Lion(lr=0.01, weight_decay=0.5, betas=betas)
    optimizer = technique.optimizer(None, None)([Group({"w": w}, 1.0, 1.0)])  # type: ignore[arg-type]
    for g in GRADS:
        w.grad = g.clone()
        optimizer.step()
    want, momentum = by_hand(0.01, 0.5, *betas)
    assert torch.allclose(w, want, rtol=0, atol=1e-15)
    assert torch.allclose(optimizer.state[w]["exp_avg"], momentum, rtol=0, atol=1e-15)


def test_every_weight_moves_by_the_rate_and_one_without_gradient_only_decays() -> None:
    w = nn.Parameter(W.clone())
    w.grad = torch.tensor([1e-9, -1e9, 0.0], dtype=torch.float64)
    LionRule([w], lr=0.125, weight_decay=0.5).step()
    want = W * (1 - 0.0625) - torch.tensor([0.125, -0.125, 0.0], dtype=torch.float64)
    assert torch.allclose(w, want, rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_state_is_one_tensor_a_weight_of_its_type(dtype: torch.dtype) -> None:
    w = nn.Parameter(torch.ones(4, 5, dtype=dtype))
    rule = LionRule([w], lr=0.25)
    assert w not in rule.state
    w.grad = torch.full_like(w, -3.0)
    rule.step()
    assert list(rule.state[w]) == ["exp_avg"]
    assert rule.state[w]["exp_avg"].dtype == dtype
    assert rule.state[w]["exp_avg"].shape == w.shape
    assert torch.equal(w.detach(), torch.full_like(w, 1.25))


def test_a_closure_gives_loss_and_gradients_and_the_idle_are_left_alone() -> None:
    w, idle = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    rule = LionRule([w, idle], lr=0.1, weight_decay=1.0)

    def closure() -> float:
        rule.zero_grad()
        loss = (w**2).sum()
        loss.backward()
        return float(loss.detach())

    assert rule.step(closure) == 2.0
    assert torch.equal(idle, torch.ones(2))
    assert idle not in rule.state


def odd_parameters() -> list[nn.Parameter]:
    """Parameters of many sizes, some without weights, some not contiguous, each with a gradient."""
    torch.manual_seed(0)
    shapes = [(7, 5), (0,), (), (3,), (1, 40), (40, 1), (2, 3, 4), (11,), (0, 4)]
    params = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]
    params.append(nn.Parameter(torch.randn(6, 8, dtype=torch.float64).t()))
    for p in params:
        p.grad = torch.randn_like(p)
    params[0].grad = torch.randn(5, 7, dtype=torch.float64).t()
    return params


@pytest.mark.parametrize("limit", [1, 4, 6, 16, 35, 1000])
def test_the_size_of_a_chunk_changes_no_bit(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[list[Tensor]] = []
    for size in (limit, 1 << 30):
        monkeypatch.setitem(CHUNK, "cpu", size)
        params = odd_parameters()
        rule = LionRule(params, lr=0.01, weight_decay=0.1)
        for _ in range(3):
            rule.step()
            for p in params:
                assert p.grad is not None
                p.grad = p.grad * -0.9 + p.detach()
        found.append([p.detach() for p in params] + [rule.state[p]["exp_avg"] for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_transient_copy_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHUNK, "cpu", 1000)
    params = [nn.Parameter(torch.ones(500, 100)), *(nn.Parameter(torch.ones(300)) for _ in range(20))]
    rule = LionRule(params, lr=0.1, weight_decay=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    rule.step()
    meter = LiveBytes()
    meter.register([[p, p.grad, rule.state[p]["exp_avg"]] for p in params])
    steady = meter.live
    assert steady == 3 * 4 * sum(p.numel() for p in params)
    with meter:
        rule.step()
    assert 0 < meter.peak - steady <= 1000 * 4
    assert meter.live == steady


def test_groups_have_their_own_settings() -> None:
    a, b = nn.Parameter(torch.ones(2, dtype=torch.float64)), nn.Parameter(torch.ones(2, dtype=torch.float64))
    rule = LionRule([{"params": [a]}, {"params": [b], "lr": 0.5, "weight_decay": 1.0}], lr=0.25)
    a.grad = b.grad = torch.ones(2, dtype=torch.float64)
    rule.step()
    assert torch.equal(a.detach(), torch.full_like(a, 0.75))
    assert torch.equal(b.detach(), torch.full_like(b, 0.0))


def test_a_state_dict_and_a_scheduler_of_torch_work() -> None:
    def loop(rule: LionRule, w: nn.Parameter, grads: list[Tensor]) -> None:
        scheduler = torch.optim.lr_scheduler.LambdaLR(rule, lambda n: 0.5)
        for g in grads:
            w.grad = g.clone()
            rule.step()
            scheduler.step()

    whole = nn.Parameter(W.clone())
    rule = LionRule([whole], lr=0.1)
    loop(rule, whole, GRADS[:2])
    again = nn.Parameter(whole.detach().clone())
    other = LionRule([again], lr=0.1)
    other.load_state_dict(rule.state_dict())
    for w, optimizer in ((whole, rule), (again, other)):
        w.grad = GRADS[2].clone()
        optimizer.step()
    assert torch.equal(whole, again)
    assert float((whole.detach() - W).abs().max()) <= 3 * 0.05 + 1e-12


@pytest.mark.parametrize(
    "settings", [{"lr": -1.0}, {"weight_decay": -1.0}, {"betas": (0.9, 1.0)}, {"lr": float("nan")}]
)
def test_settings_without_meaning_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="must be"):
        Lion(**settings)
    with pytest.raises(ValueError, match="must be"):
        LionRule([nn.Parameter(torch.ones(1))], **settings)
