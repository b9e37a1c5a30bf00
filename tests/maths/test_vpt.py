"""Visual prompts: where they stand, what deep ones replace, first values, and what is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from scrimp.errors import UserError
from scrimp.models.patches import unfolded
from scrimp.techniques.tuning.vpt import VPT
from tiny import MODEL, TinyData, recipe, run_of, step
from tiny_tasks import TINY, VIT, Memory

SMALL = {**VIT, "layers": 2, "width": 16, "dropout": 0.0}


def made(*techniques: Any, **model: Any) -> Any:
    task = TINY["classify, images"].name
    made = recipe(*techniques, model={**SMALL, **model}, data=Memory("classify, images"), task=task, dtype="float64")
    return run_of(made)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("model", [{}, {"class_token": False, "pooling": "mean"}], ids=["class", "mean"])
def test_prompts_stand_between_the_class_token_and_the_patches(deep: bool, model: dict[str, Any]) -> None:
    run = made(VPT(length=3, deep=deep), **model)
    net, images = run.model, run.batch(0)["images"].double()
    first = int(net.class_token is not None)
    x = net.patches(unfolded(images, 4)) + net.positions.weight[first:]
    start = [(net.class_token.weight + net.positions.weight[:1]).expand(len(x), 1, -1)] if first else []
    prompts = [net.prompts.weight, net.blocks[1].enter.weight if deep else None]
    x = torch.cat([*start, prompts[0].expand(len(x), -1, -1), x], 1)
    for block, own in zip(net.blocks, prompts, strict=True):
        if own is not None:
            x = torch.cat([x[:, :first], own.expand(len(x), -1, -1), x[:, first + 3 :]], 1)
        x = block.mlp(block.mlp_norm(y := x + block.attention(block.attention_norm(x), None, None, None))) + y
    wanted = net.norm(torch.cat([x[:, :first], x[:, first + 3 :]], 1))
    torch.testing.assert_close(net.states(images), wanted, rtol=0, atol=1e-12)
    assert net.states(images).shape[1] == 16 + first


def test_first_values_and_what_is_trained() -> None:
    run = made(VPT(length=64, deep=True))
    bound = (6 / (3 * 4**2 + 16)) ** 0.5
    for p in (run.model.prompts.weight.detach(), run.model.blocks[1].enter.weight.detach()):
        assert 0.97 * bound < float(p.abs().max()) <= bound
        assert abs(float(p.mean())) < 0.1 * bound
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    step(run)
    moved = {n for n, p in run.model.named_parameters() if not torch.equal(before[n], p)}
    assert moved == {"prompts.weight", "blocks.1.enter.weight", "head.weight", "head.bias"}


def test_texts_are_refused() -> None:
    with pytest.raises(UserError, match="no place for prompts among patches"):
        run_of(recipe(VPT(), model=MODEL, data=TinyData(), task="causal-lm"))
