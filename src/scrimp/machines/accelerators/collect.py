# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""The attention that a trained run really does, as traces: which keys its queries keep on held-out data.

A core that leaves a `trace` says it itself: `trace.mask`, boolean [B or 1, H, N, S], `trace.predictor`, and if it likes
`candidates`, `bits`, `rank` and `ratio`, as attributes or in `trace.details`. It is asked to by `tracing`, where it has
that. Of any other core the mask is what it was called with, which is dense or causal attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from scrimp.errors import UserError
from scrimp.machines.accelerators.traces import AttentionTrace, Predictor

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import Batch


EXACT: Final = ("none", "flash")
"""Names of cores that keep all keys."""


def collected(place: str | Path, sequences: int = 4) -> list[AttentionTrace]:
    """Traces of a run's layers on its first held-out sequences, each by itself.

    Raises:
        UserError: if the run cannot be opened, or has no attention.
    """
    from scrimp.inference import open_run

    run = open_run(place)
    return collect(run, list(held_out(run, sequences)))


def held_out(run: Run, sequences: int) -> Iterator[Batch]:
    """Batches of one held-out sequence."""
    from scrimp.plain import to_device

    split = run.data.validation
    for first in range(min(sequences, len(split))):
        span = np.arange(first, first + 1)
        yield to_device(run.task.batch(split.read(span), span), run.device)


def collect(run: Run, batches: list[Batch]) -> list[AttentionTrace]:
    """A trace for each batch and each call of an attention core, in the order of the calls.

    Raises:
        UserError: if no attention core was called.
    """
    assert run.evaluate is not None
    found: list[AttentionTrace] = []

    def watch(core: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        found.append(traced(core, args, kwargs))

    def watched(model: nn.Module) -> dict[str, float]:
        cores = [core for name, core in model.named_modules() if name.rpartition(".")[2] == "core"]
        silent: list[Any] = [core for core in cores if getattr(core, "tracing", None) is False]
        hooks = [core.register_forward_hook(watch, with_kwargs=True) for core in cores]
        for core in silent:
            core.tracing = True
        try:
            return run.task.evaluate(model, iter(batches))
        finally:
            for hook in hooks:
                hook.remove()
            for core in silent:
                core.tracing = False

    run.evaluate(watched)
    if not found:
        raise UserError("the model has no attention core that was called.", "simulate", "Use a run of a Transformer.")
    return found


def traced(core: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AttentionTrace:
    """What one call of a core kept."""
    q, k = args[0], args[1]
    causal, mask = (args[i] if len(args) > i else kwargs.get(name) for i, name in ((3, "causal"), (4, "mask")))
    batch, heads, queries, width = q.shape
    said: Any = getattr(core, "trace", None)
    bits = q.element_size() * 8
    if said is not None:
        kept = np.broadcast_to(_array(said.mask), (batch, heads, queries, k.shape[2]))
        details = getattr(said, "details", {})
        more = {name: getattr(said, name, details.get(name)) for name in ("bits", "rank", "ratio", "candidates")}
        exact = said.predictor in EXACT
        predictor = Predictor(kind="none" if exact else str(said.predictor), bits=int(more["bits"] or 0),
                              rank=int(more["rank"] or 0), ratio=float(more["ratio"] or 0))  # fmt: skip
        asked = more["candidates"]
        asked = None if asked is None else np.broadcast_to(_array(asked), (batch, heads, queries))
        return AttentionTrace.of(kept, head_width=width, predictor=predictor, candidates=asked, bits=bits)
    if mask is None:
        return AttentionTrace.dense(batch * heads, queries, k.shape[2], width, causal=bool(causal), bits=bits)
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    kept = np.broadcast_to(_array(seen), (batch, heads, queries, k.shape[2]))
    return AttentionTrace.of(kept, head_width=width, bits=bits)


def _array(value: Tensor | Any) -> np.ndarray[Any, Any]:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
