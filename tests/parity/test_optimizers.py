"""Update rules, averages and schedules against reference libraries, in float64."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import lion_pytorch
import pytest
import pytorch_optimizer
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from scrimp.clock import Clock, Duration
from scrimp.groups import Group
from scrimp.registry import technique_class
from tiny import example, keep, recipe, run_of, stand_in, step

Make = Callable[[list[nn.Parameter]], Optimizer]
STEPS = 50


def trajectory(make: Make, falls: bool = True) -> list[Tensor]:
    """Weights of a small regression after each step, with a rate that may fall; a layer is idle in every third step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 3)).double()
    x, y = torch.randn(16, 6, dtype=torch.float64), torch.randn(16, 3, dtype=torch.float64)
    optimizer = make(list(model.parameters()))
    base = [group["lr"] for group in optimizer.param_groups]
    path: list[Tensor] = []
    for n in range(STEPS):
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * (1 - n / STEPS) if falls else lr
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        if n % 3 == 0:
            for p in model[0].parameters():
                p.grad = None
        optimizer.step()
        path.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return path


def ours(name: str, **settings: Any) -> Make:
    """A technique's rule, with the weights and the biases in groups of their own."""

    def make(params: list[nn.Parameter]) -> Optimizer:
        wide = {str(i): p for i, p in enumerate(params) if p.ndim > 1}
        flat = {str(i): p for i, p in enumerate(params) if p.ndim == 1}
        groups = [Group(wide, lr=1.0, decay=1.0), Group(flat, lr=0.5, decay=0.0)]
        return technique_class(name)(**settings).optimizer(None, stand_in())(groups)  # type: ignore[arg-type]

    return make


def theirs(kind: Callable[..., Optimizer], lr: float, weight_decay: float, **settings: Any) -> Make:
    """A library's rule over the same groups."""

    def make(params: list[nn.Parameter]) -> Optimizer:
        wide, flat = [p for p in params if p.ndim > 1], [p for p in params if p.ndim == 1]
        groups = [{"params": wide}, {"params": flat, "lr": lr / 2, "weight_decay": 0.0}]
        return kind(groups, lr=lr, weight_decay=weight_decay, **settings)

    return make


def their_lamb(**settings: Any) -> Make:
    """pytorch-optimizer's Lamb in the paper's form.

    Its switches: `adam_debias` for lr as it is (otherwise lr / (1 - b1^t)), `weight_decouple` off for a decay inside
    the update, no bound of 10 on ||w||, and `adam` for biases, which it adapts like any tensor. It has no corrected
    moments.
    """

    class Unbounded(pytorch_optimizer.Lamb):  # type: ignore[misc]
        clamp = settings.pop("clamp", 1e999)

    def make(params: list[nn.Parameter]) -> Optimizer:
        wide, flat = [p for p in params if p.ndim > 1], [p for p in params if p.ndim == 1]
        groups = [{"params": wide}, {"params": flat, "lr": 0.005, "weight_decay": 0.0, "adam": True}]
        return Unbounded(
            groups, lr=0.01, weight_decay=0.1, weight_decouple=False, adam_debias=True, eps=EPS, **settings
        )

    return make


EPS = 1e-14
"""Of LAMB here: the library adds it to ||u|| too."""
SLOW = {"foreach": False, "fused": False}
PAIRS: dict[str, tuple[Make, Make, float]] = {
    "torch SGD": (
        ours("sgd", lr=0.1, weight_decay=0.01),
        theirs(torch.optim.SGD, 0.1, 0.01, momentum=0.9, **SLOW),
        1e-14,
    ),
    "torch SGD, Nesterov": (
        ours("sgd", lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.01),
        theirs(torch.optim.SGD, 0.1, 0.01, momentum=0.8, nesterov=True, **SLOW),
        1e-14,
    ),
    "torch SGD, plain": (
        ours("sgd", lr=0.1, momentum=0.0, weight_decay=0.01),
        theirs(torch.optim.SGD, 0.1, 0.01, **SLOW),
        1e-14,
    ),
    "torch SGD, dampened": (
        ours("sgd", lr=0.1, momentum=0.8, dampening=0.3, weight_decay=0.01),
        theirs(torch.optim.SGD, 0.1, 0.01, momentum=0.8, dampening=0.3, **SLOW),
        1e-14,
    ),
    "torch Adam": (
        ours("adam", lr=1e-2, weight_decay=0.1),
        theirs(torch.optim.Adam, 1e-2, 0.1, betas=(0.9, 0.98), **SLOW),
        1e-13,
    ),
    "torch AdamW": (
        ours("adamw", lr=1e-2, weight_decay=0.1),
        theirs(torch.optim.AdamW, 1e-2, 0.1, betas=(0.9, 0.95), **SLOW),
        1e-13,
    ),
    "lion-pytorch": (
        ours("lion", lr=1e-3, weight_decay=0.1),
        theirs(lion_pytorch.Lion, 1e-3, 0.1),
        1e-14,
    ),
    "lion-pytorch, betas for language models": (
        ours("lion", lr=1e-3, weight_decay=0.1, betas=(0.95, 0.98)),
        theirs(lion_pytorch.Lion, 1e-3, 0.1, betas=(0.95, 0.98)),
        1e-14,
    ),
    "pytorch-optimizer Lion": (
        ours("lion", lr=1e-3, weight_decay=0.1),
        theirs(pytorch_optimizer.Lion, 1e-3, 0.1),
        1e-14,
    ),
    "pytorch-optimizer LARS": (
        ours("lars", lr=0.4, weight_decay=0.01, eta=0.05, eps=0.0),
        theirs(pytorch_optimizer.LARS, 0.4, 0.01, trust_coefficient=0.05),
        1e-14,
    ),
    "pytorch-optimizer LARS, Nesterov": (
        ours("lars", lr=0.4, weight_decay=0.01, eta=0.05, eps=0.0, momentum=0.8, nesterov=True),
        theirs(pytorch_optimizer.LARS, 0.4, 0.01, trust_coefficient=0.05, momentum=0.8, nesterov=True),
        1e-13,
    ),
    "pytorch-optimizer Lamb": (
        ours("lamb", lr=0.01, weight_decay=0.1, eps=EPS, bias_correction=False),
        their_lamb(),
        1e-12,
    ),
    "pytorch-optimizer Lamb, bounded": (
        ours("lamb", lr=0.01, weight_decay=0.1, eps=EPS, bias_correction=False, clamp=1.5),
        their_lamb(clamp=1.5),
        1e-12,
    ),
    # Their norm of all gradients is in single precision.
    "pytorch-optimizer Lamb, clipped": (
        ours("lamb", lr=0.01, weight_decay=0.1, eps=EPS, bias_correction=False, clip=0.1),
        their_lamb(pre_norm=True, max_grad_norm=0.1),
        1e-7,
    ),
}
CONSTANT = ("LARS",)
"""Compared at one rate: this library multiplies the momentum by it, the paper has it inside."""


