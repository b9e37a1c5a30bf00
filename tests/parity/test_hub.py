"""Hugging Face folders: logits equal transformers' both ways, and misfits are told by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from scrimp.errors import UserError
from scrimp.models import hub
from scrimp.models.presets import expand
from scrimp.models.transformer import TransformerConfig
from scrimp.weights import initialize, materialize

SMALL = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 64}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16, "rope_theta": 10000.0}  # fmt: skip
CASES = {
    "gpt2": transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gpt2-untied": transformers.GPT2Config(
        vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, tie_word_embeddings=False, n_inner=40
    ),
    "llama": transformers.LlamaConfig(**SMALL, num_key_value_heads=2),
    "llama-tied": transformers.LlamaConfig(**SMALL, tie_word_embeddings=True, head_dim=16),
    "llama3-rope": transformers.LlamaConfig(**SMALL, rope_parameters=LLAMA3),
    "mistral": transformers.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=None),
    "qwen2": transformers.Qwen2Config(**SMALL, num_key_value_heads=2),
    "qwen3": transformers.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True),
}
TOKENS = torch.arange(2 * 40).view(2, 40) * 7 % 96


def theirs(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CASES[name])
    for p in model.parameters():  # norms and biases too, so that a mix-up shows
        p.data.add_(0.1 * torch.randn_like(p))
    return model.eval()


def difference(a: torch.nn.Module, b: torch.nn.Module) -> float:
    with torch.no_grad():
        return float((a(TOKENS).logits - b(TOKENS)).abs().max())


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_both_ways(name: str, tmp_path: Path) -> None:
    model = theirs(name)
    model.save_pretrained(tmp_path / "in")
    ours = hub.loaded(tmp_path / "in")
    into = difference(model, ours)
    named = dict(ours.named_parameters())
    hub.write(tmp_path / "out", ours.config, named)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    out = difference(again.eval(), ours)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    print(f"{name:12} in {into:.1e} out {out:.1e}")
    assert into < 1e-5
    assert out < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_shards_are_read_and_written(name: str, tmp_path: Path) -> None:
    model = theirs(name)
    model.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    assert (tmp_path / "in/model.safetensors.index.json").exists()
    ours = hub.loaded(tmp_path / "in")
    assert difference(model, ours) < 1e-5
    hub.write(tmp_path / "out", ours.config, dict(ours.named_parameters()), shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("model-*"))) > 1
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert difference(again, ours) < 1e-5


def test_our_own_model_loads_in_transformers(tmp_path: Path) -> None:
    config = TransformerConfig(vocab=96, context=64, layers=2, width=32, heads=4)
    with torch.device("meta"):
        model = config.build()
    model = materialize(model, torch.device("cpu"))
    initialize(model, 0)
    hub.write(tmp_path / "out", config, dict(model.named_parameters()))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert difference(again, model) < 1e-5


def test_a_folder_that_does_not_fit_names_every_tensor(tmp_path: Path) -> None:
    theirs("llama").save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    del held["model.norm.weight"]
    held["model.extra"] = torch.zeros(1)
    held["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as error:
        hub.loaded(tmp_path)
    text = str(error.value)
    assert "missing: model.norm.weight" in text
    assert "unexpected: model.extra" in text
    assert "model.layers.0.mlp.up_proj.weight [3, 3] instead of [48, 32]" in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "lama"}, "Did you mean llama"),
        ({"hidden_act": "relu"}, "activation `relu`"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "`yarn`"),
        ({"attention_bias": True}, "biases"),
        ({"model_type": "mistral", "sliding_window": 8}, "sliding window of 8"),
    ],
)
def test_what_cannot_be_done_is_refused(change: dict, words: str, tmp_path: Path) -> None:
    theirs("llama").save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=words):
        hub.read_config(tmp_path)


def test_a_foreign_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    config = TransformerConfig(vocab=96, context=64, layers=1, width=32, heads=4)
    with pytest.raises(UserError, match="not empty"):
        hub.write(tmp_path, config, dict(config.build().named_parameters()))
    assert (tmp_path / "notes.txt").exists()


def test_a_recipe_may_start_from_a_folder(tmp_path: Path) -> None:
    theirs("gpt2").save_pretrained(tmp_path)
    options = expand({"from": str(tmp_path), "dropout": 0.1})
    assert (options["width"], options["dropout"], options["source"]) == (32, 0.1, str(tmp_path))
