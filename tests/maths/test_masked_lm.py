"""Masking: how much, of what, keyed by what; the loss against one written out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from scrimp.errors import UserError
from scrimp.models.transformer import Transformer, TransformerConfig
from scrimp.tasks.masked_lm import MaskedLM, Masking
from scrimp.weights import initialize

TOKENIZER = SimpleNamespace(vocab=1000, end=3, mask=4, special=frozenset({0, 1, 2, 3, 4}))
DATA = SimpleNamespace(tokenizer=TOKENIZER)


def task(**settings: Any) -> Masking:
    return MaskedLM(**settings).prepared(DATA)


def stream(rows: int, length: int) -> dict[str, np.ndarray]:
    return {"tokens": np.random.default_rng(0).integers(5, 1000, (rows, length + 1))}


def encoder(**options: Any) -> Transformer:
    config = TransformerConfig(vocab=1000, context=32, layers=1, width=16, heads=2, causal=False, norm_at="post",
                               embed_norm=True, segments=2, head="mlm", **options)  # fmt: skip
    model = config.build()
    initialize(model, 0)
    for p in model.parameters():
        p.data.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model


def test_shares_of_what_happens_to_tokens() -> None:
    items = stream(400, 200)
    batch = task().batch(items, np.arange(400))
    tokens = torch.from_numpy(items["tokens"][:, :-1])
    hidden = batch["targets"] != -100
    assert (hidden.sum(1) == 30).all()  # 15 % of 200 in every row
    assert torch.equal(batch["targets"][hidden], tokens[hidden])
    assert torch.equal(batch["tokens"][~hidden], tokens[~hidden])
    now = batch["tokens"][hidden]
    shares = [float((now == 4).float().mean()), float((now == tokens[hidden]).float().mean())]
    # 12,000 draws: four standard deviations are 1.5 and 1.1 points.
    assert shares[0] == pytest.approx(0.8, abs=0.015)
    assert shares[1] == pytest.approx(0.1, abs=0.011)
    others = now[(now != 4) & (now != tokens[hidden])]
    assert int(others.min()) >= 5
    assert len(set(others.tolist())) > 600  # of 995, by 1,200 draws


def test_special_and_padded_tokens_are_never_hidden() -> None:
    tokens = np.full((50, 16), 7)
    tokens[:, 0], tokens[:, 5] = 2, 3
    attended = np.arange(16) < 6
    items = {"tokens": tokens, "attended": np.tile(attended, (50, 1)), "segments": np.zeros_like(tokens)}
    batch = task(share=0.9).batch(items, np.arange(50))
    assert batch["tokens"].shape == (50, 16)  # a whole sequence, of which no token is kept for a target
    hidden = batch["targets"] != -100
    assert hidden.any(0).tolist() == [False, True, True, True, True, *[False] * 11]
    assert (hidden.sum(1) == 4).all()  # 0.9 of four, rounded
    assert {"segments", "attended"} <= batch.keys()
    assert int(task().tokens(batch)) == 300


def test_a_sample_has_its_mask_wherever_it_is() -> None:
    items = stream(6, 60)
    whole = task().batch(items, np.arange(10, 16))
    part = task().batch({"tokens": items["tokens"][2:4]}, np.array([12, 13]))
    assert torch.equal(whole["tokens"][2:4], part["tokens"])
    later = task().batch(items, np.arange(110, 116))
    assert not torch.equal(whole["tokens"], later["tokens"])
    wide = {"tokens": np.pad(items["tokens"][:, :-1], ((0, 0), (0, 8))), "attended": np.arange(68)[None] < 60}
    wide["attended"] = np.tile(wide["attended"], (6, 1))
    assert torch.equal(task().batch(wide, np.arange(10, 16))["tokens"][:, :60], whole["tokens"])


def test_at_least_one_token_is_hidden_if_there_is_one() -> None:
    tokens = np.array([[2, 9, 3], [2, 3, 0]])
    batch = task().batch({"tokens": tokens, "attended": tokens > 0}, np.arange(2))
    assert batch["targets"].tolist() == [[-100, 9, -100], [-100] * 3]
    assert int(task().count(batch)) == 1
    empty = task().batch({"tokens": tokens[1:], "attended": tokens[1:] > 0}, np.arange(1))
    assert int(task().count(empty)) == 1
    assert task().loss(encoder().train(), empty).item() == 0.0


def test_loss_and_metrics_are_those_of_hidden_tokens() -> None:
    model, items = encoder().eval(), stream(4, 20)
    items["attended"] = np.tile(np.arange(21) < 17, (4, 1))
    made = task(share=0.3)
    batch = made.batch(items, np.arange(4))
    with torch.no_grad():
        logits = model(batch["tokens"], attended=batch["attended"])
    hidden = batch["targets"] != -100
    wanted = F.cross_entropy(logits[hidden], batch["targets"][hidden], reduction="sum")
    torch.testing.assert_close(made.loss(model, batch), wanted)
    assert int(made.count(batch)) == int(hidden.sum()) == 20
    found = made.evaluate(model, [batch, batch])
    assert found["loss"] == pytest.approx(float(wanted) / 20, rel=1e-5)
    right = (logits[hidden].argmax(-1) == batch["targets"][hidden]).float().mean()
    assert found["accuracy"] == pytest.approx(float(right))
    smooth = task(share=0.3, label_smoothing=0.5)
    assert smooth.loss(model.train(), batch).item() != pytest.approx(float(wanted), rel=1e-3)


def test_a_tokenizer_without_mask_is_refused() -> None:
    data = SimpleNamespace(tokenizer=SimpleNamespace(vocab=9, end=0, mask=None, special=frozenset({0})))
    with pytest.raises(UserError, match="data.mask: true"):
        MaskedLM().prepared(data)
    with pytest.raises(UserError, match="share must be above 0"):
        MaskedLM(share=0.0)
    with pytest.raises(UserError, match="together at most 1"):
        MaskedLM(masked=0.8, random=0.3)
