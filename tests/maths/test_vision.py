"""The vision model: patches against a convolution, pooling, positions of another grid, and a run of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from scrimp.errors import UserError
from scrimp.models.patches import resampled, sincos, unfolded
from scrimp.models.vision import Vision, VisionConfig
from scrimp.weights import initialize

SIZE: dict[str, Any] = {"image": 8, "patch": 4, "channels": 3, "layers": 2, "width": 16, "heads": 2}


def made(**options: Any) -> Vision:
    model = VisionConfig(**{**SIZE, **options}).build().double()
    initialize(model, 0)
    return model.eval()


def images(count: int = 2, side: int = 8) -> torch.Tensor:
    return torch.randn(count, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def test_patches_are_squares_row_by_row() -> None:
    image = torch.arange(2 * 4 * 6.0).view(1, 2, 4, 6)
    found = unfolded(image, 2)
    assert found.shape == (1, 6, 8)
    # The square in row 1, column 2: rows 2 to 3 and columns 4 to 5 of either channel.
    assert found[0, 5].tolist() == [16, 17, 22, 23, 40, 41, 46, 47]


def test_patches_through_the_linear_layer_are_a_convolution() -> None:
    layer = made(head="none").patches
    x = images()
    wanted = F.conv2d(x, layer.weight.view(16, 3, 4, 4), layer.bias, stride=4).flatten(2).mT
    torch.testing.assert_close(layer(unfolded(x, 4)), wanted)


@torch.no_grad()
def test_pooling_takes_the_class_token_or_the_patches() -> None:
    model = made(head="none")
    states = model.states(images())
    assert states.shape == (2, 5, 16)
    torch.testing.assert_close(model(images()), states[:, 0])
    mean = made(head="none", pooling="mean")
    torch.testing.assert_close(mean(images()), states[:, 1:].mean(1))
    bare = made(head="none", pooling="mean", class_token=False)
    assert bare.states(images()).shape == (2, 4, 16)
    torch.testing.assert_close(bare(images()), bare.states(images()).mean(1))


@torch.no_grad()
def test_only_positions_tell_patches_apart() -> None:
    x = images(1)
    turned = x.flip(3).view(1, 3, 8, 2, 4).flip(4).reshape(1, 3, 8, 8)  # left and right patches change places
    model = made(head="none", pooling="mean")
    assert not torch.allclose(model(x), model(turned))
    model.positions.weight.zero_()
    torch.testing.assert_close(model(x), model(turned))


@torch.no_grad()
def test_kept_patches_alone_equal_attention_that_sees_only_them() -> None:
    """The other patches masked out of attention, in the whole model, is what leaving them out must equal."""
    model = made(head="none")
    kept = torch.tensor([[2, 0], [1, 3]])
    found = model.states(images(), kept=kept)
    seen = torch.ones(2, 5, dtype=torch.bool)
    seen[:, 1:] = torch.zeros(2, 4, dtype=torch.bool).scatter(1, kept, True)
    x = model.patches(unfolded(images(), 4)) + model.positions.weight[1:]
    assert model.class_token is not None
    start = model.class_token.weight + model.positions.weight[0]
    x = torch.cat([start.expand(2, 1, -1), x], 1)
    for block in model.blocks:
        x = block(x, None, seen[:, None, None, :])
    x = model.norm(x)
    torch.testing.assert_close(found[:, 0], x[:, 0])
    torch.testing.assert_close(found[:, 1:], x[:, 1:].gather(1, kept[..., None].expand(-1, -1, 16)))


def test_sines_and_cosines_by_hand() -> None:
    found = sincos(4, 8)
    # Frequencies 1 and 1/100; columns first, then rows.
    s1, c1, s2, c2 = 0.8414709848, 0.5403023059, 0.0099998333, 0.9999500004
    rows = [[0, 0, 1, 1, 0, 0, 1, 1], [s1, s2, c1, c2, 0, 0, 1, 1], [0, 0, 1, 1, s1, s2, c1, c2]]
    torch.testing.assert_close(found[:3], torch.tensor(rows))


def test_positions_of_another_grid() -> None:
    table = torch.randn(1 + 9, 8, generator=torch.Generator().manual_seed(0))
    assert resampled(table, 9, 1) is table
    larger = resampled(table, 36, 1)
    assert larger.shape == (37, 8)
    assert torch.equal(larger[0], table[0])
    # What rises from row to row goes on to do so, and what is equal along a row stays equal.
    rising = torch.arange(8.0).repeat_interleave(8)[:, None].expand(64, 2)
    finer = resampled(rising, 256, 0).view(16, 16, 2)
    assert (finer[:, 3, 0].diff() > 0).all()
    torch.testing.assert_close(finer, finer[:, :1].expand(16, 16, 2))
    torch.testing.assert_close(finer.mean(), torch.tensor(3.5))
    with pytest.raises(UserError, match="no square grid"):
        resampled(torch.zeros(1 + 8, 8), 16, 1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"image": 10}, "images of 10 pixels cannot be cut into patches of 4"),
        ({"class_token": False}, "`pooling: first` needs the class token"),
        ({"positions": "sincos", "width": 18}, "a width that 4 divides, not 18"),
        ({"patch": 0}, "patch must be at least 1, not 0"),
        ({"classes": -1}, "classes must be at least 0, not -1"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        VisionConfig(**{**SIZE, **options})
    assert said in str(error.value)