@pytest.mark.parametrize("pair", PAIRS)
def test_trajectories_agree(pair: str, record_property: Callable[[str, object], None]) -> None:
    mine, reference, tolerance = PAIRS[pair]
    falls = not any(name in pair for name in CONSTANT)
    a, b = trajectory(mine, falls), trajectory(reference, falls)
    assert float((a[-1] - a[0]).abs().max()) > 1e-3
    worst = max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))
    library, name = pair.partition(",")[0].split(" ")[0], pair.partition(",")[0].split(" ")[-1].lower()
    keep(record_property, "lion" if name == "lion-pytorch" else name, library, worst)
    assert worst <= tolerance


def test_the_average_agrees_with_torch(record_property: Callable[[str, object], None]) -> None:
    run = run_of(recipe(example("ema", decay=0.9, warmup=False), dtype="float64"))
    reference = AveragedModel(run.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    # Its first update copies the weights, where ours starts from the initial ones.
    reference.update_parameters(run.model)
    for _ in range(5):
        step(run)
        reference.update_parameters(run.model)
    memory = run.memories["ema"]
    worst = max(float((memory[name] - p.detach()).abs().max()) for name, p in reference.module.named_parameters())
    keep(record_property, "ema", "torch", worst)
    assert worst <= 1e-15


def factors(name: str, steps: int, **settings: Any) -> list[float]:
    """The factor of each step of a run."""
    clock = Clock.plan(Duration.parse(f"{steps} step"), batch=1, tokens=1, items=1)
    run = SimpleNamespace(clock=clock, where=lambda technique, setting="": "")
    shape = technique_class(name)(**settings).schedule(lambda p: 1.0, run)  # type: ignore[arg-type]
    return [shape(i / steps) for i in range(steps)]


@pytest.mark.parametrize(
    ("mine", "make"),
    [
        (("warmup_linear", {}), "get_linear_schedule_with_warmup"),
        (("warmup_cosine", {"floor": 0.0}), "get_cosine_schedule_with_warmup"),
        (("wsd", {"decay": "30 step"}), "get_wsd_schedule"),
    ],
    ids=["linear", "cosine", "wsd"],
)
def test_schedules_agree_with_transformers(
    mine: tuple[str, dict[str, Any]], make: str, record_property: Callable[[str, object], None]
) -> None:
    import transformers

    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    more = {"num_training_steps": 100}
    if make == "get_wsd_schedule":
        more |= {"num_decay_steps": 30, "decay_type": "linear"}
    scheduler = getattr(transformers, make)(optimizer, num_warmup_steps=10, **more)
    theirs: list[float] = []
    for _ in range(100):
        theirs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    got = factors(mine[0], 100, warmup="10 step", **mine[1])
    # Theirs wastes the first step at a rate of 0, so that its warm-up is a step behind.
    pairs = [*zip(got[:10], theirs[1:11], strict=True), *zip(got[10:], theirs[10:], strict=True)]
    keep(record_property, mine[0], "transformers", max(abs(a - b) for a, b in pairs))
    assert got[:10] == pytest.approx(theirs[1:11], abs=1e-12)
    assert got[10:] == pytest.approx(theirs[10:], abs=1e-12)


def test_the_inverse_square_root_is_the_papers() -> None:
    got = factors("inverse_sqrt", 100, warmup="16 step")
    paper = [min(t**-0.5, t * 16**-1.5) for t in range(1, 101)]
    assert [f * 16**-0.5 for f in got] == pytest.approx(paper, abs=1e-12)
