"""Prompts and prefixes: their equations, places, masks and caches, and what they train."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scrimp.errors import UserError
from scrimp.models.generate import generate
from scrimp.models.transformer import TransformerConfig
from scrimp.run import exported
from scrimp.techniques.tuning.prefix import Prefix
from scrimp.techniques.tuning.prompt import Prompt
from tiny import recipe, run_of, step
from tiny_tasks import TINY, Memory

SMALL: dict[str, Any] = {"layers": 2, "width": 16, "heads": 2}
LEARNED = {**SMALL, "context": 24}
ROTARY = {**SMALL, "positions": "rotary", "kv_heads": 1}


def tuned(technique: Any, model: dict[str, Any]) -> Any:
    run = run_of(recipe(technique, model=model, dtype="float64"))
    run.model.eval()
    with torch.no_grad():
        for name, p in run.model.named_parameters():
            if "prefix" in name or "prompts" in name:
                p.normal_(0, 0.5, generator=torch.Generator().manual_seed(len(name)))
    return run


def by_hand(model: Any, tokens: Tensor, prompts: Tensor) -> Tensor:
    """Logits of a model without positions in front of blocks: embedded prompts and tokens through everything."""
    x = torch.cat([prompts.expand(len(tokens), -1, -1), model.embed(tokens)], 1)
    if model.positions is not None:
        x = x + model.positions(torch.arange(x.shape[1]))
    for block in model.blocks:
        x = block(x)
    return model.head(model.norm(x))[:, len(prompts) :]


def test_shifted_prompts_are_tokens_whose_embedding_is_trained() -> None:
    run = tuned(Prompt(length=3, shift=True), LEARNED)
    tokens = run.batch(0)["tokens"]
    torch.testing.assert_close(
        run.model(tokens), by_hand(run.model, tokens, run.model.prompts.weight), rtol=0, atol=1e-12
    )


def test_without_a_shift_tokens_keep_their_places() -> None:
    run = tuned(Prompt(length=3), SMALL)
    tokens, table = run.batch(0)["tokens"], run.model.positions.weight
    prompts = run.model.prompts.weight - table[:3]
    table = torch.cat([table[:3], table])  # by_hand counts places from the first prompt
    run.model.positions.forward = lambda places: F.embedding(places, table)
    wanted = by_hand(run.model, tokens, prompts)
    del run.model.positions.forward
    torch.testing.assert_close(run.model(tokens), wanted, rtol=0, atol=1e-12)


def test_rotary_places_are_relative() -> None:
    here, there = tuned(Prompt(length=3), ROTARY), tuned(Prompt(length=3, shift=True), ROTARY)
    tokens = here.batch(0)["tokens"]
    torch.testing.assert_close(here.model(tokens), there.model(tokens), rtol=0, atol=1e-12)


@pytest.mark.parametrize("model", [LEARNED, ROTARY], ids=["learned", "rotary"])
@pytest.mark.parametrize("kind", [Prompt, Prefix])
@pytest.mark.parametrize("shift", [False, True])
def test_generation_with_a_cache_sees_what_a_whole_pass_sees(kind: Any, model: dict[str, Any], shift: bool) -> None:
    run = tuned(kind(length=3, shift=shift), model)
    tokens = run.batch(0)["tokens"][0, :5]
    whole = run.model(generate(run.model, tokens, 6, temperature=0.0)[None])[0]
    written = generate(run.model, tokens, 6, temperature=0.0)
    assert torch.equal(whole[4:-1].argmax(-1), written[5:])
    cache: Any = [[], []]
    parts = [run.model(part[None], cache=cache)[0] for part in (written[:5], written[5:6], written[6:7])]
    torch.testing.assert_close(torch.cat(parts), whole[:7], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [Prompt, Prefix])
def test_packed_documents_see_the_same_vectors_and_not_each_other(kind: Any) -> None:
    run = tuned(kind(length=3), SMALL)
    tokens = run.batch(0)["tokens"][:2]
    documents = torch.tensor([[0] * 6 + [1] * 10] * 2)
    both = run.model(tokens, documents=documents)
    torch.testing.assert_close(both[:, :6], run.model(tokens[:, :6]), rtol=0, atol=1e-12)
    torch.testing.assert_close(both[:, 6:], run.model(tokens[:, 6:]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [Prompt, Prefix])
def test_padding_of_an_encoder_changes_nothing(kind: Any) -> None:
    run = tuned(kind(length=3), {**SMALL, "context": 16})
    encoder: Any = TransformerConfig(**SMALL, vocab=32, context=16, causal=False).build().double().eval()
    encoder.load_state_dict(run.model.state_dict(), strict=False)
    tokens = run.batch(0)["tokens"][:1]
    for net in (encoder,):
        net.prompts, net.prepended = run.model.prompts, run.model.prepended
        for block, other in zip(net.blocks, run.model.blocks, strict=True):
            block.attention.prefix = other.attention.prefix
    attended = torch.arange(16)[None] < 9
    torch.testing.assert_close(encoder(tokens, attended=attended)[:, :9], encoder(tokens[:, :9]), rtol=0, atol=1e-12)


def test_a_prefix_is_more_keys_and_values_that_all_tokens_see() -> None:
    run = tuned(Prefix(length=3), SMALL)
    attention, x = run.model.blocks[1].attention, torch.randn(2, 7, 16, dtype=torch.float64)
    q, k, v = attention.qkv(x).view(2, 7, 3, 2, 8).permute(2, 0, 3, 1, 4)
    more_k, more_v = attention.prefix.weight
    k, v = torch.cat([more_k.expand(2, -1, -1, -1), k], 2), torch.cat([more_v.expand(2, -1, -1, -1), v], 2)
    scores = q @ k.mT / 8**0.5
    hidden = torch.ones(7, 10, dtype=torch.bool).triu(4)
    y = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(attention(x, None, None, None), attention.proj(y.transpose(1, 2).reshape(2, 7, 16)))


@pytest.mark.parametrize("technique", [Prompt(length=2, encoder="mlp"), Prefix(length=2, encoder="mlp", hidden=4)])
def test_the_encoder_is_dropped_and_what_it_gave_stays(technique: Any) -> None:
    run = run_of(recipe(technique, model=SMALL, dtype="float64"))
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    step(run)
    assert {n for n, p in run.model.named_parameters() if not torch.equal(before[n], p)} == set(before) - run.base
    plain = exported(run)
    fresh = type(technique)(length=2)
    free = run_of(recipe(fresh, model=SMALL, dtype="float64"), source={"model": plain})
    assert set(plain) == {n for n, _ in free.model.named_parameters()}
    tokens = run.batch(0)["tokens"]
    torch.testing.assert_close(run.model.eval()(tokens), free.model.eval()(tokens), rtol=0, atol=1e-12)


def test_two_prefixes_are_exported_side_by_side() -> None:
    made = (Prefix(length=2, encoder="mlp", hidden=4, targets="blocks.0.attention"),
            Prefix(length=3, targets="blocks.1.attention"))  # fmt: skip
    run = run_of(recipe(*made, model=SMALL, dtype="float64"))
    plain = exported(run)
    shapes = [plain[f"blocks.{i}.attention.prefix.weight"].shape for i in range(2)]
    assert shapes == [(2, 2, 2, 8), (2, 2, 3, 8)]
    assert len(plain) == len(run.base) + 2


def test_first_values() -> None:
    run: Any = run_of(recipe(Prompt(length=5), model=SMALL))
    rows = run.model.embed.weight
    assert all(any(torch.equal(p, row) for row in rows) for p in run.model.prompts.weight)
    run = run_of(recipe(Prompt(length=5, start="text", text="ab"), model=SMALL))
    ids = (run.data.tokenizer.encode("ab") * 3)[:5]
    assert torch.equal(run.model.prompts.weight, run.model.embed.weight[ids])
    given = run_of(recipe(model=SMALL, seed=9)).state()
    run = run_of(recipe(Prompt(length=5, start="text", text="ab"), model=SMALL), source=given)
    assert torch.equal(run.model.prompts.weight, given["model"]["embed.weight"][ids])
    run = run_of(recipe(Prompt(length=50, start="random", std=0.3), model=SMALL))
    assert 0.27 < float(run.model.prompts.weight.detach().std()) < 0.33


def test_prompts_of_an_encoder_decoder_stand_before_what_is_read() -> None:
    tiny = TINY["seq2seq"]
    run: Any = run_of(recipe(Prompt(length=3), model={**tiny.model, "dropout": 0.0}, task="seq2seq",
                             data=Memory("seq2seq"), dtype="float64"))  # fmt: skip
    model = run.model.eval()
    tokens, written = torch.arange(12).view(2, 6), torch.arange(8).view(2, 4)
    attended = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    stack, x = model.encoder, model.embed(tokens) + model.encoder.positions.weight[:6]
    x = torch.cat([model.prompts().expand(2, -1, -1), x], 1)
    mask = torch.cat([torch.ones(2, 3, dtype=torch.bool), attended], 1)[:, None, None]
    for block in stack.blocks:
        x = block(x, None, mask)
    states = model.encode(tokens, attended)
    torch.testing.assert_close(states, stack.norm(x), rtol=0, atol=1e-12)
    out = model(tokens, written, attended=attended)
    torch.testing.assert_close(out, model.head(model.decoder(model.embed(written), states=states, states_mask=mask)))
    other = tokens.masked_fill(~attended, 9)
    torch.testing.assert_close(model(other, written, attended=attended), out, rtol=0, atol=1e-12)
    with torch.no_grad():
        model.prompts.weight[0] *= -1
    assert not torch.allclose(model(tokens, written, attended=attended), out, atol=1e-6)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    step(run)
    assert {n for n, p in model.named_parameters() if not torch.equal(before[n], p)} == {"prompts.weight"}
    with pytest.raises(UserError, match="keep their places"):
        run_of(recipe(Prompt(length=3, shift=True), model=dict(tiny.model), task="seq2seq", data=Memory("seq2seq")))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="room for 0 prompts"):
        run_of(recipe(Prompt(length=2, shift=True), model=SMALL))
    with pytest.raises(UserError, match="room for 8 places"):
        run_of(recipe(Prefix(length=9, shift=True), model=LEARNED))
    with pytest.raises(UserError, match="belong together"):
        Prompt(text="ab")
    with pytest.raises(UserError, match="of the encoder, and there is none"):
        Prompt(hidden=8)
    run = tuned(Prompt(length=3, shift=True), {**SMALL, "context": 19})
    with pytest.raises(ValueError, match="context of 16"):
        run.model(torch.zeros(1, 17, dtype=torch.int64))
