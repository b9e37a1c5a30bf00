"""The encoder-decoder and its task: what sees what, what counts, and the loss by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scrimp.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from scrimp.models.generate import respond, written
from scrimp.models.seams import blocks
from scrimp.tasks.seq2seq import PairsTask
from scrimp.weights import initialize
from tiny import Letters, TinyData, example, recipe, run_of

SIZES: dict[str, Any] = {"layers": 2, "decoder_layers": 3, "width": 16, "heads": 2, "vocab": 32, "context": 12}
ITEMS = {"source": np.array([[4, 5, 0, 9], [6, 0, 9, 9]]), "source_length": np.array([3, 2]),
         "target": np.array([[7, 0, 9], [8, 3, 0]]), "target_length": np.array([2, 3])}  # fmt: skip


@dataclass(frozen=True)
class Pictured(TinyData):
    """Data that say they hold pictures, for what is refused before any is read."""

    def open(self) -> Any:
        found = super().open()
        found.gives = ("images", "captions")
        return found


def model(**options: Any) -> EncoderDecoder:
    made = EncoderDecoderConfig(**{**SIZES, "init_std": 0.2, **options}).build()
    initialize(made, 0)
    return made.eval().requires_grad_(False)


def batch() -> dict[str, Tensor]:
    return PairsTask(start=0).batch(ITEMS, np.array([3, 4]))


def test_a_batch_is_shifted_and_masked() -> None:
    found = batch()
    assert found["attended"].tolist() == [[True, True, True, False], [True, True, False, False]]
    assert found["decoder_tokens"].tolist() == [[0, 7, 0], [0, 8, 3]]
    assert found["targets"].tolist() == [[7, 0, -100], [8, 3, 0]]
    assert int(PairsTask(0).count(found)) == 5


def test_the_loss_is_summed_over_target_tokens() -> None:
    made, found = model(), batch()
    logits = made(found["tokens"], found["decoder_tokens"], attended=found["attended"])
    logs = F.log_softmax(logits, -1)
    by_hand = -(logs[0, 0, 7] + logs[0, 1, 0] + logs[1, 0, 8] + logs[1, 1, 3] + logs[1, 2, 0]).detach()
    torch.testing.assert_close(PairsTask(0).loss(made, found).detach(), by_hand)
    scores = PairsTask(0).evaluate(made, [found, found])
    assert abs(scores["loss"] - float(by_hand) / 5) < 1e-6
    assert abs(scores["perplexity"] - math.exp(float(by_hand) / 5)) < 1e-3
    right = logits.argmax(-1) == found["targets"]
    assert scores["accuracy"] == float(right.sum()) / 5 and "gap_accuracy" not in scores
    gaps = torch.tensor([[False, True, False], [True, False, True]])
    some = PairsTask(0).evaluate(made, [found | {"gaps": gaps}])
    assert some["gap_accuracy"] == float(right[gaps].sum()) / 3


def test_padding_changes_nothing() -> None:
    made, found = model(), batch()
    alone = made(found["tokens"][1:, :2], found["decoder_tokens"][1:])
    together = made(found["tokens"], found["decoder_tokens"], attended=found["attended"])[1:]
    torch.testing.assert_close(alone, together)


def test_the_decoder_sees_no_future_and_the_encoder_everything() -> None:
    made = model()
    read, out = torch.tensor([[4, 5, 6, 7]]), torch.tensor([[0, 8, 9, 3]])
    later = made(read, torch.tensor([[0, 8, 9, 20]]))
    torch.testing.assert_close(made(read, out)[:, :3], later[:, :3])
    other = made(torch.tensor([[4, 5, 6, 20]]), out)
    assert float((other - made(read, out))[:, 0].abs().max()) > 1e-4


def test_micro_batches_have_the_gradient_of_the_whole() -> None:
    data = {"model": SIZES | {"name": "encoder_decoder", "vocab": 0, "context": 0, "dropout": 0.1}, "task": "denoise"}
    grads: list[dict[str, Tensor]] = []
    for techniques in ((), (example("accumulate", parts=2),)):
        run = run_of(recipe(*techniques, dtype="float64", **data))
        assert run.backward
        given = run.batch(0)
        run.backward(given, run.task.count(given))
        grads.append({n: p.grad for n, p in run.model.named_parameters() if p.grad is not None})
    assert len(grads[0]) == len(dict(run.model.named_parameters()))
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("technique", ["fused_loss", "recompute"])
def test_techniques_reach_both_sides(technique: str) -> None:
    data = {"model": SIZES | {"name": "encoder_decoder", "vocab": 0, "context": 0}, "task": "denoise"}
    plain, changed = (run_of(recipe(*made, dtype="float64", **data)) for made in ((), (example(technique),)))
    given = plain.batch(0)
    for run in (plain, changed):
        assert run.backward
        run.backward(given, run.task.count(given))
    for (name, a), (_, b) in zip(plain.model.named_parameters(), changed.model.named_parameters(), strict=True):
        assert a.grad is not None and b.grad is not None, name
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)


def test_blocks_are_those_of_both_sides() -> None:
    assert list(blocks(model())) == [*(f"encoder.blocks.{i}" for i in range(2)),
                                     *(f"decoder.blocks.{i}" for i in range(3))]  # fmt: skip


def test_what_is_written_ends_and_fits_the_context() -> None:
    made = model()
    read = torch.tensor([4, 5, 6, 0])
    out = respond(made, read, start=0, count=50, temperature=0)
    assert len(out) == 12
    first = made(read[None], torch.tensor([[0]]))[0, -1].argmax()
    assert int(out[0]) == int(first)
    ended = respond(made, read, start=0, count=50, temperature=0, end=int(first))
    assert ended.tolist() == [int(first)]
    chances = [torch.Generator().manual_seed(3) for _ in range(2)]
    a, b = (respond(made, read, 0, 9, 1.0, chance) for chance in chances)
    assert a.tolist() == b.tolist()


def test_an_encoder_reads_the_end_after_the_prompt() -> None:
    made = model()
    text = written(made, Letters(), "cab", 5, 0.0)
    ids = respond(made, torch.tensor([*Letters().encode("cab"), 0]), 0, 5, 0, end=0).tolist()
    assert text == Letters().decode([i for i in ids if i != 0])
    assert written(nn.Linear(2, 2), Letters(), "cab", 5, 0.0) is None


def test_too_long_sequences_are_refused() -> None:
    made = model()
    with pytest.raises(ValueError, match="13 tokens exceed"):
        made(torch.zeros(1, 13, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="13 tokens exceed"):
        made(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 13, dtype=torch.int64))
    with pytest.raises(ValueError, match="`tokens` to read"):
        made(None, torch.zeros(1, 1, dtype=torch.int64))


def test_a_long_prompt_is_cut_as_in_training() -> None:
    """What is beyond the context is dropped at the end, and the end token stays."""
    made, tokenizer = model(), Letters()
    said = [written(made, tokenizer, text, 4, 0.0) for text in ("abcdefghijk", "abcdefghijk" + "z" * 9)]
    assert said[0] == said[1]
