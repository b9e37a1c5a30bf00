"""The one Transformer. What differs between families is an option of `TransformerConfig`.

Legend of shapes: B batch, T tokens, C width, H heads, K key/value heads, D head width, V vocabulary, L blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scrimp.errors import UserError
from scrimp.models.dropout import Dropout
from scrimp.models.presets import expand
from scrimp.models.seams import CrossEntropy, Linear


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Options of a Transformer. `vocab` and `context` of 0 are taken from the data."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "use_attribute_docstrings": True}
    expand: ClassVar[Any] = staticmethod(expand)
    vocab: int = 0
    """Size of the vocabulary."""
    context: int = 0
    """Longest sequence, in tokens."""
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
    positions: Literal["learned", "rotary", "none"] = "learned"
    """How a token knows its place."""
    rope_base: float = 10000.0
    """Base of the rotary wavelengths."""
    rope_scaling: dict[str, float] | None = None
    """Llama 3's stretching of low frequencies: factor, low_freq_factor, high_freq_factor, original_context."""
    activation: Literal["gelu", "gelu_tanh", "swiglu", "relu"] = "gelu"
    """Of the MLP."""
    qk_norm: bool = False
    """RMSNorm of queries and keys, per head."""
    bias: bool = True
    """Biases in linear layers and LayerNorms."""
    qkv_bias: bool | None = None
    """Bias of the query/key/value projection; None means as `bias`."""
    tied: bool = True
    """The head's weight is the embedding's."""
    causal: bool = True
    """Each token sees only itself and those before it."""
    dropout: float = 0.0
    """On embeddings and residual branches; counter-based, so that it does not depend on layout or resume."""
    init_std: float = 0.02
    """Standard deviation of the first weights."""
    source: str = ""
    """Folder the weights come from (written by `from`)."""

    def __post_init__(self) -> None:
        least = {
            "layers": 1,
            "width": 1,
            "heads": 1,
            "kv_heads": 0,
            "head_width": 0,
            "hidden": 0,
            "vocab": 0,
            "context": 0,
        }
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise UserError(f"{name} must be at least {smallest}, not {getattr(self, name)}.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must be at least 0 and less than 1, not {self.dropout}.")
        if not self.init_std >= 0:
            raise UserError(f"init_std must be at least 0, not {self.init_std}.")
        if self.width % self.heads and not self.head_width:
            raise UserError(f"width {self.width} is not a multiple of heads {self.heads}.", "", "Set `head_width`.")
        if self.kv_heads and self.heads % self.kv_heads:
            raise UserError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}.")
        if self.positions == "rotary" and self.head % 2:
            raise UserError(f"rotary positions need an even head width, not {self.head}.")

    @property
    def head(self) -> int:
        """Width of a head, D."""
        return self.head_width or self.width // self.heads

    @property
    def mlp(self) -> int:
        """Width of the MLP."""
        if self.hidden:
            return self.hidden
        return 64 * math.ceil(self.width * 8 / 3 / 64) if self.activation == "swiglu" else 4 * self.width

    def build(self) -> Transformer:
        """The model, on the default device, uninitialized."""
        return Transformer(self)


