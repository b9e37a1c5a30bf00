"""The options that every family's blocks share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from scrimp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Trunk:
    """Options of a stack of blocks."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "use_attribute_docstrings": True}
    layers: int = 6
    """Blocks."""
    width: int = 384
    """Of the residual stream."""
    heads: int = 6
    """Heads of attention."""
    kv_heads: int = 0
    """Key/value heads (grouped-query attention); 0 means as many as heads."""
    head_width: int = 0
    """Width of a head; 0 means width / heads."""
    hidden: int = 0
    """Width of the MLP; 0 means 4 * width, or 8/3 of it rounded up to a multiple of 64 for swiglu."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Kind of norm."""
    norm_at: Literal["pre", "post"] = "pre"
    """Norms before the branches, or after the sums."""
    norm_eps: float = 1e-5
    """Added to the variance in norms."""
    activation: Literal["gelu", "gelu_tanh", "quick_gelu", "swiglu", "relu"] = "gelu"
    """Of the MLP."""
    qk_norm: bool = False
    """RMSNorm of queries and keys, per head."""
    bias: bool = True
    """Biases in linear layers and LayerNorms."""
    qkv_bias: bool | None = None
    """Bias of the query/key/value projection; None means as `bias`."""
    dropout: float = 0.0
    """On embeddings and residual branches; counter-based, so that it does not depend on layout or resume."""
    init_std: float = 0.02
    """Standard deviation of the first weights."""
    source: str = ""
    """Folder the weights come from (written by `from`)."""

    def __post_init__(self) -> None:
        for name, least in {"layers": 1, "width": 1, "heads": 1, "kv_heads": 0, "head_width": 0, "hidden": 0}.items():
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, not {getattr(self, name)}.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must be at least 0 and less than 1, not {self.dropout}.")
        if not self.init_std >= 0:
            raise UserError(f"init_std must be at least 0, not {self.init_std}.")
        if self.width % self.heads and not self.head_width:
            raise UserError(f"width {self.width} is not a multiple of heads {self.heads}.", "", "Set `head_width`.")
        if self.kv_heads and self.heads % self.kv_heads:
            raise UserError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}.")

    @property
    def head_dim(self) -> int:
        """Width of a head, D."""
        return self.head_width or self.width // self.heads

    @property
    def mlp(self) -> int:
        """Width of the MLP."""
        if self.hidden:
            return self.hidden
        return 64 * math.ceil(self.width * 8 / 3 / 64) if self.activation == "swiglu" else 4 * self.width
