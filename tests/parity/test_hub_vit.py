"""ViT and ViTMAE folders: outputs equal those of transformers, read and written."""

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

from scrimp.data.pixels import Processor
from scrimp.errors import UserError
from scrimp.models import hub, hub_vit
from scrimp.models.masked_autoencoder import MaskedAutoencoderConfig
from scrimp.models.presets import PRESETS
from scrimp.models.vision import VisionConfig
from scrimp.restore import adopted
from scrimp.tasks.masked_image import MaskedImage
from scrimp.weights import initialize

transformers: Any = import_module("transformers")
Recorder = Callable[[str, object], None]

SIZE: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 12,
    "patch_size": 4, "num_channels": 3,
}  # fmt: skip
DECODER = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2,
           "decoder_intermediate_size": 24}  # fmt: skip
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "classes": ("ViTForImageClassification", "vit", {**SIZE, "num_labels": 5}),
    "options": ("ViTForImageClassification", "vit", {**SIZE, "num_labels": 3, "num_channels": 1, "qkv_bias": False,
                                                     "hidden_act": "gelu_new", "layer_norm_eps": 1e-2}),
    "base": ("ViTModel", "vit", SIZE),
    "mae": ("ViTMAEForPreTraining", "vit_mae", {**SIZE, **DECODER, "norm_pix_loss": True}),
}  # fmt: skip
IMAGES = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(0))
NOISE = torch.rand(3, 9, generator=torch.Generator().manual_seed(1))
OURS: dict[str, Any] = {"image": 12, "patch": 4, "channels": 3, "layers": 2, "width": 32, "heads": 4}
MAE: dict[str, Any] = {"decoder_layers": 1, "decoder_width": 16, "decoder_heads": 2, "positions": "sincos"}


def theirs(case: str) -> Any:
    name, family, options = CASES[case]
    torch.manual_seed(0)
    model = getattr(transformers, name)(transformers.AutoConfig.for_model(family, **options))
    for p in model.parameters():  # norms, biases and fixed positions too, so that a mix-up shows
        p.data.add_(0.1 * torch.randn_like(p))
    return model.eval()