class Norm(nn.Module):
    """LayerNorm, or RMSNorm which keeps the mean and has no bias. Shapes: [..., width] -> [..., width]."""

    def __init__(self, width: int, kind: str, eps: float, bias: bool = True) -> None:
        super().__init__()
        self.eps, self.rms = eps, kind == "rmsnorm"
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if bias and not self.rms else None

    def initialize(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """Ones and zeros."""
        value.fill_(1.0 if name == "weight" else 0.0)

    def forward(self, x: Tensor) -> Tensor:
        if self.rms:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class Embedding(nn.Module):
    """Rows of a table. Shapes: ids [...] -> [..., width]."""

    def __init__(self, rows: int, width: int, std: float = 0.02) -> None:
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(rows, width))

    def initialize(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """Normal with the embedding's standard deviation."""
        value.normal_(0.0, self.std, generator=generator)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class AttentionCore(nn.Module):
    """Exact attention by torch's fused kernel, a replaceable seam.

    Shapes: q [B, H, T, D], k and v [B, K, S, D] -> [B, H, T, D].
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None = None) -> Tensor:
        grouped = k.shape[1] != q.shape[1]
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)


class Attention(nn.Module):
    """Multi-head self-attention with one projection for q, k and v. Shapes: x [B, T, C] -> [B, T, C]."""

    def __init__(self, c: TransformerConfig, out_std: float) -> None:
        super().__init__()
        self.kv_heads, self.width, self.causal = c.kv_heads or c.heads, c.head, c.causal
        self.heads = c.heads
        qkv_bias = c.bias if c.qkv_bias is None else c.qkv_bias
        self.qkv = Linear(c.width, (c.heads + 2 * self.kv_heads) * c.head, qkv_bias, c.init_std)
        self.core = AttentionCore()
        self.proj = Linear(c.heads * c.head, c.width, c.bias, out_std)
        self.q_norm = Norm(c.head, "rmsnorm", c.norm_eps) if c.qk_norm else None
        self.k_norm = Norm(c.head, "rmsnorm", c.norm_eps) if c.qk_norm else None

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None, mask: Tensor | None, cache: list[Tensor] | None
    ) -> Tensor:
        batch, tokens, _ = x.shape
        heads = (self.heads, self.kv_heads, self.kv_heads)
        q, k, v = self.qkv(x).view(batch, tokens, -1, self.width).transpose(1, 2).split(heads, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        causal = self.causal and mask is None
        if cache is not None:
            if cache:
                k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
                causal = causal and tokens > 1
            cache[:] = [k, v]
        y = self.core(q, k, v, causal, mask)
        return self.proj(y.transpose(1, 2).reshape(batch, tokens, -1))


class MLP(nn.Module):
    """up, activation, down; swiglu gates the activation. Shapes: [..., C] -> [..., C]."""

    def __init__(self, c: TransformerConfig, out_std: float) -> None:
        super().__init__()
        self.activation = c.activation
        self.up = Linear(c.width, c.mlp, c.bias, c.init_std)
        self.gate = Linear(c.width, c.mlp, c.bias, c.init_std) if c.activation == "swiglu" else None
        self.down = Linear(c.mlp, c.width, c.bias, out_std)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        if self.gate is not None:
            return self.down(F.silu(self.gate(x)) * up)
        if self.activation == "relu":
            return self.down(F.relu(up))
        return self.down(F.gelu(up, approximate="tanh" if self.activation == "gelu_tanh" else "none"))


class Block(nn.Module):
    """Attention and MLP on a residual stream. `attention_scale` and `mlp_scale` are seams on the branches."""

    def __init__(self, c: TransformerConfig, index: int) -> None:
        super().__init__()
        out_std = c.init_std / math.sqrt(2 * c.layers)
        self.pre = c.norm_at == "pre"
        self.attention_norm: nn.Module = Norm(c.width, c.norm, c.norm_eps, c.bias)
        self.attention = Attention(c, out_std)
        self.attention_scale: nn.Module = nn.Identity()
        self.mlp_norm: nn.Module = Norm(c.width, c.norm, c.norm_eps, c.bias)
        self.mlp = MLP(c, out_std)
        self.mlp_scale: nn.Module = nn.Identity()
        self.dropout = Dropout(c.dropout, site=1 + 2 * index)
        self.mlp_dropout = Dropout(c.dropout, site=2 + 2 * index)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        sample: Tensor | None = None,
        cache: list[Tensor] | None = None,
    ) -> Tensor:
        """x [B, T, C] -> [B, T, C]; rope is (cos, sin) [T, D/2]; sample [B] keys dropout."""
        if self.pre:
            branch = self.attention(self.attention_norm(x), rope, mask, cache)
            x = x + self.dropout(self.attention_scale(branch), sample)
            return x + self.mlp_dropout(self.mlp_scale(self.mlp(self.mlp_norm(x))), sample)
        branch = self.attention(x, rope, mask, cache)
        x = self.attention_norm(x + self.dropout(self.attention_scale(branch), sample))
        return self.mlp_norm(x + self.mlp_dropout(self.mlp_scale(self.mlp(x)), sample))


class Transformer(nn.Module):
    """Embedding, blocks, head. Decoder-only when `causal`."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        c = self.config = config
        self.embed = Embedding(c.vocab, c.width, c.init_std)
        self.embed_scale: nn.Module = nn.Identity()
        self.positions = Embedding(c.context, c.width, c.init_std) if c.positions == "learned" else None
        self.dropout = Dropout(c.dropout, site=0)
        self.blocks = nn.ModuleList(Block(c, i) for i in range(c.layers))
        self.norm: nn.Module = Norm(c.width, c.norm, c.norm_eps, c.bias) if c.norm_at == "pre" else nn.Identity()
        self.head = Linear(c.width, c.vocab, bias=False, std=c.init_std)
        if c.tied:
            self.head.weight = self.embed.weight
        self.head_loss: nn.Module = CrossEntropy()

    def initialize(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """The model itself owns no parameter."""
        raise AssertionError(name)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        sample: Tensor | None = None,
        smoothing: float = 0.0,
        cache: list[list[Tensor]] | None = None,
    ) -> Tensor:
        """Logits [B, T, V], or the summed loss when targets [B, T] are given.

        Args:
            tokens: ids, [B, T].
            targets: ids to predict, -100 where nothing counts.
            sample: number of each sample in the run, [B]; keys dropout.
            cache: a list a block of keys and values of the tokens before, for generation; grows in place.
        """
        past = cache[0][0].shape[2] if cache and cache[0] else 0
        if past + tokens.shape[1] > self.config.context:
            raise ValueError(f"{past + tokens.shape[1]} tokens exceed the model's context of {self.config.context}.")
        x = self.embed_scale(self.embed(tokens))
        place = torch.arange(past, past + tokens.shape[1], device=tokens.device)
        if self.positions is not None:
            x = x + self.positions(place)
        rope = rotary(place, self.config, x.dtype) if self.config.positions == "rotary" else None
        x = self.dropout(x, sample)
        for i, block in enumerate(self.blocks):
            x = block(x, rope, None, sample, cache[i] if cache is not None else None)
        x = self.norm(x)
        return self.head(x) if targets is None else self.head_loss(x, self.head, targets, smoothing)


def rotary(place: Tensor, c: TransformerConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotation angles, [T, D/2]. Computed in at least float32."""
    wide = torch.promote_types(dtype, torch.float32)
    rate = c.rope_base ** -(torch.arange(0, c.head, 2, device=place.device, dtype=wide) / c.head)
    if c.rope_scaling:
        s = c.rope_scaling
        turns = rate * s["original_context"] / (2 * math.pi)
        blend = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
        rate = rate * (blend + (1 - blend) / s["factor"])
    angle = place.to(wide)[:, None] * rate
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on [B, H, T, D]: the first and second half of D are the two coordinates of each plane."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
