"""Two towers, one for images and one for texts, whose outputs meet in one space: CLIP.

    u = normalized(W_image tower(image))        v = normalized(W_text tower(text))        logits = exp(s) u v^T

The text tower is the causal house Transformer, read at the last token that counts, which should be the end of the text.
The image tower cuts the image into patches, puts a class token before them, and is read there. The scale exp(s) is
learned and never more than 100, as in the paper.

Paper: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020.

Legend of shapes: B pairs, K channels, S side of an image, P patches, T tokens, C width of a tower, D shared width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scrimp.errors import UserError
from scrimp.models.config import Trunk
from scrimp.models.layers import Block, Embedding, Norm
from scrimp.models.presets import expand
from scrimp.models.seams import Linear
from scrimp.models.subsets import gathered
from scrimp.models.transformer import TransformerConfig

LARGEST = math.log(100.0)
"""Of the learned scale, as its logarithm."""


@dataclass(frozen=True, kw_only=True)
class TwoTowersConfig(Trunk):
    """Options of two towers. What is not named `image_` is the text tower's, and the image tower's where it has no own.

    `vocab`, `context`, `image` and `channels` of 0 are taken from the data.
    """

    expand: ClassVar[object] = staticmethod(expand)
    vocab: int = 0
    """Size of the text's vocabulary."""
    context: int = 0
    """Longest text, in tokens."""
    image: int = 0
    """Side of an image, in pixels."""
    channels: int = 0
    """Of an image."""
    patch: int = 16
    """Side of a patch, in pixels; divides the image's."""
    image_layers: int = 0
    """Blocks of the image tower; 0 means as many as the text tower's."""
    image_width: int = 0
    """Of the image tower's residual stream; 0 means the text tower's."""
    image_heads: int = 0
    """Heads of the image tower; 0 means as many as the text tower's."""
    image_hidden: int = 0
    """Width of the image tower's MLP; 0 means what `hidden` of 0 means for its width."""
    projection: int = 512
    """Width of the space in which both meet."""
    temperature: float = 0.07
    """What logits are divided by at first; it is learned."""

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"vocab": 0, "context": 0, "image": 0, "channels": 0, "patch": 1, "image_layers": 0, "image_width": 0,
                 "image_heads": 0, "image_hidden": 0, "projection": 1}  # fmt: skip
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise UserError(f"{name} must be at least {bound}, not {getattr(self, name)}.")
        if not 0.01 <= self.temperature <= 1:
            raise UserError(f"temperature must be between 0.01 and 1, not {self.temperature}.")
        if self.image % self.patch:
            raise UserError(f"an image of {self.image} pixels is not a multiple of patches of {self.patch}.")
        self.image_trunk()

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return (self.image // self.patch) ** 2

    def image_trunk(self) -> Trunk:
        """The options of the image tower's blocks."""
        own: dict[str, Any] = {"layers": self.image_layers or self.layers, "width": self.image_width or self.width,
               "heads": self.image_heads or self.heads, "hidden": self.image_hidden}  # fmt: skip
        return Trunk(**{**self._shared(), **own, "kv_heads": 0, "head_width": 0})

    def text_options(self) -> TransformerConfig:
        """The options of the text tower."""
        return TransformerConfig(**self._shared(), vocab=self.vocab, context=self.context, head="none", pooling="last")

    def _shared(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(Trunk) if f.name != "source"}

    def build(self) -> TwoTowers:
        """The model, on the default device, uninitialized."""
        return TwoTowers(self)


class ImageTower(nn.Module):
    """Patches, class token, positions, norm, blocks, norm. Shapes: images [B, K, S, S] -> [B, C].

    Args:
        first: number of the first block among all of the model; keys dropout.
    """

    def __init__(self, c: Trunk, image: int, patch: int, channels: int, first: int) -> None:
        super().__init__()
        self.patch = patch
        self.patches = Linear(channels * patch * patch, c.width, bias=False, std=c.init_std)
        self.class_token = nn.Parameter(torch.empty(c.width))
        self.positions = Embedding(1 + (image // patch) ** 2, c.width, c.init_std)
        self.pre_norm = Norm(c.width, c.norm, c.norm_eps, c.bias)
        self.blocks = nn.ModuleList(Block(c, first + i, causal=False) for i in range(c.layers))
        self.norm = Norm(c.width, c.norm, c.norm_eps, c.bias)

    def initialize(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """The class token, as small as an embedding's row."""
        value.normal_(0.0, self.positions.std, generator=generator)

    def forward(self, images: Tensor, sample: Tensor | None = None, kept: Tensor | None = None) -> Tensor:
        """As above; `kept` are the patches that are seen, [B, P'], where not all are."""
        batch, channels, side, _ = images.shape
        n, p = side // self.patch, self.patch
        cut = images.reshape(batch, channels, n, p, n, p).permute(0, 2, 4, 1, 3, 5)  # [B, n, n, K, p, p]
        squares = cut.reshape(batch, n * n, channels * p * p).to(self.class_token.dtype)
        places = self.positions(torch.arange(1 + n * n, device=images.device))
        if kept is not None:
            squares = gathered(squares, kept)
            places = torch.cat([places[:1].expand(batch, 1, -1), places[kept + 1]], 1)
        x = self.patches(squares)
        x = torch.cat([self.class_token.expand(batch, 1, -1).to(x.dtype), x], 1)
        x = self.pre_norm(x + places)
        for block in self.blocks:
            x = block(x, sample=sample)
        return self.norm(x[:, 0])


class TwoTowers(nn.Module):
    """An image tower and a text tower."""

    def __init__(self, config: TwoTowersConfig) -> None:
        super().__init__()
        c = self.config = config
        trunk = c.image_trunk()
        self.text = c.text_options().build()
        self.image = ImageTower(trunk, c.image, c.patch, c.channels, first=c.layers)
        self.image_projection = Linear(trunk.width, c.projection, bias=False, std=trunk.width**-0.5)
        self.text_projection = Linear(c.width, c.projection, bias=False, std=c.width**-0.5)
        self.logit_scale = nn.Parameter(torch.empty(()))

    def initialize(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """The scale: the logarithm of one over the temperature."""
        value.fill_(-math.log(self.config.temperature))

    def forward(
        self,
        images: Tensor | None,
        tokens: Tensor | None,
        attended: Tensor | None = None,
        sample: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Vectors of length 1 for images and texts, [B, D] each, and the scale of their products.

        Args:
            images: [B, K, S, S], normalized; None to see texts only.
            tokens: ids, [B, T], each text with its end; None to see images only.
            attended: which tokens are no padding, [B, T]; padding is on the right.
            sample: number of each sample in the run, [B]; keys dropout.
            kept: patches of the images that are seen, [B, P']; None means all.
        """
        seen = None if images is None else F.normalize(self.image_projection(self.image(images, sample, kept)), dim=-1)
        read = None
        if tokens is not None:
            # Padding is on the right and the tower causal, so that only the place to read at depends on it.
            last = self.text.pooled(self.text.states(tokens, sample), attended)
            read = F.normalize(self.text_projection(last), dim=-1)
        return seen, read, self.logit_scale.clamp(max=LARGEST).exp()
