"""Hugging Face folders: what does not fit is refused, by name, and nothing of anybody's is overwritten."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scrimp.errors import UserError
from scrimp.models import hub, hub_files
from scrimp.models.presets import expand
from scrimp.models.transformer import Transformer, TransformerConfig
from scrimp.weights import initialize

LLAMA = {"norm": "rmsnorm", "positions": "rotary", "activation": "swiglu", "bias": False, "tied": False}
TINY = {"vocab": 96, "context": 64, "layers": 2, "width": 32, "heads": 4, "hidden": 48}
THEIR_LLAMA = {"model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48,
               "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}  # fmt: skip
THEIR_GPT2 = {"model_type": "gpt2", "vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


def fresh(**options: Any) -> Transformer:
    model = TransformerConfig(**{**TINY, **options}).build()
    initialize(model, 0)
    return model


def named(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def saved(folder: Path, **options: Any) -> Transformer:
    """A Llama of ours in a folder."""
    model = fresh(**{**LLAMA, **options})
    hub.write(folder, model.config, named(model))
    return model


def config_json(folder: Path, raw: dict[str, Any], changes: dict[str, Any]) -> None:
    """None removes a key."""
    raw = {k: v for k, v in (raw | changes).items() if v is not None}
    (folder / "config.json").write_text(json.dumps(raw))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, named(b)[n]) for n, x in named(a).items())


def test_a_folder_that_does_not_fit_names_every_tensor(tmp_path: Path) -> None:
    saved(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    del held["model.norm.weight"], held["model.layers.1.self_attn.k_proj.weight"]
    held["model.extra"] = torch.zeros(1)
    held["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as error:
        hub.loaded(tmp_path)
    text = str(error.value)
    assert "missing: model.norm.weight, model.layers.1.self_attn.k_proj.weight;" in text
    assert "unexpected: model.extra;" in text
    assert "misshapen: model.layers.0.mlp.up_proj.weight [3, 3] instead of [48, 32]." in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "lama"}, "Did you mean llama"),
        ({"hidden_act": "relu"}, "activation `relu`"),
        ({"hidden_size": None}, "does not say hidden_size"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "`yarn`"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "`linear`"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor, high_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "part of 0.5"),
        ({"attention_bias": True}, "biases in the attention"),
        ({"mlp_bias": True}, "biases in the MLP"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized"),
        ({"model_type": "qwen3", "attention_bias": True}, "biases in the attention"),
        ({"model_type": "mistral", "sliding_window": 8, "use_sliding_window": False}, "sliding window of 8"),
        ({"model_type": "mistral", "max_position_embeddings": 8192}, "sliding window of 4096"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "sliding window of 8",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(changes: dict, words: str, tmp_path: Path) -> None:
    config_json(tmp_path, THEIR_LLAMA, {})
    assert hub.read_config(tmp_path)["width"] == 32
    config_json(tmp_path, THEIR_LLAMA, changes)
    with pytest.raises(UserError, match=words) as error:
        hub.read_config(tmp_path)
    assert "config.json" in error.value.where


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"scale_attn_weights": False}, "scale_attn_weights"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"activation_function": "silu"}, "activation `silu`"),
    ],
)
def test_what_gpt2_cannot_do_is_refused(changes: dict, words: str, tmp_path: Path) -> None:
    config_json(tmp_path, THEIR_GPT2, changes)
    with pytest.raises(UserError, match=words):
        hub.read_config(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", None, "there is no config.json"),
        ("config.json", "{", "not valid JSON"),
        ("config.json", "[]", "not a JSON object"),
        ("model.safetensors", None, "model.safetensors is missing"),
        ("model.safetensors", "half a file", "not a safetensors file"),
        (hub.INDEX, '{"weight_map": {"a": "model-2.safetensors"}}', "model-2.safetensors is missing"),
    ],
)
def test_damaged_folders_are_told(file: str, content: str | None, words: str, tmp_path: Path) -> None:
    saved(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=words):
        hub.loaded(tmp_path)


@pytest.mark.parametrize(
    ("options", "family", "option"),
    [
        ({"positions": "rotary"}, "", "positions"),
        ({"norm_at": "post"}, "", "norm_at"),
        ({"causal": False}, "", "causal"),
        ({"bias": False}, "", "bias"),
        ({"qkv_bias": False}, "", "qkv_bias"),
        ({"kv_heads": 2}, "", "kv_heads"),
        ({"head_width": 16}, "", "head_width"),
        ({"activation": "swiglu"}, "", "activation"),
        ({**LLAMA, "bias": True}, "", "bias"),
        ({**LLAMA, "activation": "gelu"}, "", "activation"),
        ({**LLAMA, "qkv_bias": True, "qk_norm": True}, "", "qkv_bias"),
        (LLAMA, "gpt2", "norm"),
        (LLAMA, "qwen2", "family"),
        (LLAMA, "lama", "family"),
    ],
    ids=str,
)
def test_what_no_family_can_hold_is_refused(options: dict, family: str, option: str, tmp_path: Path) -> None:
    model = fresh(**options)
    with pytest.raises(UserError) as error:
        hub.write(tmp_path / "out", model.config, named(model), family=family)
    assert error.value.where.rpartition(".")[2] == option
    assert not list(tmp_path.iterdir())


def test_weights_of_another_shape_are_not_written(tmp_path: Path) -> None:
    model = fresh()
    weights = named(model)
    del weights["norm.bias"]
    weights |= {"blocks.0.mlp.up.lora_a": torch.zeros(2, 32), "blocks.1.attention.qkv.weight": torch.zeros(3, 32)}
    with pytest.raises(UserError) as error:
        hub.write(tmp_path / "out", model.config, weights)
    assert "missing: norm.bias; unexpected: blocks.0.mlp.up.lora_a; misshapen: blocks.1.attention" in str(error.value)
    hub.write(tmp_path / "out", model.config, model.state_dict())  # with the tied head, as people pass it


def test_only_our_own_folder_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = fresh(), fresh(init_std=0.5)
    out = tmp_path / "out"
    hub.write(out, first.config, named(first), shard_bytes=20_000)
    hub.write(out, second.config, named(second))
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors"]
    assert same(hub.loaded(out), second)

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(hub_files, "save_tensors", full)
        with pytest.raises(UserError, match="no space left"):
            hub.write(out, first.config, named(first))
    assert same(hub.loaded(out), second)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"not empty.*notes\.txt"):
        hub.write(out, first.config, named(first))
    with pytest.raises(UserError, match="is a file"):
        hub.write(out / "notes.txt", first.config, named(first))
    assert (out / "notes.txt").read_text() == "mine"


def test_a_recipe_may_start_from_a_folder(tmp_path: Path) -> None:
    saved(tmp_path)
    options = expand({"from": str(tmp_path), "dropout": 0.1})
    assert (options["width"], options["dropout"], options["source"]) == (32, 0.1, str(tmp_path))


def test_transformers_is_not_imported() -> None:
    code = "import sys, scrimp.models.hub; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
