"""BART's folders: logits equal those of transformers, read and written."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scrimp.data.tokenizer import bytes_tokenizer
from scrimp.errors import UserError
from scrimp.models import hub
from scrimp.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from scrimp.models.generate import respond
from scrimp.models.presets import PRESETS, kind_of
from scrimp.weights import initialize

transformers: Any = import_module("transformers")
Recorder = Callable[[str, object], None]

SIZE = {"vocab_size": 96, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 40,
        "forced_eos_token_id": None}  # fmt: skip
READ = 4 + torch.arange(2 * 30).view(2, 30) * 7 % 90
WRITTEN = 4 + torch.arange(2 * 20).view(2, 20) * 11 % 90
ATTENDED = torch.arange(30)[None] < torch.tensor([[30], [17]])


def theirs(**changes: Any) -> Any:
    torch.manual_seed(0)
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**{**SIZE, **changes}))
    for p in model.parameters():  # norms and biases too, so that a mix-up shows
        p.data.add_(0.1 * torch.randn_like(p))
    return model.eval()


def named(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def ours(folder: Path) -> EncoderDecoder:
    model = hub.loaded(folder)
    assert isinstance(model, EncoderDecoder) and model.head.weight is model.embed.weight
    return model.eval()


def reopened(folder: Path) -> Any:
    """What transformers reads from our folder; it must find every tensor and no other."""
    model, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@torch.no_grad()
def difference(a: Any, b: EncoderDecoder) -> float:
    x = a(input_ids=READ, attention_mask=ATTENDED.long(), decoder_input_ids=WRITTEN).logits
    y = b(READ, WRITTEN, attended=ATTENDED)
    assert float(x.std()) > 0.01
    return float((x - y).abs().max())


@pytest.mark.parametrize("changes", [{}, {"activation_function": "relu", "decoder_layers": 2}], ids=str)
def test_logits_equal_both_ways(changes: dict[str, Any], tmp_path: Path, record_property: Recorder) -> None:
    model = theirs(**changes)
    model.save_pretrained(tmp_path / "in")
    assert hub.read_kind(tmp_path / "in") == "encoder_decoder"
    assert kind_of({"from": str(tmp_path / "in")}) == "encoder_decoder"
    read = ours(tmp_path / "in")
    into = difference(model, read)
    assert hub.write(tmp_path / "out", read.config, named(read)) == "bart"
    back = difference(reopened(tmp_path / "out"), read)
    record_property("case", "bart" + ("-" + "-".join(map(str, changes.values())) if changes else ""))
    record_property("read", into)
    record_property("written", back)
    assert max(into, back) < 1e-5
    a, b = (load_file(tmp_path / place / "model.safetensors") for place in ("in", "out"))
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert EncoderDecoderConfig(**hub.read_config(tmp_path / "out")) == read.config


def test_the_summed_loss_is_that_of_their_labels(tmp_path: Path) -> None:
    model = theirs()
    model.save_pretrained(tmp_path)
    targets = torch.cat([WRITTEN[:, 1:], torch.full((2, 1), -100)], 1)
    with torch.no_grad():
        mean = model(input_ids=READ, decoder_input_ids=WRITTEN, labels=targets).loss
        loss = ours(tmp_path)(READ, WRITTEN, targets)
    assert float((loss / (targets != -100).sum() - mean).abs()) < 1e-5


def test_what_is_written_equals_theirs(tmp_path: Path) -> None:
    model = theirs()
    model.save_pretrained(tmp_path)
    out = respond(ours(tmp_path), READ[0], start=2, count=12, temperature=0)
    expected = model.generate(READ[:1], max_new_tokens=12, min_new_tokens=12, num_beams=1, do_sample=False,
                              decoder_start_token_id=2, eos_token_id=None, forced_eos_token_id=None)  # fmt: skip
    assert expected[0, 1:].tolist() == out.tolist()


def test_a_base_model_and_copies_of_the_embedding_are_read(tmp_path: Path) -> None:
    model = theirs()
    model.model.save_pretrained(tmp_path)
    assert difference(model, ours(tmp_path)) < 1e-5
    held = load_file(tmp_path / "model.safetensors")
    held["encoder.embed_tokens.weight"] = held["shared.weight"].clone()
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    assert difference(model, ours(tmp_path)) < 1e-5
    held["encoder.embed_tokens.weight"][0, 0] += 1
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="differs from the embedding"):
        hub.loaded(tmp_path)


def test_a_bias_of_logits_that_is_not_zero_is_refused(tmp_path: Path) -> None:
    model = theirs()
    model.final_logits_bias += 1
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="final_logits_bias is not zero"):
        hub.loaded(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scale_embedding": True}, "`scale_embedding` is True"),
        ({"decoder_ffn_dim": 64}, "`decoder_ffn_dim` is 64 and `encoder_ffn_dim` 48"),
        ({"activation_function": "silu"}, "activation `silu`"),
        ({"tie_word_embeddings": False}, "`tie_word_embeddings` is False"),
        ({"d_model": None}, "does not say d_model"),
    ],
    ids=str,
)
def test_what_the_model_does_not_do_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SIZE, "model_type": "bart", **changes}))
    with pytest.raises(UserError, match=words):
        hub.read_config(tmp_path)


def test_a_model_that_is_no_bart_is_not_written(tmp_path: Path) -> None:
    config = EncoderDecoderConfig(layers=1, width=16, heads=2, vocab=20, context=8)
    model = config.build()
    initialize(model, 0)
    with pytest.raises(UserError, match="cannot hold a model with `norm_at: pre`"):
        hub.write(tmp_path / "out", config, named(model))
    with pytest.raises(UserError, match=r"no folder of gpt2 can hold the model `encoder_decoder`. Use bart."):
        hub.write(tmp_path / "out", config, named(model), family="gpt2")


def test_a_written_folder_generates_by_itself(tmp_path: Path) -> None:
    config = EncoderDecoderConfig(**{**PRESETS["bart-1m"], "vocab": 257, "context": 24, "width": 32})
    model = config.build()
    initialize(model, 0)
    hub.write(tmp_path / "out", config, named(model), bytes_tokenizer())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    inputs = tokenizer(["read this"], return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == [*b"read this", 256]
    out = reopened(tmp_path / "out").generate(**inputs, max_new_tokens=6, do_sample=False)
    assert out[0, 0] == 256
    mine = respond(model.eval(), inputs["input_ids"][0], 256, 6, 0, end=256)  # type: ignore[arg-type]
    assert out[0, 1:].tolist() == mine.tolist()


def test_a_cache_changes_nothing(tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path)
    model = ours(tmp_path)
    with torch.no_grad():
        whole = model(READ, WRITTEN)
        states = model.encode(READ)
        cache: list[list[Tensor]] = [[] for _ in range(model.config.depth)]
        parts = [model(None, token, states=states, cache=cache) for token in WRITTEN.split(1, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("preset", ["bart-base", "bart-large"])
def test_presets_are_the_papers(preset: str) -> None:
    config = EncoderDecoderConfig(**PRESETS[preset])
    with torch.device("meta"):
        count = sum(p.numel() for p in config.build().parameters())
        known = transformers.BartConfig(**hub.format_of("bart").options_to(config))
        other = sum(p.numel() for p in transformers.BartForConditionalGeneration(known).parameters())
    assert count == other == {"bart-base": 139_420_416, "bart-large": 406_291_456}[preset]
