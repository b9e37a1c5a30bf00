"""The Transformer for tokens: a decoder such as GPT and Llama, or an encoder such as BERT, as its options say.

With `embed_width: E` the table of tokens is factorized, as in ALBERT (Lan et al., arXiv 1909.11942):

    x = table[token] A^T                    table [V, E], A [C, E]: V E + E C weights instead of V C
    logits = (y B^T) table^T                B [E, C]: a tied head uses the same table
    logits = norm(act(y B^T + b)) table^T   the head of hidden tokens, whose transform ends at E

Legend of shapes: B batch, T tokens, C width, E embed width, H heads, D head width, V vocabulary, N classes, L blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from scrimp.errors import UserError
from scrimp.models.config import Trunk
from scrimp.models.dropout import Dropout
from scrimp.models.layers import Block, Embedding, Norm, activated, rotary
from scrimp.models.masks import added, beside, counted, firsts, seen
from scrimp.models.parts import Part
from scrimp.models.presets import expand
from scrimp.models.seams import CrossEntropy, Linear

Head = Literal["", "lm", "mlm", "classes", "none"]


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(Trunk):
    """Options of a Transformer. What is 0 or empty is taken from the data (`vocab`, `context`, `classes`) or from the
    task (`head`, `pooling`)."""

    expand: ClassVar[object] = staticmethod(expand)
    vocab: int = 0
    """Size of the vocabulary."""
    embed_width: int = 0
    """Width of the tables of tokens and of the head, less than `width`: a small matrix leads from one to the other. 0
    means `width`, and no such matrix. Positions and segments keep the full width."""
    context: int = 0
    """Longest sequence, in tokens."""
    positions: Literal["learned", "rotary", "none"] = "learned"
    """How a token knows its place."""
    position_offset: int = 0
    """Rows of the table of positions before the first token's; RoBERTa has 2."""
    rope_base: float = 10000.0
    """Base of the rotary wavelengths."""
    rope_scaling: dict[str, float] | None = None
    """Llama 3's stretching of low frequencies: factor, low_freq_factor, high_freq_factor, original_context."""
    segments: int = 0
    """Kinds of segments with an embedding of their own; BERT has 2."""
    embed_norm: bool = False
    """A norm over the sum of the embeddings, as BERT has."""
    causal: bool = True
    """Each token sees only itself and those before it."""
    tied: bool = True
    """The head's weight is the embedding's."""
    head: Head = ""
    """lm: logits of tokens; mlm: with BERT's transform before; classes: of the pooled sequence; none: pooled states."""
    classes: int = 0
    """Outputs of the `classes` head."""
    pooling: Literal["", "first", "mean", "last"] = ""
    """Which states stand for the sequence, where the head wants one; empty means as the task says, or the
    last of a causal model, whose first token sees no other, and the first of others."""
    pooler: bool = False
    """A linear layer and tanh over the first state, as BERT has; not with another `pooling`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("vocab", "embed_width", "context", "position_offset", "segments", "classes"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be at least 0, not {getattr(self, name)}.")
        if self.embed_width >= self.width:
            what = f"embed_width {self.embed_width} is not less than width {self.width}."
            raise UserError(what, "", "Lower it, or leave it at 0 for a table as wide as the model.")
        if self.embed_width and self.source:
            what = f"the embedding in `{self.source}` is one table, not the two matrices of an embed_width."
            raise UserError(what, "", "Leave it at 0, or train from scratch.")
        if self.positions == "rotary" and self.head_dim % 2:
            raise UserError(f"rotary positions need an even head width, not {self.head_dim}.")

    @property
    def table_width(self) -> int:
        """Width of the table of tokens, E."""
        return self.embed_width or self.width

    @property
    def pooled(self) -> bool:
        """Whether there is a pooler, where the head wants a state of the sequence."""
        return self.pooler and self.pools == "first"

    @property
    def pools(self) -> str:
        """`pooling`, chosen where it is left open."""
        return self.pooling or ("last" if self.causal and not self.pooler else "first")

    def build(self) -> Transformer:
        """The model, on the default device, uninitialized."""
        return Transformer(self)


class Transform(nn.Module):
    """What BERT does to the states before the head: linear, activation, norm. Shapes: [..., C] -> [..., E]."""

    def __init__(self, c: TransformerConfig) -> None:
        super().__init__()
        self.activation = c.activation
        self.dense = Linear(c.width, c.table_width, c.bias, c.init_std)
        self.norm = Norm(c.table_width, c.norm, c.norm_eps, c.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(activated(self.dense(x), self.activation))


class Transformer(nn.Module):
    """Embeddings, blocks, head.

    Attributes:
        part: which part of the model to run, None for all of it; all but the last leave hidden states.
        embed_project: E -> C behind a factorized table; at first it keeps the variance, so that states begin as large.
        head_project: C -> E before a language model's head, where the table is factorized.
        prompts: a seam: () -> vectors [prepended, C] that go before the embedded tokens, and are cut off again before
            the last norm.
        prepended: how many they are.
        shift: by how many places the tokens stand further right than without.
        places: a seam: the places of the tokens that it gets, [T] or [B, T], where they are not the first of a sample.
        side: a seam, where a technique adds it: (states before the first and after each block, rope, mask, sample,
            cache) -> the states that the last norm sees.
    """

    entries = ("states",)
    """Methods beside `forward` by which others run it."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        c = self.config = config
        self.embed = Embedding(c.vocab, c.table_width, c.init_std)
        self.embed_project: nn.Module = nn.Identity()
        if c.embed_width:
            self.embed_project = Linear(c.embed_width, c.width, bias=False, std=c.embed_width**-0.5)
        self.embed_scale: nn.Module = nn.Identity()
        rows = c.context + c.position_offset
        self.positions = Embedding(rows, c.width, c.init_std) if c.positions == "learned" else None
        self.segments = Embedding(c.segments, c.width, c.init_std) if c.segments else None
        self.embed_norm = Norm(c.width, c.norm, c.norm_eps, c.bias) if c.embed_norm else None
        self.prompts: nn.Module = nn.Identity()
        self.prepended = self.shift = 0
        self.places: Tensor | None = None
        self.side: nn.Module | None = None
        self.part: Part | None = None
        self.dropout = Dropout(c.dropout, site=0)
        self.blocks = nn.ModuleList(Block(c, i, c.causal) for i in range(c.layers))
        self.norm: nn.Module = Norm(c.width, c.norm, c.norm_eps, c.bias) if c.norm_at == "pre" else nn.Identity()
        self._add_head(c)

    def _add_head(self, c: TransformerConfig) -> None:
        if c.head in ("", "lm", "mlm"):
            if c.head == "mlm":
                self.head_transform = Transform(c)
            elif c.embed_width:
                self.head_project = Linear(c.width, c.embed_width, bias=False, std=c.width**-0.5)
            self.head = Linear(c.table_width, c.vocab, bias=c.head == "mlm", std=c.init_std)
            if c.tied:
                self.head.weight = self.embed.weight
            self.head_loss: nn.Module = CrossEntropy()
            return
        if c.pooled:
            self.pooler = Linear(c.width, c.width, True, c.init_std)
        if c.head == "classes":
            self.head = Linear(c.width, c.classes, bias=True, std=c.init_std)

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
        attended: Tensor | None = None,
        segments: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V], or the summed loss when targets are given; of pooled heads [B, N] or [B, C].

        Args:
            tokens: ids, [B, T].
            targets: ids to predict, [B, T], -100 where nothing counts.
            sample: number of each sample in the run, [B]; keys dropout.
            cache: a list a block of keys and values of the tokens before, for generation; grows in place.
            attended: which tokens are no padding, [B, T].
            segments: kind of each token's segment, [B, T]; 0 when None.
            documents: number of each token's document, [B, T], rising; tokens of others are not seen.
        """
        x = self.states(tokens, sample, cache, attended, segments, documents)
        if self.part is not None and not self.part.last:
            return x
        if self.config.head in ("classes", "none"):
            pooled = self.pooled(x, attended)
            return self.head(pooled) if self.config.head == "classes" else pooled
        if self.config.head == "mlm":
            x, targets = counted(x, targets)
            x = self.head_transform(x)
        elif self.config.embed_width:
            x = self.head_project(x)
        return self.head(x) if targets is None else self.head_loss(x, self.head, targets, smoothing)

    def states(
        self,
        tokens: Tensor,
        sample: Tensor | None = None,
        cache: list[list[Tensor]] | None = None,
        attended: Tensor | None = None,
        segments: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """What the last block leaves, after the last norm: [B, T, C]."""
        part = self.part or Part(range(len(self.blocks)), True, True)
        kept = cache[part.blocks.start] if cache else []
        past = kept[0].shape[2] - self.prepended if kept else 0
        if past + tokens.shape[1] > self.room:
            raise ValueError(f"{past + tokens.shape[1]} tokens exceed the model's context of {self.room}.")
        place = torch.arange(self.shift + past, self.shift + past + tokens.shape[1], device=tokens.device)
        if self.places is not None:
            place = self.shift + self.places
        elif documents is not None:
            place = place - firsts(documents)
        count = 0 if past else self.prepended
        x = self._embedded(tokens, place, segments, count, sample) if part.given is None else part.given
        mask = seen(tokens, self.config.causal, attended, documents)
        if count:
            place = torch.cat([self._before(tokens.device).expand(*place.shape[:-1], -1), place], -1)
            mask = None if mask is None else beside(mask, count, self.config.causal)
        rope = rotary(place, self.config, x.dtype) if self.config.positions == "rotary" else None
        if mask is not None and documents is not None and attended is None:
            mask = added(mask, x)
        x = self.through(x, rope, mask, sample, cache)
        return self.norm(x[:, count:]) if part.last else x

    def _embedded(
        self, tokens: Tensor, place: Tensor, segments: Tensor | None, count: int, sample: Tensor | None
    ) -> Tensor:
        """What the first block gets: [B, P + T, C] with `count` = P prompts before the tokens' T places."""
        x = self.embed_scale(self.embed_project(self.embed(tokens)))
        if self.positions is not None:
            x = x + self.positions(place + self.config.position_offset)
        if self.segments is not None:
            x = x + self.segments(torch.zeros_like(tokens) if segments is None else segments)
        if count:
            x = self._behind_prompts(x)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        return self.dropout(x, sample)

    def through(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        sample: Tensor | None,
        cache: list[list[Tensor]] | None,
    ) -> Tensor:
        """What the blocks make of embedded tokens: [B, T, C] -> [B, T, C]; the other arguments are those of a block."""
        states = [] if self.side is None else [x]
        # By name: a rank that runs a part of the model may have no other blocks.
        for name, block in self.blocks._modules.items():
            if block is None or (self.part is not None and int(name) not in self.part.blocks):
                continue
            x = block(x, rope, mask, sample, cache[int(name)] if cache is not None else None)
            if self.side is not None:
                states.append(x)
        return x if self.side is None else self.side(states, rope, mask, sample, cache)

    @property
    def room(self) -> int:
        """How many tokens fit: the context, less what learned positions have no row for."""
        return self.config.context - (self.shift if self.positions is not None else 0)

    def _behind_prompts(self, x: Tensor) -> Tensor:
        """Embedded tokens [B, T, C] behind the prompts.

        Prompts have the places before the tokens' first. Where no row of the learned positions is theirs, they do
        without: what is trained would take it in.
        """
        prompts = self.prompts().to(x.dtype)  # [P, C]
        if self.positions is not None and self.shift:
            prompts = prompts + self.positions(self._before(x.device) + self.config.position_offset)
        return torch.cat([prompts.expand(len(x), -1, -1), x], 1)

    def _before(self, device: torch.device) -> Tensor:
        """The places of the prompts, [P]."""
        return torch.arange(self.shift - self.prepended, self.shift, device=device)

    def pooled(self, x: Tensor, attended: Tensor | None) -> Tensor:
        """States [B, T, C] -> what stands for the sequence, [B, C]."""
        pools = self.config.pools
        if pools == "first":
            return torch.tanh(self.pooler(x[:, 0])) if self.config.pooler else x[:, 0]
        if attended is None:
            return x[:, -1] if pools == "last" else x.mean(1)
        if pools == "last":
            return x[torch.arange(len(x), device=x.device), attended.sum(1) - 1]
        count = attended[..., None].to(x.dtype)
        return (x * count).sum(1) / count.sum(1)
