"""CLIP's folders: vectors and scale equal those of transformers, read and written."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from scrimp.data.tokenizer import bytes_tokenizer
from scrimp.errors import UserError
from scrimp.models import hub
from scrimp.models.presets import PRESETS
from scrimp.models.two_towers import TwoTowers, TwoTowersConfig
from scrimp.weights import initialize

transformers: Any = import_module("transformers")
Recorder = Callable[[str, object], None]

TEXT = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 20, "eos_token_id": 95}  # fmt: skip
VISION = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 3,
          "image_size": 24, "patch_size": 8}  # fmt: skip
LENGTHS = torch.tensor([12, 5, 9])
ATTENDED = torch.arange(12)[None] < LENGTHS[:, None]
TOKENS = (torch.arange(36).view(3, 12) * 7 % 90).scatter(1, LENGTHS[:, None] - 1, 95)
IMAGES = torch.sin(torch.arange(3 * 3 * 24 * 24) * 0.37).view(3, 3, 24, 24)


def theirs(**changes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config=TEXT | changes, vision_config=VISION | changes, projection_dim=20, logit_scale_init_value=2.0
    )
    model = transformers.CLIPModel(config)
    for p in model.parameters():  # norms and biases too, so that a mix-up shows
        p.data.add_(0.1 * torch.randn_like(p))
    return model.eval()


def named(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters())


@torch.no_grad()
def differences(a: Any, b: nn.Module) -> float:
    """The largest of image vectors, text vectors and logits."""
    x = a(input_ids=TOKENS, pixel_values=IMAGES, attention_mask=ATTENDED.long())
    images, texts, scale = b(IMAGES, TOKENS, ATTENDED)
    assert float(x.text_embeds.std()) > 0.01 and float(x.image_embeds.std(0).max()) > 0.001
    pairs = ((x.image_embeds, images), (x.text_embeds, texts), (x.logits_per_image, scale * images @ texts.T))
    return max(float((p - q).abs().max()) for p, q in pairs)


@pytest.mark.parametrize("changes", [{}, {"hidden_act": "gelu", "layer_norm_eps": 1e-3}], ids=str)
def test_vectors_equal_both_ways(changes: dict[str, Any], tmp_path: Path, record_property: Recorder) -> None:
    model = theirs(**changes)
    model.save_pretrained(tmp_path / "in")
    assert hub.read_kind(tmp_path / "in") == "two_towers"
    read = hub.loaded(tmp_path / "in").eval()
    assert isinstance(read, TwoTowers)
    into = differences(model, read)
    assert hub.write(tmp_path / "out", read.config, named(read)) == "clip"
    path = tmp_path / "out/config.json"
    raw = json.loads(path.read_text())
    raw["text_config"]["eos_token_id"] = 95  # without a tokenizer, nothing says which token ends a text
    path.write_text(json.dumps(raw))
    back, info = transformers.CLIPModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    back = differences(back.eval(), read)
    record_property("case", "clip" + ("-" + "-".join(map(str, changes.values())) if changes else ""))
    record_property("read", into)
    record_property("written", back)
    assert max(into, back) < 1e-5
    a, b = (load_file(tmp_path / place / "model.safetensors") for place in ("in", "out"))
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert TwoTowersConfig(**hub.read_config(tmp_path / "out")) == read.config


def test_a_written_folder_reads_texts_at_their_end(tmp_path: Path) -> None:
    config = TwoTowersConfig(**{**hub_options(), "vocab": 257})
    model = config.build()
    initialize(model, 0)
    hub.write(tmp_path / "out", config, named(model), bytes_tokenizer())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    inputs = tokenizer(["a cat", "two dogs"], return_tensors="pt", padding=True)
    assert inputs["input_ids"][0].tolist() == [*b"a cat", 256, 256, 256, 256]
    back = transformers.CLIPModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        x = back(**inputs, pixel_values=IMAGES[:2]).text_embeds
        _, y, _ = model.eval()(None, inputs["input_ids"], torch.arange(9)[None] < torch.tensor([[6], [9]]))
    assert float((x - y).abs().max()) < 1e-5


def hub_options() -> dict[str, Any]:
    return {"layers": 1, "width": 32, "heads": 4, "context": 20, "image": 24, "channels": 3, "patch": 8,
            "projection": 20, "activation": "quick_gelu"}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "vision", "words"),
    [
        ({"hidden_act": "gelu"}, {}, "`hidden_act` is gelu in one tower and quick_gelu in the other"),
        ({}, {"image_size": [24, 32]}, r"`image_size` is \[24, 32\]"),
        ({"hidden_act": "silu"}, {"hidden_act": "silu"}, "activation `silu`"),
    ],
    ids=str,
)
def test_what_the_model_does_not_do_is_refused(
    text: dict[str, Any], vision: dict[str, Any], words: str, tmp_path: Path
) -> None:
    raw = {"model_type": "clip", "text_config": TEXT | text, "vision_config": VISION | vision}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=words):
        hub.read_config(tmp_path)


def test_a_model_that_is_no_clip_is_not_written(tmp_path: Path) -> None:
    config = TwoTowersConfig(**{**hub_options(), "norm": "rmsnorm", "vocab": 20})
    with pytest.raises(UserError, match="cannot hold a model with `norm: rmsnorm`"):
        hub.write(tmp_path / "out", config, {})


@pytest.mark.parametrize(("preset", "count"), [("clip-base-32", 151_277_313), ("clip-large-14", 427_616_513)])
def test_presets_are_the_papers(preset: str, count: int) -> None:
    config = TwoTowersConfig(**PRESETS[preset])
    with torch.device("meta"):
        assert sum(p.numel() for p in config.build().parameters()) == count
