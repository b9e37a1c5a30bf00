"""The encoder-decoder Transformer: an encoder reads one sequence, a decoder writes another while looking at it.

    states = encoder(tokens)            every token sees every other
    logits = decoder(tokens written so far, states)

Papers: Vaswani et al., arXiv 1706.03762; BART, Lewis et al., arXiv 1910.13461, whose options are `norm_at: post`,
`embed_norm` and a `position_offset` of 2. One table of embeddings serves encoder, decoder and, if tied, the head.

Legend of shapes: B batch, S tokens read, T tokens written, C width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from scrimp.errors import UserError
from scrimp.models.config import Trunk
from scrimp.models.dropout import Dropout
from scrimp.models.layers import Block, Embedding, Norm
from scrimp.models.presets import expand
from scrimp.models.seams import CrossEntropy, Linear


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig(Trunk):
    """Options of an encoder-decoder. `layers` are the encoder's. `vocab` and `context` of 0 are taken from the data."""

    expand: ClassVar[object] = staticmethod(expand)
    decoder_layers: int = 0
    """Blocks of the decoder; 0 means as many as the encoder's."""
    vocab: int = 0
    """Size of the vocabulary, which both sides share."""
    context: int = 0
    """Longest sequence of either side, in tokens."""
    positions: Literal["learned", "none"] = "learned"
    """How a token knows its place; each side has a table of its own."""
    position_offset: int = 0
    """Rows of the tables of positions before the first token's; BART has 2."""
    embed_norm: bool = False
    """A norm over the sum of the embeddings on each side, as BART has."""
    tied: bool = True
    """The head's weight is the embedding's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("decoder_layers", "vocab", "context", "position_offset"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be at least 0, not {getattr(self, name)}.")

    @property
    def depth(self) -> int:
        """Blocks of the decoder."""
        return self.decoder_layers or self.layers

    def build(self) -> EncoderDecoder:
        """The model, on the default device, uninitialized."""
        return EncoderDecoder(self)


class Stack(nn.Module):
    """One side: positions, blocks, norm. Shapes: embedded tokens [B, T, C] -> [B, T, C].

    Args:
        layers: blocks.
        first: number of the first block among all of the model; keys dropout.
        states: width of the other side's states that the blocks attend to; 0 for none. Such a side is causal.
    """

    def __init__(self, c: EncoderDecoderConfig, layers: int, first: int, states: int = 0) -> None:
        super().__init__()
        self.offset = c.position_offset
        rows = c.context + c.position_offset
        self.positions = Embedding(rows, c.width, c.init_std) if c.positions == "learned" else None
        self.embed_norm = Norm(c.width, c.norm, c.norm_eps, c.bias) if c.embed_norm else None
        self.dropout = Dropout(c.dropout, site=200_000 if states else 0)
        own = replace(c, layers=layers)
        self.blocks = nn.ModuleList(Block(own, first + i, bool(states), states) for i in range(layers))
        self.norm: nn.Module = Norm(c.width, c.norm, c.norm_eps, c.bias) if c.norm_at == "pre" else nn.Identity()

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        sample: Tensor | None = None,
        cache: list[list[Tensor]] | None = None,
        states: Tensor | None = None,
        states_mask: Tensor | None = None,
        places: Tensor | None = None,
        prompts: Tensor | None = None,
    ) -> Tensor:
        """As `Block` has them; `cache` is a list a block. `places` are the tokens', [B, T]; None means in a row.

        `prompts` [P, C] go before the tokens, without places, and stay there: [B, P + T, C].
        """
        past = cache[0][0].shape[2] if cache and cache[0] else 0
        if self.positions is not None:
            row = torch.arange(past, past + x.shape[1], device=x.device) if places is None else places
            x = x + self.positions(row + self.offset)
        if prompts is not None:
            x = torch.cat([prompts.to(x.dtype).expand(len(x), -1, -1), x], 1)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        x = self.dropout(x, sample)
        for i, block in enumerate(self.blocks):
            x = block(x, None, mask, sample, cache[i] if cache is not None else None, states, states_mask)
        return self.norm(x)


class EncoderDecoder(nn.Module):
    """Embedding, encoder, decoder, head.

    Attributes:
        prompts: a seam: () -> vectors [prepended, C] before what is read, which the decoder looks at as well.
        prepended: how many they are, P; tokens keep their places, so that `shift` is 0.
    """

    entries = ("encode",)
    """Methods beside `forward` by which others run it."""

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        c = self.config = config
        self.embed = Embedding(c.vocab, c.width, c.init_std)
        self.embed_scale: nn.Module = nn.Identity()
        self.prompts: nn.Module = nn.Identity()
        self.prepended = self.shift = 0
        self.encoder = Stack(c, c.layers, first=0)
        self.decoder = Stack(c, c.depth, first=c.layers, states=c.width)
        self.head = Linear(c.width, c.vocab, bias=False, std=c.init_std)
        if c.tied:
            self.head.weight = self.embed.weight
        self.head_loss: nn.Module = CrossEntropy()

    def forward(
        self,
        tokens: Tensor | None,
        decoder_tokens: Tensor,
        targets: Tensor | None = None,
        attended: Tensor | None = None,
        sample: Tensor | None = None,
        smoothing: float = 0.0,
        states: Tensor | None = None,
        cache: list[list[Tensor]] | None = None,
        read: Tensor | None = None,
        places: Tensor | None = None,
        written: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V], or the summed loss when targets are given.

        Args:
            tokens: ids to read, [B, S]; not needed with `states`.
            decoder_tokens: ids written so far, [B, T].
            targets: ids to predict, [B, T], -100 where nothing counts.
            attended: which of the tokens read are no padding, [B, S].
            sample: number of each sample in the run, [B]; keys dropout.
            states: what `encode` made of the tokens, [B, P + S, C].
            cache: a list a block of the decoder of keys and values of what was written before; grows in place.
            read: which of the encoder's states the decoder looks at, [B, S]; those that are attended when None.
            places: of the decoder's tokens among all that could be written, [B, T]; None means the first ones.
            written: which of the decoder's tokens take part, [B, T]: no other token sees one that does not.
        Raises:
            ValueError: if a side is longer than the context, or there is nothing to read.
        """
        if states is None:
            if tokens is None:
                raise ValueError("give `tokens` to read, or the `states` of them.")
            states = self.encode(tokens, attended, sample)
        past = cache[0][0].shape[2] if cache and cache[0] else 0
        self._check(past + decoder_tokens.shape[1])
        read = attended if read is None else read
        mask = None if read is None else self._behind_prompts(read)
        own = None if written is None else among(written)
        x = self.decoder(self.embed_scale(self.embed(decoder_tokens)), own, sample, cache, states, mask, places)
        return self.head(x) if targets is None else self.head_loss(x, self.head, targets, smoothing)

    def encode(self, tokens: Tensor, attended: Tensor | None = None, sample: Tensor | None = None) -> Tensor:
        """The encoder's states, [B, S] -> [B, P + S, C]."""
        self._check(tokens.shape[1])
        mask = None if attended is None else self._behind_prompts(attended)
        prompts = self.prompts() if self.prepended else None
        return self.encoder(self.embed_scale(self.embed(tokens)), mask, sample, prompts=prompts)

    def _behind_prompts(self, attended: Tensor) -> Tensor:
        """Which tokens are seen, [B, S], as a mask of keys that sees all prompts: [B, 1, 1, P + S]."""
        if self.prepended:
            attended = torch.cat([attended.new_ones(len(attended), self.prepended), attended], 1)
        return attended[:, None, None, :]

    def _check(self, length: int) -> None:
        if length > self.config.context:
            raise ValueError(f"{length} tokens exceed the model's context of {self.config.context}.")


def among(written: Tensor) -> Tensor:
    """Which tokens see which where only some take part: themselves, and those before them that do, [B, 1, T, T]."""
    tokens = written.shape[1]
    square = torch.ones(tokens, tokens, dtype=torch.bool, device=written.device)
    return (written[:, None, None, :] & square.tril()) | torch.eye(tokens, dtype=torch.bool, device=written.device)
