"""The ladder: its equation, that it begins as the model, and that the model keeps nothing for a backward pass."""

from __future__ import annotations

from typing import Any

import torch

from scrimp.applied import apply
from scrimp.meter import LiveBytes
from scrimp.models.generate import generate
from scrimp.models.transformer import TransformerConfig
from scrimp.techniques.tuning.ladder import Ladder
from scrimp.weights import initialize
from tiny import recipe, run_of, step

SMALL: dict[str, Any] = {"layers": 3, "width": 16, "heads": 4, "positions": "rotary"}


def made(*techniques: Any, **model: Any) -> Any:
    return run_of(recipe(*techniques, model={**SMALL, **model}, dtype="float64"))


def stirred(run: Any) -> Any:
    with torch.no_grad():
        for name, p in run.model.named_parameters():
            if name.startswith("side."):
                p.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    run.model.eval()
    return run


def test_it_begins_as_the_model_bit_by_bit() -> None:
    plain, run = made(), made(Ladder(reduction=2))
    tokens = run.batch(0)["tokens"]
    assert torch.equal(plain.model.eval()(tokens), run.model.eval()(tokens))


def test_a_model_of_ones_own_loop_keeps_its_type() -> None:
    model = TransformerConfig(**SMALL, vocab=32, context=8).build().double()
    initialize(model, 0)
    tokens = torch.arange(8)[None]
    before = model(tokens)
    assert torch.equal(apply(model, [Ladder(reduction=2)])(tokens), before)


def test_the_equation() -> None:
    run = stirred(made(Ladder(reduction=2), positions="none"))
    model, tokens = run.model, run.batch(0)["tokens"]
    side = model.side
    assert (side.down.weight.shape, side.rungs[0].block.attention.heads) == ((8, 16), 2)
    h = model.embed(tokens)
    own = side.down(h)
    for block, rung in zip(model.blocks, side.rungs, strict=True):
        h = block(h)
        mu = torch.sigmoid(rung.alpha / 0.1)
        own = rung.block(mu * rung.down(h) + (1 - mu) * own)
    wanted = model.head(model.norm(h + side.norm(own) @ side.up.weight.T))
    torch.testing.assert_close(model(tokens), wanted, rtol=0, atol=1e-12)


def test_only_the_side_is_trained_and_no_state_of_the_model_has_a_gradient() -> None:
    run = made(Ladder(reduction=2))
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    seen: list[bool] = []
    for block in run.model.blocks:
        block.register_forward_hook(lambda module, given, out: seen.append(out.requires_grad))
    for _ in range(3):
        step(run)
    assert len(seen) == 9
    assert not any(seen)
    moved = {n for n, p in run.model.named_parameters() if not torch.equal(before[n], p)}
    assert moved == set(before) - run.base


def test_a_block_of_the_model_keeps_its_output_only() -> None:
    """Each block of a deeper model adds one state, and what the thin side keeps; 16 states and more without."""

    def held(run: Any) -> int:
        batch = run.batch(0)
        with LiveBytes() as meter:
            meter.register(list(run.model.parameters()))
            begin = meter.live
            loss = run.loss(run.model, batch)
            held = meter.live - begin
            del loss
        return held

    wide = {"width": 64, "heads": 8, "dropout": 0.0}
    state = 4 * 16 * 64 * 8
    extra = (
        held(made(Ladder(reduction=8), layers=3, **wide)) - held(made(Ladder(reduction=8), layers=2, **wide))
    ) / state
    full = (held(made(layers=3, **wide)) - held(made(layers=2, **wide))) / state
    assert full > 15.9
    assert 1 <= extra < 1 + 20 / 8


def test_generation_with_a_cache_sees_what_a_whole_pass_sees() -> None:
    run = stirred(made(Ladder(reduction=2)))
    written = generate(run.model, run.batch(0)["tokens"][0, :5], 6, temperature=0.0)
    whole = run.model(written[None])[0]
    assert torch.equal(whole[4:-1].argmax(-1), written[5:])
