"""The vision Transformer, ViT and DeiT: patches of an image as tokens, a head over the class token or their mean.

Papers: Dosovitskiy et al., ICLR 2021, arXiv 2010.11929; Touvron et al. (DeiT), ICML 2021, arXiv 2012.12877. DeiT's
models without distillation are ViT's, trained otherwise.

Legend of shapes: B batch, T tokens, C width, N classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from scrimp.errors import UserError
from scrimp.models.patches import PatchConfig, PatchEncoder, resampled
from scrimp.models.presets import expand
from scrimp.models.seams import Linear


def options(settings: Mapping[str, Any], where: str = "model") -> dict[str, Any]:
    """`{preset, from, ...options}` -> options. A masked autoencoder's folder gives its encoder.

    Raises:
        UserError: for an unknown preset or a folder that cannot be read.
    """
    found = expand(settings, where)
    if settings.get("from") is not None and "decoder_layers" in found:
        found = {key: value for key, value in found.items() if not key.startswith("decoder_")}
        found |= {"positions": settings.get("positions", "learned")}
    return found


@dataclass(frozen=True, kw_only=True)
class VisionConfig(PatchConfig):
    """Options of a vision Transformer. `image`, `channels` and `classes` of 0 are taken from the data."""

    expand: ClassVar[object] = staticmethod(options)
    outer: ClassVar[tuple[str, ...]] = ("head.", "pooler.")
    """Beginnings of the names that another model's weights need not have."""
    head: Literal["", "classes", "none"] = ""
    """classes: of the pooled image; none: pooled states."""
    classes: int = 0
    """Outputs of the `classes` head."""
    pooling: Literal["first", "mean"] = "first"
    """Which states stand for the image: the class token's, or the mean of the patches'."""
    pooler: bool = False
    """A linear layer and tanh over the pooled state, as ViT has before its head of pre-training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes < 0:
            raise UserError(f"classes must be at least 0, not {self.classes}.")
        if self.pooling == "first" and not self.class_token:
            raise UserError("`pooling: first` needs the class token.", "", "Set `pooling: mean`.")

    def build(self) -> Vision:
        """The model, on the default device, uninitialized."""
        return Vision(self)

    def adopt(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of another image size: their positions on this one's grid."""
        return adopted_positions(weights, self, ("positions.weight",))


def adopted_positions(weights: dict[str, Tensor], c: PatchConfig, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The same weights, the named tables of positions on the grid of `c`."""
    first = int(c.class_token)
    return weights | {name: resampled(weights[name], c.patches, first) for name in names if name in weights}


class Vision(PatchEncoder):
    """Patches, blocks, head."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config)
        c = self.config = config
        if c.pooler:
            self.pooler = Linear(c.width, c.width, True, c.init_std)
        if c.head == "classes":
            self.head = Linear(c.width, c.classes, bias=True, std=c.init_std)

    def forward(self, images: Tensor, sample: Tensor | None = None) -> Tensor:
        """Logits [B, N], or pooled states [B, C] without a head.

        Args:
            images: normalized, [B, channels, image, image].
            sample: number of each sample in the run, [B]; keys dropout.
        """
        x = self.states(images, sample)
        y = x[:, 0] if self.config.pooling == "first" else x[:, self.first :].mean(1)
        if self.config.pooler:
            y = torch.tanh(self.pooler(y))
        return self.head(y) if self.config.head == "classes" else y
