"""The masked autoencoder: an image is painted again from a few of its patches.

    states      = encoder(visible patches)                  only these: with 75 % hidden, a quarter of the tokens
    predictions = decoder(states and mask tokens, each at its place)

Paper: He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, arXiv 2111.06377.

With `drop: false` hidden patches go through the encoder too, as mask tokens: masked image modeling as BEiT (arXiv
2106.08254) and SimMIM (arXiv 2111.09886) do it. That is what dropping them is to be compared with, all else equal;
`decoder_layers: 0` then makes it SimMIM's light head.

The encoder's weights have the names that `vision` has, so that `--from RUN` fine-tunes them; the decoder stays behind.

Legend of shapes: B batch, N patches, K visible patches, C width, D the decoder's width, P values of a patch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from scrimp.errors import UserError
from scrimp.models.layers import Block, Embedding, Norm
from scrimp.models.patches import PatchConfig, PatchEncoder, positions_of
from scrimp.models.presets import expand
from scrimp.models.seams import Linear
from scrimp.models.subsets import gathered
from scrimp.models.vision import adopted_positions


@dataclass(frozen=True, kw_only=True)
class MaskedAutoencoderConfig(PatchConfig):
    """Options of a masked autoencoder. `image` and `channels` of 0 are taken from the data."""

    expand: ClassVar[object] = staticmethod(expand)
    outer: ClassVar[tuple[str, ...]] = ("decoder.", "mask_token.")
    """Beginnings of the names that another model's weights need not have."""
    drop: bool = True
    """Hidden patches are left out of the encoder; else they go through it as mask tokens."""
    decoder_layers: int = 2
    """Blocks of the decoder."""
    decoder_width: int = 64
    """Of the decoder's residual stream."""
    decoder_heads: int = 4
    """Heads of the decoder's attention."""
    decoder_hidden: int = 0
    """Width of the decoder's MLP; 0 means 4 * decoder_width."""

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"decoder_layers": int(self.drop), "decoder_width": 1, "decoder_heads": 1, "decoder_hidden": 0}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise UserError(f"{name} must be at least {smallest}, not {getattr(self, name)}.")
        if self.decoder_width % self.decoder_heads:
            raise UserError(f"decoder_width {self.decoder_width} is not a multiple of heads {self.decoder_heads}.")
        if self.positions == "sincos" and self.decoder_width % 4:
            raise UserError(f"decoder_width must be a multiple of 4, not {self.decoder_width}.")

    def build(self) -> MaskedAutoencoder:
        """The model, on the default device, uninitialized."""
        return MaskedAutoencoder(self)

    def adopt(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of another image size: their positions on this one's grid."""
        return adopted_positions(weights, self, ("positions.weight", "decoder.positions.weight"))

    def decoder(self) -> MaskedAutoencoderConfig:
        """The same options with the decoder's sizes as the trunk's."""
        return replace(
            self, width=self.decoder_width, layers=max(1, self.decoder_layers), heads=self.decoder_heads,
            hidden=self.decoder_hidden, kv_heads=0, head_width=0,
        )  # fmt: skip


class Decoder(nn.Module):
    """From the encoder's states to pixels."""

    def __init__(self, c: MaskedAutoencoderConfig) -> None:
        super().__init__()
        own = c.decoder()
        self.first = int(c.class_token)
        self.embed = Linear(c.width, own.width, c.bias, c.init_std)
        self.mask_token = Embedding(1, own.width, c.init_std) if c.drop else None
        self.positions = positions_of(own, own.width)
        # Numbered after the encoder's, so that dropout has masks of its own here.
        self.blocks = nn.ModuleList(Block(own, c.layers + i, causal=False) for i in range(c.decoder_layers))
        self.norm = Norm(own.width, c.norm, c.norm_eps, c.bias)
        self.predict = Linear(own.width, c.values, True, c.init_std)

    def forward(self, x: Tensor, restore: Tensor, sample: Tensor | None, token: Tensor | None = None) -> Tensor:
        """Predictions [B, N, P] from the states of the class token and the visible (or all) patches, [B, T, C].

        Args:
            restore: where each patch is among those in the order of hiding, visible ones first, [B, N].
            token: what stands for a hidden patch where the decoder has no mask token of its own, [1, C].
        """
        y = self.embed(x)
        if self.mask_token is not None:
            y = self._whole(y, self.mask_token(torch.zeros(1, dtype=torch.int64, device=x.device)), restore)
        elif token is not None:
            y = self._whole(y, self.embed(token), restore)
        y = y + self.positions(torch.arange(y.shape[1], device=x.device))
        for block in self.blocks:
            y = block(y, None, None, sample)
        return self.predict(self.norm(y[:, self.first :]))

    def _whole(self, y: Tensor, token: Tensor, restore: Tensor) -> Tensor:
        """All patches in their order, the hidden ones as a token [1, D], after the class token."""
        batch, count = restore.shape
        start, seen = y[:, : self.first], y[:, self.first :]
        hidden = token.to(y.dtype).expand(batch, count - seen.shape[1], -1)
        return torch.cat([start, gathered(torch.cat([seen, hidden], 1), restore)], 1)


class MaskedAutoencoder(PatchEncoder):
    """An encoder of what is visible, and a light decoder of the whole.

    Attributes:
        drop: whether hidden patches are left out of the encoder; a technique may set it where the options do not.
    """

    def __init__(self, config: MaskedAutoencoderConfig) -> None:
        super().__init__(config)
        self.config = config
        self.drop = config.drop
        if not config.drop:
            self.mask_token = Embedding(1, config.width, config.init_std)
        self.decoder = Decoder(config)

    def forward(self, images: Tensor, kept: Tensor, restore: Tensor, sample: Tensor | None = None) -> Tensor:
        """Predicted values of all patches, [B, N, P], each as channels, rows, columns.

        Args:
            images: normalized, [B, channels, image, image].
            kept: the patches that are visible, [B, K].
            restore: where each patch is in a list of the kept ones followed by the hidden ones, [B, N].
            sample: number of each sample in the run, [B]; keys dropout.
        """
        if self.config.drop:
            return self.decoder(self.states(images, sample, kept), restore, sample)
        token = self.mask_token(torch.zeros(1, dtype=torch.int64, device=images.device))
        if self.drop:
            return self.decoder(self.states(images, sample, kept), restore, sample, token)
        x = self.states(images, sample, masked=(restore >= kept.shape[1], token))
        return self.decoder(x, restore, sample)
