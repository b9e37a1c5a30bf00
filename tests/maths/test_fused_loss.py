"""Head and cross entropy by chunks, against the logits whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from scrimp.errors import UserError
from scrimp.meter import LiveBytes
from scrimp.models.seams import CrossEntropy, Linear
from scrimp.techniques.attention.fused_loss import FusedCrossEntropy
from tiny import example, recipe, run_of

N, C, V = 23, 8, 50


class Largest(TorchDispatchMode):
    """The largest tensor that any operator returns, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(t.numel() for t in tree_iter(out) if isinstance(t, Tensor))])
        return out


class Twice(nn.Module):
    """A step on a weight or an output, with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((), 2.0, dtype=torch.float64))

    def forward(self, *values: Tensor) -> Tensor:
        return values[-1] * self.factor


def case(bias: bool = False, ignored: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Linear, Tensor]:
    """(hidden [1, N, C], head, targets [1, N])."""
    chance = torch.Generator().manual_seed(0)
    head = Linear(C, V, bias)
    with torch.no_grad():
        for p in head.parameters():
            p.normal_(generator=chance)
    targets = torch.randint(0, V, (1, N), generator=chance)
    targets[0, torch.randperm(N, generator=chance)[:ignored]] = -100
    hidden = torch.randn(1, N, C, generator=chance).to(dtype).requires_grad_()
    return hidden, head.to(dtype), targets


def outcome(loss: nn.Module, hidden: Tensor, head: nn.Module, targets: Tensor, smoothing: float = 0.0) -> list[Tensor]:
    """Loss and gradients. The loss is divided first, as the trainer does."""
    value = loss(hidden, head, targets, smoothing) / 7
    value.backward()
    grads = [p.grad for p in (hidden, *head.parameters()) if p.grad is not None]
    for p in (hidden, *head.parameters()):
        p.grad = None
    return [value.detach(), *grads]


def extra_bytes(loss: nn.Module, hidden: Tensor, head: nn.Module, targets: Tensor) -> int:
    """The peak of a loss and its gradients, beyond what was there before."""
    meter = LiveBytes()
    meter.register([hidden, targets, *head.parameters()])
    before = meter.live
    with meter:
        value = loss(hidden, head, targets)
        if value.requires_grad:
            value.div(7).backward()
    hidden.grad = None
    for p in head.parameters():
        p.grad = None
    return meter.peak - before


def assert_near(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-12) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kernel", ["own", "torch"])
@pytest.mark.parametrize("chunk", [1, 5, 23, 512])
@pytest.mark.parametrize("ignored", [0, 9, N])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equals_cross_entropy_of_the_logits(
    kernel: str, chunk: int, ignored: int, bias: bool, smoothing: float
) -> None:
    hidden, head, targets = case(bias, ignored)
    fused = outcome(FusedCrossEntropy(chunk, kernel), hidden, head, targets, smoothing)
    assert_near(fused, outcome(CrossEntropy(), hidden, head, targets, smoothing))


@pytest.mark.parametrize("kernel", ["own", "torch"])
@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_a_frozen_side_gets_no_gradient(kernel: str, frozen: str) -> None:
    hidden, head, targets = case()
    (hidden if frozen == "hidden" else head.weight).requires_grad_(False)
    fused = outcome(FusedCrossEntropy(5, kernel), hidden, head, targets)
    assert len(fused) == 2
    assert_near(fused, outcome(CrossEntropy(), hidden, head, targets))


def test_the_gradient_of_a_frozen_head_is_not_computed() -> None:
    """Its buffer would be the largest of all."""
    hidden, head, targets = case()
    trained = extra_bytes(FusedCrossEntropy(2), hidden, head, targets)
    head.weight.requires_grad_(False)
    frozen = extra_bytes(FusedCrossEntropy(2), hidden, head, targets)
    assert frozen < 8 * V * C < trained


def test_a_plain_torch_head_will_do() -> None:
    hidden, head, targets = case(bias=True)
    plain = nn.Linear(C, V, dtype=torch.float64)
    plain.load_state_dict(head.state_dict())
    assert_near(outcome(FusedCrossEntropy(5), hidden, plain, targets), outcome(CrossEntropy(), hidden, head, targets))


@pytest.mark.parametrize("seam", ["weight", "output"])
@pytest.mark.parametrize("ignored", [0, 9])
def test_steps_on_the_head_take_part(seam: str, ignored: int) -> None:
    hidden, head, targets = case(ignored=ignored)
    head.on(seam, "low-rank" if seam == "weight" else "scale", "twice", Twice())
    fused = outcome(FusedCrossEntropy(5), hidden, head, targets)
    assert len(fused) == 4
    assert_near(fused, outcome(CrossEntropy(), hidden, head, targets))
    with torch.no_grad():
        assert_near([FusedCrossEntropy(5)(hidden, head, targets)], [CrossEntropy()(hidden, head, targets)])


def test_another_product_is_called() -> None:
    """An fp8 or int8 head must not be bypassed."""
    hidden, head, targets = case()
    head.product = lambda x, w, b: F.linear(x.tanh(), w, b)
    assert_near(outcome(FusedCrossEntropy(5), hidden, head, targets), outcome(CrossEntropy(), hidden, head, targets))


def test_without_gradients() -> None:
    hidden, head, targets = case(ignored=3)
    with torch.no_grad():
        loss = FusedCrossEntropy(2)(hidden, head, targets)
        assert not loss.requires_grad
        assert_near([loss], [CrossEntropy()(hidden, head, targets)])
        assert extra_bytes(FusedCrossEntropy(2), hidden, head, targets) < 8 * (3 * V + 2 * N * C)


def test_far_logits_stay_finite() -> None:
    """A target 2000 below the largest logit has probability 0 in any format."""
    hidden, head, targets = case(dtype=torch.float32)
    with torch.no_grad():
        head.weight.mul_(1000)
    fused, plain = (outcome(loss, hidden, head, targets) for loss in (FusedCrossEntropy(5), CrossEntropy()))
    assert float(plain[0]) > 1000
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_no_buffer_of_all_rows_and_classes() -> None:
    hidden, head, targets = case()
    for loss, wanted in ((FusedCrossEntropy(4), V * C), (CrossEntropy(), N * V)):
        with Largest() as mode:
            outcome(loss, hidden, head, targets)
        assert mode.elements == wanted


def test_the_weight_gradient_is_held_once() -> None:
    """It is made in place and handed over: weight [V, C], hidden [N, C], a chunk of logits and small change."""
    hidden, head, targets = case()
    once = 8 * (V * C + N * C + 4 * V)
    assert once <= extra_bytes(FusedCrossEntropy(4), hidden, head, targets) < once + 8 * V * C // 2


def test_a_second_backward_is_refused() -> None:
    hidden, head, targets = case()
    loss = FusedCrossEntropy(5)(hidden, head, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


@pytest.mark.parametrize("kernel", ["own", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(kernel: str, dtype: torch.dtype) -> None:
    """Near float32, with gradients in float32 like the weights."""
    hidden, head, targets = case(bias=True, dtype=torch.float32)
    exact = outcome(CrossEntropy(), hidden, head, targets)
    with torch.autocast("cpu", dtype):
        fused = outcome(FusedCrossEntropy(5, kernel), hidden, head, targets)
    for a, b in zip(fused, exact, strict=True):
        assert a.dtype == torch.float32 or (kernel == "torch" and a.ndim == 0)
        assert float((a.float() - b).norm() / b.norm()) < 0.02


def test_float16_keeps_gradients_below_its_least_number() -> None:
    """A class of probability 1e-8 gets its gradient; rounded to float16 as it is, it would be 0."""
    hidden = torch.ones(1, 1, 1, requires_grad=True)
    head = Linear(1, 2, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.0], [-18.42]]))
    with torch.autocast("cpu", torch.float16):
        FusedCrossEntropy(4)(hidden, head, torch.zeros(1, 1, dtype=torch.int64)).backward()
    assert head.weight.grad is not None
    assert abs(float(head.weight.grad[1]) / 1e-8 - 1) < 0.3


def test_bfloat16_weights_get_bfloat16_gradients() -> None:
    hidden, head, targets = case(dtype=torch.bfloat16)
    fused = outcome(FusedCrossEntropy(5), hidden, head, targets)
    assert [g.dtype for g in fused[1:]] == [torch.bfloat16] * 2
    wide = outcome(CrossEntropy(), hidden.detach().double().requires_grad_(), head.double(), targets)
    assert float((fused[2].double() - wide[2]).norm() / wide[2].norm()) < 0.01


@pytest.mark.parametrize("others", [(), ("lora",), ("accumulate",), ("recompute",)])
def test_a_run_is_that_of_whole_logits(others: tuple[str, ...]) -> None:
    found = []
    for fused in ((), (example("fused_loss", chunk=7),)):
        run = run_of(recipe(*fused, *map(example, others), dtype="float64", task={"label_smoothing": 0.1}))
        batch = run.batch(0)
        batch["targets"] = batch["targets"].clone()
        batch["targets"][0, 3:9] = -100
        assert run.backward
        loss = run.backward(batch, run.task.count(batch))
        found.append([loss, *(p.grad for p in run.model.parameters() if p.grad is not None)])
    assert_near(*found)


def test_refusals() -> None:
    with pytest.raises(UserError, match="at least 1"):
        example("fused_loss", chunk=0)
    run = run_of(recipe())
    del run.model.head_loss
    with pytest.raises(UserError, match=r"techniques.fused_loss: the model has no head"):
        example("fused_loss").model(run.model, run)
