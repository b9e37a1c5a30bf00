"""What tests of tuning methods share: what a block keeps for its backward pass, and values as if trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from scrimp.run import Run, exported
from tiny import recipe, run_of

SMALL = {"layers": 2, "width": 16, "heads": 2}
ONE = {"layers": 1, "width": 32, "heads": 2}


def made(*techniques: Any, **settings: Any) -> Any:
    """A run of two small blocks in float64."""
    return run_of(recipe(*techniques, **{"dtype": "float64", "model": SMALL, **settings}))


def shaken(model: nn.Module) -> None:
    """Change what is trained, which at first may have no effect."""
    chance = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=chance, dtype=p.dtype))


def outputs(run: Run) -> Tensor:
    """Logits of the first batch, without dropout."""
    run.model.eval()
    with torch.no_grad():
        return run.model(run.batch(0)["tokens"])


def merge_error(run: Run, **settings: Any) -> float:
    """Largest difference of outputs between a run and the plain model that it exports."""
    merged = run_of(recipe(**{"model": SMALL, "dtype": "float64", **settings}), source={"model": exported(run)})
    assert set(exported(run)) == set(run.base)
    return float((outputs(run) - outputs(merged)).abs().max())


def kept(block: nn.Module, x: Tensor) -> float:
    """What a block keeps for its backward pass beside parameters, in units of its input's size."""
    own = {p.untyped_storage().data_ptr() for p in block.parameters()}
    saved: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            saved.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        block(x)
    return sum(t.untyped_storage().nbytes() for t in saved.values()) / x.untyped_storage().nbytes()


def kept_more(technique: Any, tokens: int = 64) -> float:
    """How much more a block keeps with a tuning method than frozen, in units of its input: 10 of 16 is frozen."""
    x = torch.randn(4, tokens // 4, 32, dtype=torch.float64, requires_grad=True)
    plain = made(model=ONE).model.blocks[0].requires_grad_(False)
    tuned = made(technique, model=ONE).model.blocks[0]
    return kept(tuned, x) - kept(plain, x)
