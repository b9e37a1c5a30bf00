"""The parts of every model: norms, embeddings, attention, the MLP, the block, rotary positions.

Legend of shapes: B batch, T tokens, S tokens that are attended to, C width, H heads, K key/value heads, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scrimp.errors import UserError
from scrimp.models.config import Trunk
from scrimp.models.dropout import Dropout
from scrimp.models.seams import Linear


class Norm(nn.Module):
    """LayerNorm, or RMSNorm which keeps the mean and has no bias. Shapes: [..., width] -> [..., width].

    Its weight and its bias are seams: `on` adds modules that map them to what the norm uses.
    """

    def __init__(self, width: int, kind: str, eps: float, bias: bool = True) -> None:
        super().__init__()
        self.eps, self.rms = eps, kind == "rmsnorm"
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if bias and not self.rms else None
        self.steps: dict[str, list[str]] = {"weight": [], "bias": []}

    def on(self, seam: str, name: str, step: nn.Module) -> None:
        """Add a step on the `weight` or the `bias`.

        Raises:
            UserError: if the norm already has a child of that name.
        """
        if name in self._modules:
            raise UserError(f"a norm already has a `{name}`.", "", "Give the two techniques disjoint patterns.")
        self.add_module(name, step)
        self.steps[seam].append(name)

    def initialize(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """Ones and zeros."""
        value.fill_(1.0 if name == "weight" else 0.0)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        for name in self.steps["weight"]:
            weight = self.get_submodule(name)(weight)
        for name in self.steps["bias"] if bias is not None else ():
            bias = self.get_submodule(name)(bias)
        if self.rms:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        return F.layer_norm(x, weight.shape, weight, bias, self.eps)


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
    """Multi-head self-attention with one projection for q, k and v. Shapes: x [B, T, C] -> [B, T, C].

    Attributes:
        prefix: a seam: () -> keys and values [2, K, P, D] that every token sees before the others', or None. They have
            no positions, and no cache keeps them.
    """

    def __init__(self, c: Trunk, out_std: float, causal: bool) -> None:
        super().__init__()
        self.kv_heads, self.width, self.causal = c.kv_heads or c.heads, c.head_dim, causal
        self.heads = c.heads
        qkv_bias = c.bias if c.qkv_bias is None else c.qkv_bias
        self.qkv = Linear(c.width, (c.heads + 2 * self.kv_heads) * c.head_dim, qkv_bias, c.init_std)
        self.core = AttentionCore()
        self.proj = Linear(c.heads * c.head_dim, c.width, c.bias, out_std)
        self.q_norm = Norm(c.head_dim, "rmsnorm", c.norm_eps) if c.qk_norm else None
        self.k_norm = Norm(c.head_dim, "rmsnorm", c.norm_eps) if c.qk_norm else None
        self.prefix: nn.Module | None = None

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
        y = self.core(q, k, v, causal, mask) if self.prefix is None else self._behind_prefix(q, k, v, causal, mask)
        return self.proj(y.transpose(1, 2).reshape(batch, tokens, -1))

    def _behind_prefix(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
        """Attention that sees the prefix as well: as many queries as keys keep the kernel's causal mask right."""
        assert self.prefix is not None
        first, second = self.prefix().to(k.dtype).expand(len(k), -1, -1, -1, -1).unbind(1)
        count = first.shape[2]
        k, v = torch.cat([first, k], 2), torch.cat([second, v], 2)
        if mask is not None:
            every = mask.new_ones if mask.dtype == torch.bool else mask.new_zeros
            mask = torch.cat([every((*mask.shape[:3], count)), mask], 3)
        if not causal:
            return self.core(q, k, v, False, mask)
        return self.core(F.pad(q, (0, 0, count, 0)), k, v, True, None)[:, :, count:]


