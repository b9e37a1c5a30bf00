"""The symmetric contrastive loss, against numbers written out by hand, and what must not be done to its batches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scrimp.errors import RecipeError, UserError
from scrimp.models.two_towers import TwoTowersConfig
from scrimp.recipe import Recipe
from scrimp.tasks.contrastive import Contrastive, PairingTask, paired
from scrimp.weights import initialize
from tiny import Letters, TinyData, example, recipe

MODEL = {"name": "two_towers", "layers": 1, "width": 16, "heads": 2, "patch": 8, "projection": 8}


def test_the_loss_of_two_pairs_by_hand() -> None:
    images, texts = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([[0.8, 0.6], [0.0, 1.0]])
    # Twice the products: [[1.6, 0.0], [1.92, 1.6]].
    rows = math.log(1 + math.exp(0.0 - 1.6)) + math.log(1 + math.exp(1.92 - 1.6))
    columns = math.log(1 + math.exp(1.92 - 1.6)) + math.log(1 + math.exp(0.0 - 1.6))
    assert abs(float(paired(images, texts, torch.tensor(2.0))) - (rows + columns) / 2) < 1e-6


def test_it_is_symmetric_and_at_random_the_logarithm_of_the_batch() -> None:
    u, v = (F.normalize(torch.randn(6, 4, dtype=torch.float64), dim=1) for _ in range(2))
    torch.testing.assert_close(paired(u, v, torch.tensor(9.0)), paired(v, u, torch.tensor(9.0)))
    alike = torch.ones(6, 1)
    assert abs(float(paired(alike, alike, torch.tensor(5.0))) / 6 - math.log(6)) < 1e-6


class Fixed(nn.Module):
    """Vectors that are given in place of pictures and texts."""

    def forward(self, images: Tensor | None, tokens: Tensor | None, *rest: Any) -> tuple[Any, Any, Tensor]:
        seen = None if images is None else F.normalize(images, dim=-1)
        read = None if tokens is None else F.normalize(tokens.double(), dim=-1)
        return seen, read, torch.tensor(4.0)


def test_nearest_neighbors_are_looked_for_over_all_batches() -> None:
    images = torch.eye(4, dtype=torch.float64)
    texts = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [2, 0, 1, 0], [0, 0, 0, 1]])
    ones = torch.ones(4, 4, dtype=torch.bool)
    whole = {"images": images, "tokens": texts, "attended": ones, "classes": torch.tensor([0, 1, 1, -1])}
    halves = [{name: t[i : i + 2] for name, t in whole.items()} for i in (0, 2)]
    made = PairingTask(torch.tensor([[1, 0, 0, 0], [0, 1, 1, 0]]), torch.tensor([4, 4]))
    found = made.evaluate(Fixed(), halves)
    # The third text is nearest to the first picture, which is in another batch; the first picture keeps its own.
    assert found["image_to_text"] == 1.0 and found["text_to_image"] == 0.75
    assert found["zero_shot"] == 1.0  # of the three that have a class
    u, v = F.normalize(images, dim=1), F.normalize(texts.double(), dim=1)
    each = sum(float(paired(u[i : i + 2], v[i : i + 2], torch.tensor(4.0))) for i in (0, 2))
    assert abs(found["loss"] - each / 4) < 1e-12


def test_classes_are_read_as_texts() -> None:
    @dataclass
    class Data:
        train: Any
        tokenizer: Any
        classes: tuple[str, ...] = ("ab", "c")

    @dataclass
    class Train:
        context: int = 6

    made = Contrastive(prompt="<{}>").prepared(Data(Train(), Letters()))
    assert made.prompts is not None and made.prompt_length is not None
    expected = [[*Letters().encode("<ab>"), 0, 0], [*Letters().encode("<c>"), 0, 0, 0]]
    assert made.prompts.tolist() == expected and made.prompt_length.tolist() == [5, 4]
    with pytest.raises(UserError, match="must have a place {} for the class's name"):
        Contrastive(prompt="a picture")


def towers(**options: Any) -> nn.Module:
    sizes = {"vocab": 32, "context": 8, "image": 16, "channels": 3}
    given: dict[str, Any] = {**MODEL, **sizes, **options}
    model = TwoTowersConfig(**{k: v for k, v in given.items() if k != "name"}).build()
    initialize(model, 0)
    return model.eval().requires_grad_(False)


def test_vectors_have_length_one_and_padding_does_not_count() -> None:
    model, images = towers(), torch.randn(2, 3, 16, 16)
    tokens = torch.tensor([[5, 6, 0, 9, 9], [7, 8, 9, 3, 0]])
    attended = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    seen, read, scale = model(images, tokens, attended)
    torch.testing.assert_close(seen.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(read.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(scale, torch.tensor(1 / 0.07))
    _, alone, _ = model(None, tokens[:1, :3], attended[:1, :3])
    torch.testing.assert_close(alone, read[:1])
    model.get_parameter("logit_scale").data.fill_(7.0)
    assert abs(float(model(images, None)[2]) - 100) < 1e-3


def test_patches_are_a_convolution() -> None:
    """A product of cut patches equals the convolution whose stride is its width."""
    tower = towers().get_submodule("image")
    images, weight = torch.randn(2, 3, 16, 16), tower.get_parameter("patches.weight")
    kept: list[Tensor] = []
    patches: Any = tower.get_submodule("patches")
    patches.register_forward_hook(lambda module, given, out: kept.append(out))
    tower(images)
    expected = F.conv2d(images, weight.view(16, 3, 8, 8), stride=8).flatten(2).transpose(1, 2)
    torch.testing.assert_close(kept[0], expected)


def test_the_loss_does_not_decompose() -> None:
    u, v = (F.normalize(torch.randn(4, 3, dtype=torch.float64), dim=1) for _ in range(2))
    scale = torch.tensor(5.0)
    halves = paired(u[:2], v[:2], scale) + paired(u[2:], v[2:], scale)
    assert float(paired(u, v, scale) - halves) > 0.5


def test_parts_of_a_batch_are_refused() -> None:
    words = r"techniques.accumulate: it computes a batch in parts, and the loss of the task `contrastive`"
    with pytest.raises(RecipeError, match=words):
        recipe(example("accumulate"), model=MODEL, task="contrastive")
    with pytest.raises(RecipeError, match=words):
        Recipe.read({"model": "clip-1m", "task": "contrastive", "data": {"name": "image_text", "source": "x.jsonl"},
                     "techniques": {"adamw": {}, "accumulate": {"parts": 2}}})  # fmt: skip
    recipe(example("accumulate"), model={"name": "encoder_decoder", "width": 16, "heads": 2}, task="denoise")


class Captioned(TinyData):
    """Says that it has images and captions."""

    def open(self) -> Any:
        opened = super().open()
        opened.gives = ("images", "captions", "tokens")
        return opened


def test_only_its_own_model_is_trained() -> None:
    from scrimp.agree import configured

    made = recipe(task="contrastive", data=Captioned())
    with pytest.raises(UserError, match="the task `contrastive` trains a model `two_towers`, not `transformer`"):
        configured(made, made.data.open())
    made = recipe(model=MODEL)
    with pytest.raises(UserError, match="the task `causal-lm` trains a model `transformer`, not `two_towers`"):
        configured(made, made.data.open())


def test_a_batch_keeps_its_pairs_together() -> None:
    items = {"images": np.zeros((2, 3, 4, 4), np.float32), "captions": np.array([[5, 0, 0], [6, 7, 0]]),
             "caption_length": np.array([2, 3])}  # fmt: skip
    batch = Contrastive().prepared(type("Data", (), {"tokenizer": Letters(), "train": type("T", (), {"context": 3})}))
    found = batch.batch(items, np.array([4, 9]))
    assert found["attended"].tolist() == [[True, True, False], [True, True, True]]
    assert int(batch.count(found)) == 2 and int(batch.tokens(found)) == 5 and "classes" not in found
