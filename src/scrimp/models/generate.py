"""Sampling from a model that writes, with a cache of keys and values."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from scrimp.data.chat import prompted
from scrimp.models.encoder_decoder import EncoderDecoder

Cache = list[list[Tensor]]


def written(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    count: int,
    temperature: float,
    generator: torch.Generator | None = None,
) -> str | None:
    """The prompt and what a decoder adds to it, or what an encoder-decoder writes of it; None of other models.

    Args:
        model: in evaluation mode.
        tokenizer: with `end`, `encode` and `decode`. A decoder sees its end before the text, an encoder after it.
        count: how many tokens to write at most.
    """
    config = getattr(model, "config", None)
    device = next(model.parameters()).device
    end = tokenizer.end
    if isinstance(model, EncoderDecoder):
        # A long text is cut as those of the training are: its beginning stays, and its end token.
        ids = torch.tensor([*tokenizer.encode(prompt)[: model.config.context - 1], end], device=device)
        out = respond(model, ids, end, count, temperature, generator, end)
    elif getattr(config, "causal", False) and getattr(config, "head", "lm") in ("", "lm"):
        ids = torch.tensor(prompted(tokenizer, prompt), device=device)
        out = generate(model, ids, count, temperature, generator, end)
    else:
        return None
    return tokenizer.decode([i for i in out.tolist() if i != end])


@torch.no_grad()
def generate(
    model: nn.Module,
    tokens: Tensor,
    count: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    end: int | None = None,
) -> Tensor:
    """Continue one sequence.

    Args:
        model: a causal `Transformer` in evaluation mode.
        tokens: ids, [T] with T >= 1; only the last `context` count.
        count: how many tokens to add at most.
        temperature: 0 takes the likeliest token.
        end: id that ends the text.
    Returns:
        ids, [T + added].
    """
    config: Any = model.config
    context: int = getattr(model, "room", config.context)
    blocks: int = config.layers

    def logits(fresh: Tensor, cache: Cache) -> Tensor:
        return model(fresh[None], cache=cache)[0, -1]

    return _extended(logits, tokens, count, context, blocks, partial(_drawn, temperature, generator), end)


@torch.no_grad()
def respond(
    model: EncoderDecoder,
    tokens: Tensor,
    start: int,
    count: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    end: int | None = None,
) -> Tensor:
    """What an encoder-decoder writes of one sequence.

    Args:
        model: in evaluation mode.
        tokens: ids to read, [S] with S >= 1; only the last `context` count.
        start: id that the decoder begins with.
    Returns:
        ids that were written, [added], the end among them.
    """
    context = model.config.context
    states = model.encode(tokens[None, -context:])
    begin = torch.tensor([start], device=tokens.device)

    def logits(fresh: Tensor, cache: Cache) -> Tensor:
        return model(None, fresh[None], states=states, cache=cache)[0, -1]

    draw = partial(_drawn, temperature, generator)
    return _extended(logits, begin, min(count, context), context, model.config.depth, draw, end)[1:]


def _drawn(temperature: float, generator: torch.Generator | None, logits: Tensor) -> Tensor:
    """A token from logits [V]: [1]."""
    if temperature == 0:
        return logits.argmax()[None]
    return torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)


def _extended(
    logits: Callable[[Tensor, Cache], Tensor],
    tokens: Tensor,
    count: int,
    context: int,
    blocks: int,
    draw: Callable[[Tensor], Tensor],
    end: int | None,
) -> Tensor:
    """The tokens and what follows them, [T + added].

    Args:
        logits: (tokens that the cache does not have yet, cache) -> of the next token, [V].
        draw: logits -> a token, [1].
    """
    cache: Cache = [[] for _ in range(blocks)]
    fresh = tokens[-context:]
    length = 0
    for _ in range(count):
        if length + len(fresh) > context:
            # The window slides by half, so that the cache is rebuilt once in context / 2 tokens.
            cache, length, fresh = [[] for _ in range(blocks)], 0, tokens[-max(context // 2, 1) :]
        found = logits(fresh, cache)
        length += len(fresh)
        fresh = draw(found)
        tokens = torch.cat([tokens, fresh])
        if end is not None and int(fresh) == end:
            break
    return tokens
