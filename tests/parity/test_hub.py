"""Hugging Face folders: logits equal those of transformers, read and written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scrimp.data.tokenizer import train_bpe
from scrimp.errors import UserError
from scrimp.models import hub
from scrimp.models.hub_config import options_to
from scrimp.models.hub_names import tensors
from scrimp.models.presets import KINDS, PRESETS
from scrimp.models.transformer import Transformer, TransformerConfig
from scrimp.weights import initialize, load_weights, materialize

transformers: Any = import_module("transformers")
Recorder = Callable[[str, object], None]

SIZE = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64}  # fmt: skip
GQA = {**SIZE, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 16}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", GPT2),
    "gpt2-untied": ("gpt2", {**GPT2, "tie_word_embeddings": False, "n_inner": 40, "activation_function": "gelu"}),
    "llama": ("llama", {**SIZE, "rms_norm_eps": 1e-2}),
    "llama-gqa-tied": ("llama", {**GQA, "tie_word_embeddings": True, "head_dim": 16}),
    "llama3-rope": ("llama", {**SIZE, "rope_parameters": {**SCALING, "rope_theta": 5000.0}}),
    "mistral": ("mistral", {**GQA, "sliding_window": None}),
    "qwen2": ("qwen2", {**GQA, "rope_parameters": {"rope_type": "default", "rope_theta": 700.0}}),
    "qwen3": ("qwen3", {**GQA, "head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-untied": ("qwen3", {**GQA, "head_dim": 8}),
}
LLAMA = {"norm": "rmsnorm", "positions": "rotary", "activation": "swiglu", "bias": False, "tied": False}
TINY = {"vocab": 96, "context": 64, "layers": 2, "width": 32, "heads": 4}
TOKENS = torch.arange(2 * 60).view(2, 60) * 7 % 96


def theirs(family: str, options: dict[str, Any]) -> Any:
    return perturbed(transformers.AutoConfig.for_model(family, **options))


def perturbed(config: Any) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for p in model.parameters():  # norms and biases too, so that a mix-up shows
        p.data.add_(0.1 * torch.randn_like(p))
    return model.eval()


def saved(folder: Path, case: str = "llama", **changes: Any) -> Any:
    """A model of transformers, saved, and its config.json changed; None removes a key."""
    model = theirs(*CASES[case])
    model.save_pretrained(folder)
    change(folder, **changes)
    return model


def change(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in raw.items() if k not in changes or v is not None}))


def ours(folder: Path) -> Transformer:
    """A folder's model, built as a run builds it."""
    config = TransformerConfig(**hub.read_config(folder))
    with torch.device("meta"):
        model = config.build()
    materialize(model, torch.device("cpu"))
    load_weights(model, hub.read_weights(folder, config), lambda name: True)
    assert (model.head.weight is model.embed.weight) == config.tied
    return model


def fresh(**options: Any) -> Transformer:
    model = TransformerConfig(**{**TINY, **options}).build()
    initialize(model, 0)
    return model


