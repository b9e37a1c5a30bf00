"""Parts of a model of tokens, where ranks hold consecutive blocks of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from torch import Tensor

ENTRY: Final = ("embed", "embed_project", "embed_scale", "positions", "segments", "embed_norm", "prompts", "dropout")
"""What stands before the blocks; all that is neither here nor a block stands behind them."""


@dataclass(frozen=True)
class Part:
    """Consecutive blocks of a model, with what stands before and behind them."""

    blocks: range
    first: bool
    """Whether the embeddings belong to it."""
    last: bool
    """Whether the last norm and the head belong to it."""
    given: Tensor | None = None
    """What the part before left, [B, P + T, C] with P prepended prompts."""
