"""Sampling from a causal model, with a cache of keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


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
    context: int = config.context
    blocks: int = config.layers
    cache: list[list[Tensor]] = [[] for _ in range(blocks)]
    fresh = tokens[-context:]
    length = 0
    for _ in range(count):
        if length + len(fresh) > context:
            # The window slides by half, so that the cache is rebuilt once in context / 2 tokens.
            cache, length, fresh = [[] for _ in range(blocks)], 0, tokens[-max(context // 2, 1) :]
        logits = model(fresh[None], cache=cache)[0, -1].float()
        length += len(fresh)
        if temperature == 0:
            fresh = logits.argmax()[None]
        else:
            fresh = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, fresh])
        if end is not None and int(fresh) == end:
            break
    return tokens