def reopened(folder: Path) -> Any:
    """What transformers reads from our folder; it must find every tensor and no other."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    """Logits, pooled states or predicted patches, the latter as transformers orders their values."""
    config: Any = model.config
    channels = getattr(config, "num_channels", None) or config.channels
    images = IMAGES[:, :channels]
    if isinstance(config, MaskedAutoencoderConfig):
        order = NOISE.argsort(1)
        found = model(images, order[:, : int(9 * 0.25)], order.argsort(1))
        return found.view(3, 9, 3, 4, 4).permute(0, 1, 3, 4, 2).flatten(2)
    if isinstance(config, VisionConfig):
        return model(images)
    found = model(images, noise=NOISE) if "mae" in config.model_type else model(images)
    return found.logits if "logits" in found else found.pooler_output


def difference(a: nn.Module, b: nn.Module) -> float:
    x, y = outputs(a), outputs(b)
    assert x.shape == y.shape and float(x.std()) > 0.01
    return float((x - y).abs().max())


def named(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters())


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_transformers_both_ways(case: str, tmp_path: Path, record_property: Recorder) -> None:
    model = theirs(case)
    model.save_pretrained(tmp_path / "in")
    read = hub.loaded(tmp_path / "in")
    assert hub.read_kind(tmp_path / "in") == ("masked_autoencoder" if case == "mae" else "vision")
    into = difference(model, read)
    assert hub.write(tmp_path / "out", read.config, named(read)) == CASES[case][1]
    back = difference(reopened(tmp_path / "out"), read)
    record_property("case", f"vit-{case}")
    record_property("read", into)
    record_property("written", back)
    assert max(into, back) < 1e-5
    assert difference(hub.loaded(tmp_path / "out"), read) == 0.0


@pytest.mark.parametrize(
    "config",
    [
        VisionConfig(**OURS, head="classes", classes=4),
        VisionConfig(**OURS, head="none", pooler=True),
        VisionConfig(**OURS, head="classes", classes=2, positions="sincos", activation="relu", qkv_bias=False),
        MaskedAutoencoderConfig(**OURS, **MAE),
    ],
    ids=str,
)
def test_our_own_models_load_in_transformers(config: Any, tmp_path: Path) -> None:
    model = config.build()
    initialize(model, 0)
    hub.write(tmp_path / "out", config, named(model))
    assert difference(reopened(tmp_path / "out"), model) < 1e-5


def test_classes_and_normalization_come_along(tmp_path: Path) -> None:
    config = VisionConfig(**OURS, head="classes", classes=2)
    model = config.build()
    initialize(model, 0)
    hub.write(tmp_path / "out", config, named(model), Processor(12, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2), ("cat", "dog")))
    assert reopened(tmp_path / "out").config.id2label == {0: "cat", 1: "dog"}
    said = json.loads((tmp_path / "out/preprocessor_config.json").read_text())
    assert said["size"] == {"height": 12, "width": 12} and said["image_mean"] == [0.5, 0.4, 0.3]
    hub.write(tmp_path / "out", config, named(model))  # ours to replace
    assert not (tmp_path / "out/preprocessor_config.json").exists()


def test_the_loss_is_that_of_transformers() -> None:
    model = theirs("mae")
    order = NOISE.argsort(1)
    batch = {"images": IMAGES, "kept": order[:, :2], "restore": order.argsort(1)}
    task = MaskedImage(patch=4)
    with torch.no_grad():
        found = model(IMAGES, noise=NOISE)
    values = found.logits.view(3, 9, 4, 4, 3).permute(0, 1, 4, 2, 3).flatten(2)
    given: Any = lambda *inputs: values  # noqa: E731
    loss = task.loss(given, {**batch, "sample": torch.arange(3)}) / task.count(batch)
    torch.testing.assert_close(loss, found.loss)


def test_fixed_positions_are_those_of_transformers() -> None:
    name, family, options = CASES["mae"]
    model = getattr(transformers, name)(transformers.AutoConfig.for_model(family, **options))
    embeddings = model.vit.embeddings
    embeddings.patch_embeddings.projection._is_hf_initialized = False  # which leaves zeros in transformers 5
    for part, fill in ((embeddings, embeddings.initialize_weights), (model.decoder, model.decoder.initialize_weights)):
        for p in part.parameters(recurse=False):
            p._is_hf_initialized = False
        fill(*([9] if part is model.decoder else []))
    ours = MaskedAutoencoderConfig(**OURS, **MAE).build()
    initialize(ours, 0)
    torch.testing.assert_close(ours.positions.weight, embeddings.position_embeddings[0])
    torch.testing.assert_close(ours.decoder.positions.weight, model.decoder.decoder_pos_embed[0])
    assert not ours.positions.weight.requires_grad


def test_published_names_of_the_decoder_are_read(tmp_path: Path) -> None:
    model = theirs("mae")
    model.save_pretrained(tmp_path)
    held = {n.replace("decoder_encoder.layer", "decoder_layers"): t
            for n, t in load_file(tmp_path / "model.safetensors").items()}  # fmt: skip
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert difference(model, hub.loaded(tmp_path)) < 1e-5


def test_another_head_leaves_the_folders_own(tmp_path: Path) -> None:
    theirs("classes").save_pretrained(tmp_path)
    own = hub.own_config(tmp_path, None)
    given = hub.read_weights(tmp_path, own)
    taken = adopted(given, own, replace(own, classes=7))
    assert given.keys() - taken.keys() == {"head.weight", "head.bias"}
    assert adopted(given, own, own).keys() == given.keys()


def test_a_masked_autoencoders_folder_gives_its_encoder(tmp_path: Path) -> None:
    model = theirs("mae")
    model.save_pretrained(tmp_path)
    options = hub_vit.VisionConfig.expand({"from": str(tmp_path), "head": "none", "positions": "learned"})  # type: ignore[operator]
    config = VisionConfig(**options)
    own = hub.own_config(tmp_path, config)
    vision = config.build()
    vision.load_state_dict(adopted(hub.read_weights(tmp_path, own), own, config))
    with torch.no_grad():
        all_kept = model.vit
        all_kept.config.mask_ratio = 0.0
        wanted = all_kept(IMAGES, noise=torch.arange(9.0).expand(3, 9)).last_hidden_state
        torch.testing.assert_close(vision.states(IMAGES), wanted, atol=1e-5, rtol=0)


def test_another_size_of_images_interpolates_as_transformers_does(tmp_path: Path) -> None:
    model = theirs("classes")
    model.save_pretrained(tmp_path)
    own = hub.own_config(tmp_path, None)
    config = replace(own, image=20)
    larger = config.build()
    larger.load_state_dict(adopted(hub.read_weights(tmp_path, own), own, config))
    images = torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = model(images, interpolate_pos_encoding=True).logits
        torch.testing.assert_close(larger(images), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("preset", ["vit-tiny", "vit-base", "deit-tiny", "mae-base"])
def test_real_sizes_have_the_tensors_of_transformers(preset: str) -> None:
    mae = preset.startswith("mae")
    kind = MaskedAutoencoderConfig if mae else VisionConfig
    more = {} if mae else {"head": "classes", "classes": 10}
    config: Any = kind(**PRESETS[preset], image=224, channels=3, **more)
    family = "vit_mae" if mae else "vit"
    raw = hub_vit.options_to(family, config)
    with torch.device("meta"):
        name = raw["architectures"][0]
        model = getattr(transformers, name)(transformers.AutoConfig.for_model(**raw))
    assert sum(p.numel() for p in model.parameters()) == sum(
        torch.Size(shape).numel() for shape in hub_vit.tensors(config).values()
    )
    published = {"vit-tiny": 5.5e6, "deit-tiny": 5.5e6, "vit-base": 85.8e6, "mae-base": 111.9e6}
    assert abs(sum(p.numel() for p in model.parameters()) / published[preset] - 1) < 0.01


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (VisionConfig(**OURS, head="none", pooling="mean"), "`pooling: mean`"),
        (VisionConfig(**OURS, head="none", activation="swiglu"), "`activation: swiglu`"),
        (MaskedAutoencoderConfig(**OURS, **{**MAE, "positions": "learned"}), "`positions: learned`"),
        (MaskedAutoencoderConfig(**OURS, **MAE, drop=False), "`drop: False`"),
    ],
    ids=str,
)
def test_what_a_folder_cannot_hold_is_refused(config: Any, said: str, tmp_path: Path) -> None:
    model = config.build()
    initialize(model, 0)
    with pytest.raises(UserError) as error:
        hub.write(tmp_path / "out", config, named(model))
    assert said in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"architectures": ["ViTForMaskedImageModeling"]},
            "`ViTForMaskedImageModeling` cannot be read",
        ),
        ({"hidden_act": "mish"}, "the activation `mish` is not known"),
        ({"image_size": [12, 16]}, "only squares are known"),
        ({"num_hidden_layers": 3}, "missing: vit.encoder.layer.2"),
    ],
)
def test_what_is_not_known_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    theirs("classes").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError) as error:
        hub.loaded(tmp_path)
    assert said in str(error.value)