def named(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def reopened(folder: Path) -> Any:
    """What transformers reads from our folder; it must find every tensor and no other."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def spelled(c: TransformerConfig) -> TransformerConfig:
    """The same options, with the sizes that may be left out."""
    return replace(c, hidden=c.mlp, head_width=c.head_dim)


def difference(a: nn.Module, b: nn.Module) -> float:
    with torch.no_grad():
        x, y = (getattr(out, "logits", out) for out in (a(TOKENS), b(TOKENS)))
    assert float(x.std()) > 0.01
    return float((x - y).abs().max())


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_both_ways(case: str, tmp_path: Path, record_property: Recorder) -> None:
    model = saved(tmp_path / "in", case)
    read = ours(tmp_path / "in")
    into = difference(model, read)
    family = hub.write(tmp_path / "out", read.config, named(read), family=CASES[case][0])
    back = difference(reopened(tmp_path / "out"), read)
    record_property("case", case)
    record_property("read", into)
    record_property("written", back)
    assert family == CASES[case][0]
    assert into < 1e-5
    assert back < 1e-5
    a, b = load_file(tmp_path / "in/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert spelled(TransformerConfig(**hub.read_config(tmp_path / "out"))) == spelled(read.config)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation": "gelu_tanh", "tied": False},
        {"activation": "relu", "hidden": 48},
        LLAMA,
        {**LLAMA, "tied": True, "kv_heads": 2},
        {**LLAMA, "heads": 5, "head_width": 8},
        {**LLAMA, "qkv_bias": True},
        {**LLAMA, "qk_norm": True, "head_width": 16},
    ],
    ids=str,
)
def test_our_own_models_load_in_transformers(options: dict[str, Any], tmp_path: Path) -> None:
    model = fresh(**options)
    family = hub.write(tmp_path / "out", model.config, named(model))
    again = reopened(tmp_path / "out")
    assert again.config.model_type == family
    assert difference(again, model) < 1e-5
    assert difference(ours(tmp_path / "out"), model) == 0.0


@pytest.mark.parametrize("case", ["gpt2", "llama-gqa-tied"])
def test_shards_are_read_and_written(case: str, tmp_path: Path) -> None:
    model = theirs(*CASES[case])
    model.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    assert (tmp_path / "in" / hub.INDEX).exists()
    read = ours(tmp_path / "in")
    assert difference(model, read) < 1e-5
    hub.write(tmp_path / "out", read.config, named(read), shard_bytes=20_000)
    index = json.loads((tmp_path / "out" / hub.INDEX).read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in named(read).values())
    assert difference(reopened(tmp_path / "out"), read) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["gpt2", "llama"])
def test_half_precision_files_keep_their_type(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    theirs(*CASES[case]).to(dtype).save_pretrained(tmp_path / "in")
    wide = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "in", dtype=torch.float32).eval()
    config = TransformerConfig(**hub.read_config(tmp_path / "in"))
    weights = hub.read_weights(tmp_path / "in", config)
    assert {t.dtype for t in weights.values()} == {dtype}
    assert difference(hub.loaded(tmp_path / "in"), wide) < 1e-5
    hub.write(tmp_path / "out", config, weights)
    assert reopened(tmp_path / "out").dtype == dtype
    raw = json.loads((tmp_path / "out/config.json").read_text())
    assert raw["dtype"] == raw["torch_dtype"] == str(dtype).removeprefix("torch.")
    a, b = load_file(tmp_path / "in/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("scaling", [None, SCALING, {**SCALING, "type": "llama3"}])
def test_rotary_settings_of_earlier_versions(scaling: dict[str, Any] | None, tmp_path: Path) -> None:
    if scaling and "type" in scaling:  # before 4.43
        scaling = {key: value for key, value in scaling.items() if key != "rope_type"}
    saved(tmp_path / "in", rope_parameters=None, rope_theta=700.0, rope_scaling=scaling)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "in").eval()
    read = ours(tmp_path / "in")
    assert (read.config.rope_base, bool(read.config.rope_scaling)) == (700.0, bool(scaling))
    assert difference(model, read) < 1e-5
    hub.write(tmp_path / "out", read.config, named(read))
    change(tmp_path / "out", rope_parameters=None)  # as they read it
    assert difference(reopened(tmp_path / "out"), read) < 1e-5


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("mistral", {"sliding_window": 64}),
        ("mistral", {"num_attention_heads": 16, "num_key_value_heads": None, "head_dim": 8}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2, "layer_types": None}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 8}),
        ("qwen3", {"head_dim": None, "num_key_value_heads": 4}),
        ("gpt2", {"activation_function": "gelu_pytorch_tanh", "n_inner": None, "tie_word_embeddings": None}),
    ],
)
def test_absent_and_idle_settings_mean_what_they_mean_there(case: str, changes: dict, tmp_path: Path) -> None:
    saved(tmp_path / "in", case, **changes)
    model = perturbed(transformers.AutoConfig.from_pretrained(tmp_path / "in"))
    model.save_pretrained(tmp_path / "weights")
    (tmp_path / "weights/model.safetensors").replace(tmp_path / "in/model.safetensors")
    assert difference(model, ours(tmp_path / "in")) < 1e-5


def test_base_models_buffers_and_tied_heads_are_read(tmp_path: Path) -> None:
    model = saved(tmp_path, "gpt2")
    held = {n.removeprefix("transformer."): t for n, t in load_file(tmp_path / "model.safetensors").items()}
    held |= {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "lm_head.weight": held["wte.weight"].clone()}
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert difference(model, ours(tmp_path)) < 1e-5
    held["lm_head.weight"][0] += 1
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="differs from the embedding"):
        ours(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mapped files")
def test_weights_stay_on_disk_until_they_are_used(tmp_path: Path) -> None:
    saved(tmp_path, "gpt2")
    weights = hub.read_weights(tmp_path, TransformerConfig(**hub.read_config(tmp_path)))
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    spans = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]
    off = [n for n, t in weights.items() if not any(a <= t.data_ptr() < b for a, b in spans)]
    assert not off


@pytest.mark.parametrize(
    ("options", "auto"), [({}, True), (LLAMA, True), ({**LLAMA, "qk_norm": True}, True),
                          ({**LLAMA, "qkv_bias": True}, False)], ids=str,
)  # fmt: skip
def test_the_tokenizer_comes_along(options: dict, auto: bool, tmp_path: Path) -> None:
    text = "hello world, it's  2024!\n"
    tokenizer = train_bpe(iter([text * 20]), 300)
    model = fresh(**{**options, "vocab": tokenizer.vocab})
    hub.write(tmp_path / "out", model.config, named(model), tokenizer)
    kind = transformers.AutoTokenizer if auto else transformers.PreTrainedTokenizerFast
    read = kind.from_pretrained(tmp_path / "out")
    assert read(text)["input_ids"] == [tokenizer.end, *tokenizer.encode(text)]
    assert (read.eos_token_id, read.bos_token_id) == (tokenizer.end, tokenizer.end)
    assert "token_type_ids" not in read(text)
    again = reopened(tmp_path / "out")
    assert (again.config.bos_token_id, again.config.eos_token_id) == (tokenizer.end, tokenizer.end)
    assert again.config.pad_token_id is None  # or transformers would freeze that row of the embedding
    assert again.generation_config.pad_token_id == tokenizer.end
    prompt = torch.tensor([tokenizer.encode("hello")])
    out = again.generate(prompt, max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        assert out[0, prompt.shape[1]] == model(prompt)[0, -1].argmax()


@pytest.mark.parametrize("preset", [n for n, options in PRESETS.items() if "vocab" in options and n not in KINDS])
def test_real_sizes_have_the_tensors_of_transformers(preset: str) -> None:
    config = TransformerConfig(**PRESETS[preset])
    family = "gpt2" if preset.startswith("gpt") else "llama"
    raw = options_to(family, config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**raw))
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    if config.tied:
        del shapes["lm_head.weight"]
    assert tensors(family, config) == shapes


def test_the_published_form_of_gpt2_is_the_preset(tmp_path: Path) -> None:
    published = {"model_type": "gpt2", "activation_function": "gelu_new", "vocab_size": 50257, "n_positions": 1024,
                 "n_ctx": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(published))
    assert TransformerConfig(**hub.read_config(tmp_path)) == TransformerConfig(**PRESETS["gpt2-small"])