class CrossAttention(nn.Module):
    """Attention to another sequence's states. Shapes: x [B, T, C], states [B, S, C] -> [B, T, C]."""

    def __init__(self, c: Trunk, out_std: float, states: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = c.heads, c.kv_heads or c.heads, c.head_dim
        qkv_bias = c.bias if c.qkv_bias is None else c.qkv_bias
        self.q = Linear(c.width, c.heads * c.head_dim, qkv_bias, c.init_std)
        self.kv = Linear(states, 2 * self.kv_heads * c.head_dim, qkv_bias, c.init_std)
        self.core = AttentionCore()
        self.proj = Linear(c.heads * c.head_dim, c.width, c.bias, out_std)

    def forward(self, x: Tensor, states: Tensor, mask: Tensor | None) -> Tensor:
        batch, tokens, _ = x.shape
        q = self.q(x).view(batch, tokens, -1, self.width).transpose(1, 2)
        k, v = self.kv(states).view(batch, states.shape[1], -1, self.width).transpose(1, 2).split(self.kv_heads, dim=1)
        return self.proj(self.core(q, k, v, False, mask).transpose(1, 2).reshape(batch, tokens, -1))


class MLP(nn.Module):
    """up, activation, down; swiglu gates the activation. Shapes: [..., C] -> [..., C]."""

    def __init__(self, c: Trunk, out_std: float) -> None:
        super().__init__()
        self.activation = c.activation
        self.up = Linear(c.width, c.mlp, c.bias, c.init_std)
        self.gate = Linear(c.width, c.mlp, c.bias, c.init_std) if c.activation == "swiglu" else None
        self.down = Linear(c.mlp, c.width, c.bias, out_std)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        if self.gate is not None:
            return self.down(F.silu(self.gate(x)) * up)
        return self.down(activated(up, self.activation))


def activated(x: Tensor, kind: str) -> Tensor:
    """The activation by name. CLIP's quick_gelu is x sigmoid(1.702 x)."""
    if kind == "relu":
        return F.relu(x)
    if kind == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


class Block(nn.Module):
    """Attention and MLP on a residual stream; a decoder's attends to an encoder's states in between.

    `enter` is a seam on what comes in; `attention_scale`, `cross_scale` and `mlp_scale` are seams on the branches.

    Args:
        index: place among all blocks of the model; keys dropout.
        states: width of an encoder's states to attend to; 0 for none.
        causal: whether each token sees only itself and those before it.
    """

    def __init__(self, c: Trunk, index: int, causal: bool, states: int = 0) -> None:
        super().__init__()
        out_std = c.init_std / math.sqrt((3 if states else 2) * c.layers)
        self.pre = c.norm_at == "pre"
        self.enter: nn.Module = nn.Identity()
        self.attention_norm: nn.Module = Norm(c.width, c.norm, c.norm_eps, c.bias)
        self.attention = Attention(c, out_std, causal)
        self.attention_scale: nn.Module = nn.Identity()
        self.cross = CrossAttention(c, out_std, states) if states else None
        if states:
            self.cross_norm: nn.Module = Norm(c.width, c.norm, c.norm_eps, c.bias)
            self.cross_scale: nn.Module = nn.Identity()
            self.cross_dropout = Dropout(c.dropout, site=100_000 + index)
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
        states: Tensor | None = None,
        states_mask: Tensor | None = None,
    ) -> Tensor:
        """x [B, T, C] -> [B, T, C].

        Args:
            rope: (cos, sin), each [T, D/2] or [B, 1, T, D/2].
            mask: which tokens see which, boolean or added to the scores, broadcast to [B, H, T, T]; replaces the
                causal one.
            sample: number of each sample in the run, [B]; keys dropout.
            cache: keys and values of the tokens before, for generation.
            states: of an encoder, [B, S, C'], and which of them count, [B, 1, 1, S].
        """
        x = self._branch(self.enter(x), self.attention_norm, lambda y: self.dropout(
            self.attention_scale(self.attention(y, rope, mask, cache)), sample))  # fmt: skip
        if self.cross is not None:
            assert states is not None
            cross = self.cross
            x = self._branch(x, self.cross_norm, lambda y: self.cross_dropout(
                self.cross_scale(cross(y, states, states_mask)), sample))  # fmt: skip
        return self._branch(x, self.mlp_norm, lambda y: self.mlp_dropout(self.mlp_scale(self.mlp(y)), sample))

    def _branch(self, x: Tensor, norm: nn.Module, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """Norm, branch and sum, in the order of the architecture."""
        return x + branch(norm(x)) if self.pre else norm(x + branch(x))


def rotary(place: Tensor, c: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotation angles, in at least float32: [T, D/2] of places [T], [B, 1, T, D/2] of [B, T]."""
    wide = torch.promote_types(dtype, torch.float32)
    rate = c.rope_base ** -(torch.arange(0, c.head_dim, 2, device=place.device, dtype=wide) / c.head_dim)
    if c.rope_scaling:
        s = c.rope_scaling
        turns = rate * s["original_context"] / (2 * math.pi)
        blend = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
        rate = rate * (blend + (1 - blend) / s["factor"])
    angle = place.to(wide)[..., None] * rate
    angle = angle[:, None] if place.ndim == 2 else angle
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on [B, H, T, D]: the first and second half of D are the two coordinates of each plane."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
