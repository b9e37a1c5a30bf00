"""Images as tokens: the encoder that the vision model and the masked autoencoder share.

    x[i] = W patch[i] + b + position[i]        for the squares i of an image, row by row
    x    = class token and all (or only the visible) x[i], through blocks that see every token

Paper: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, arXiv 2010.11929.

W is one `Linear` over the unfolded squares, the same product as a convolution whose stride is its size, so that what
acts on linear layers acts on it too.

Legend of shapes: B batch, N patches, K visible patches, T tokens, C width, P values of a patch: channels * patch^2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scrimp.errors import UserError
from scrimp.models.config import Trunk
from scrimp.models.dropout import Dropout
from scrimp.models.layers import Block, Embedding, Norm
from scrimp.models.seams import Linear


@dataclass(frozen=True, kw_only=True)
class PatchConfig(Trunk):
    """Options of an encoder of images. `image` and `channels` of 0 are taken from the data."""

    image: int = 0
    """Side of the images, in pixels."""
    channels: int = 0
    """Of a pixel: 1 for gray, 3 for color."""
    patch: int = 16
    """Side of the squares that become tokens, in pixels."""
    class_token: bool = True
    """A learned token before the patches."""
    positions: Literal["learned", "sincos"] = "learned"
    """How a patch knows its place: learned, or fixed sines and cosines of its row and column."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("image", 0), ("channels", 0), ("patch", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, not {getattr(self, name)}.")
        if self.image % self.patch:
            fix = "Set `model.patch` or `data.image`."
            raise UserError(f"images of {self.image} pixels cannot be cut into patches of {self.patch}.", "", fix)
        if self.positions == "sincos" and self.width % 4:
            raise UserError(f"positions of sines and cosines need a width that 4 divides, not {self.width}.")

    @property
    def patches(self) -> int:
        """Patches of an image, N."""
        return (self.image // self.patch) ** 2

    @property
    def values(self) -> int:
        """Values of a patch, P."""
        return self.channels * self.patch**2


def unfolded(images: Tensor, patch: int) -> Tensor:
    """The squares of images, row by row, each as channels, rows, columns: [B, channels, H, W] -> [B, N, P]."""
    batch, channels, height, width = images.shape
    squares = images.view(batch, channels, height // patch, patch, width // patch, patch)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch * patch)


def sincos(patches: int, width: int) -> Tensor:
    """Sines and cosines of the columns, then of the rows, of a square grid: float32 [patches, width].

    Of each, width / 4 frequencies 10000^(-i / (width / 4)); sines before cosines, as MAE's published weights have them.
    """
    side, quarter = round(patches**0.5), width // 4
    rate = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64, device="cpu") / quarter)
    angle = torch.arange(side, dtype=torch.float64, device="cpu")[:, None] * rate
    waves = torch.cat([angle.sin(), angle.cos()], 1)  # [side, width / 2]
    across = waves.repeat(side, 1)
    down = waves.repeat_interleave(side, 0)
    return torch.cat([across, down], 1).float()


def resampled(positions: Tensor, patches: int, first: int) -> Tensor:
    """Positions of another square grid, by bicubic interpolation: [first + N, C] -> [first + patches, C].

    Args:
        first: rows before the patches', which stay as they are.
    Raises:
        UserError: if the rows are no square grid.
    """
    given = len(positions) - first
    side, target = round(given**0.5), round(patches**0.5)
    if side == target:
        return positions
    if side < 1 or side**2 != given:
        raise UserError(f"{given} positions are no square grid, so they cannot be interpolated.", "model.image")
    grid = positions[first:].float().T.reshape(1, -1, side, side)
    new = F.interpolate(grid, size=(target, target), mode="bicubic", align_corners=False)
    return torch.cat([positions[:first], new.flatten(2)[0].T.to(positions.dtype)])


class SinCos(nn.Module):
    """Positions that are not trained. Named as learned ones, so that either takes the other's place.

    Args:
        first: rows of zeros before the patches', for a class token.
    """

    def __init__(self, patches: int, width: int, first: int) -> None:
        super().__init__()
        self.first = first
        self.weight = nn.Parameter(torch.empty(first + patches, width), requires_grad=False)

    def initialize(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """The waves; nothing is drawn."""
        value.zero_()
        value[self.first :] = sincos(len(value) - self.first, value.shape[1])

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of the table: ids [...] -> [..., C]."""
        return F.embedding(ids, self.weight)


def positions_of(c: PatchConfig, width: int) -> Embedding | SinCos:
    """A table of positions: the class token's row, if there is one, and a row a patch."""
    first = int(c.class_token)
    if c.positions == "sincos":
        return SinCos(c.patches, width, first)
    return Embedding(first + c.patches, width, c.init_std)


class PatchEncoder(nn.Module):
    """Patches, positions and blocks; a model derives from it and adds its head and `forward`.

    Attributes:
        prompts: a seam: () -> vectors [prepended, C] that go between the class token and the patches, and are cut off
            again before the last norm.
        prepended: how many they are.
    """

    def __init__(self, config: PatchConfig) -> None:
        super().__init__()
        c = config
        self.patch, self.first = c.patch, int(c.class_token)
        # By the number of inputs, as ViT has it: 0.02 is far too little for the few values of a small patch.
        self.patches = Linear(c.values, c.width, c.bias, max(c.values, 1) ** -0.5)
        self.class_token = Embedding(1, c.width, c.init_std) if c.class_token else None
        self.positions = positions_of(c, c.width)
        self.prompts: nn.Module = nn.Identity()
        self.prepended = 0
        self.dropout = Dropout(c.dropout, site=0)
        self.blocks = nn.ModuleList(Block(c, i, causal=False) for i in range(c.layers))
        self.norm: nn.Module = Norm(c.width, c.norm, c.norm_eps, c.bias) if c.norm_at == "pre" else nn.Identity()

    def states(
        self,
        images: Tensor,
        sample: Tensor | None = None,
        kept: Tensor | None = None,
        masked: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """What the last block leaves, after the last norm: [B, T, C], the class token first.

        Args:
            images: [B, channels, image, image].
            sample: number of each sample in the run, [B]; keys dropout.
            kept: patches that are seen, [B, K]; the others take no part, and T is K and the class token.
            masked: which patches are hidden behind a token, [B, N], and that token, [1, C].
        """
        squares = unfolded(images.to(self.patches.weight.dtype), self.patch)
        batch, count, size = squares.shape
        place = torch.arange(count, device=images.device)
        if kept is not None:
            squares = squares.gather(1, kept[..., None].expand(-1, -1, size))
            place = kept
        x = self.patches(squares)
        if masked is not None:
            x = torch.where(masked[0][..., None], masked[1].to(x.dtype), x)
        x = x + self.positions(place + self.first)
        if self.class_token is not None:
            zero = torch.zeros(1, dtype=torch.int64, device=images.device)
            start = self.class_token(zero) + self.positions(zero)
            x = torch.cat([start.expand(batch, 1, -1).to(x.dtype), x], 1)
        x = self.dropout(x, sample)
        if self.prepended:
            prompts = self.prompts().to(x.dtype).expand(batch, -1, -1)
            x = torch.cat([x[:, : self.first], prompts, x[:, self.first :]], 1)
        for block in self.blocks:
            x = block(x, None, None, sample)
        if self.prepended:
            x = torch.cat([x[:, : self.first], x[:, self.first + self.prepended :]], 1)
        return self.norm(x)
