# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""What happens to a model's tensors before training: memory, first values, given values."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from scrimp.disk import settle
from scrimp.draws import generator
from scrimp.errors import UserError, did_you_mean
from scrimp.models.seams import matching
from scrimp.sharding import put, shape
from scrimp.technique import Technique

HEADS: Final = ("head.", "head_transform.", "head_project.", "pooler.")
"""Prefixes of the parameters of heads."""


def renewable(config: Any) -> tuple[str, ...]:
    """Prefixes of the parameters that may begin anew when a model starts from weights of another task.

    Kinds of models name in `outer` what stands outside the body. Of a Transformer, a head of classes, of hidden tokens
    or of no outputs belongs to its task; that of a language model does not.
    """
    outer = getattr(config, "outer", None)
    if outer is not None:
        return tuple(outer)
    return () if getattr(config, "head", "") in ("", "lm") else HEADS


def freeze(model: nn.Module, techniques: Sequence[Technique], task: Sequence[str] = ()) -> None:
    """Train only what tuning methods name, when there is one.

    Args:
        task: patterns of what its task trains beside them, such as a head that begins anew.
    """
    tuned = [(t.name, "|".join(t.trained)) for t in techniques if t.trained]
    if not tuned:
        return
    names = [name for name, _ in model.named_parameters()]
    chosen = {n for who, pattern in tuned for n in matching(pattern, names, "parameter", f"techniques.{who}")}
    chosen |= {n for n in names for pattern in task if fnmatchcase(n, pattern)}
    for name, p in model.named_parameters():
        p.requires_grad_(name in chosen)


def materialize(model: nn.Module, device: torch.device) -> nn.Module:
    """Meta tensors -> memory on the device. Shared parameters stay shared; `refill` fills what is no parameter.

    Parameters that a technique gave memory of their own keep it.
    """
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if id(p) not in made and p.device.type != "meta":
                made[id(p)] = p
            elif id(p) not in made:
                made[id(p)] = nn.Parameter(torch.empty_like(p, device=device), p.requires_grad)
            module.register_parameter(name, made[id(p)])
        for name, b in module.named_buffers(recurse=False):
            keep = name in module.state_dict(keep_vars=True)
            module.register_buffer(name, torch.empty_like(b, device=device), keep)
        own = next(module.named_buffers(recurse=False), None)
        refill = getattr(module, "refill", None) or getattr(module, "reset_parameters", None)
        if own is not None and refill is None:
            fix = "Add refill(), which fills them on their device."
            raise UserError(f"`{type(module).__name__}` has buffers and no `refill`.", "model", fix)
        if own is not None and refill is not None:
            refill()
    return model


@contextmanager
def on_meta(dtype: torch.dtype) -> Generator[None]:
    """Modules made inside take no memory, and have this type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def initialize(model: nn.Module, seed: int, skip: set[int] | None = None) -> None:
    """Fill every parameter from a generator of its own, so that adding one changes no other.

    Args:
        skip: ids of parameters to leave alone.
    Raises:
        UserError: if a module owns parameters and knows no way to fill them.
    """
    done = set(skip or ())
    for path, module in model.named_modules():
        # Packed weights are integers, and filled by what packs them.
        own = {n: p for n, p in module.named_parameters(recurse=False) if id(p) not in done and p.is_floating_point()}
        done |= {id(p) for p in own.values()}
        if not own or any(isinstance(p, FakeTensor) for p in own.values()):
            continue
        fill = getattr(module, "initialize", None)
        for name, p in own.items() if fill is not None else ():
            value = torch.empty(shape(p), dtype=torch.float32)
            fill(name, value, generator(seed, f"{path}.{name}" if path else name))  # type: ignore[misc]
            put(p, value)
            settle(p)
        if fill is None:
            reset = getattr(module, "reset_parameters", None)
            if reset is None:
                raise UserError(
                    f"`{path}` ({type(module).__name__}) has no `initialize` or `reset_parameters`.", "model"
                )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(generator(seed, path).initial_seed())
                reset()


def persistent(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong into a checkpoint."""
    kept = set(model.state_dict(keep_vars=True))
    return {name: b for name, b in model.named_buffers() if name in kept}


@torch.no_grad()
def load_weights(model: nn.Module, given: Mapping[str, Tensor], needed: Callable[[str], bool]) -> None:
    """Weights and buffers into a model.

    Args:
        given: tensors by name; each must belong to the model.
        needed: which of the model's own tensors must be given.
    Raises:
        UserError: with every missing, unexpected and misshapen tensor.
    """
    own: dict[str, Tensor] = {**dict(model.named_parameters()), **persistent(model)}
    missing = [n for n in own if n not in given and needed(n)]
    unexpected = [n for n in given if n not in own]
    wrong = [f"{n} {list(t.shape)} instead of {list(shape(own[n]))}" for n, t in given.items()
             if n in own and t.shape != shape(own[n])]  # fmt: skip
    if missing or unexpected or wrong:
        lists = {"missing": missing, "unexpected": unexpected, "misshapen": wrong}
        what = "; ".join(f"{kind}: {', '.join(found[:8])}" + (f" and {len(found) - 8} more" if len(found) > 8 else "")
                         for kind, found in lists.items() if found)  # fmt: skip
        near = f"{did_you_mean(unexpected[0], own)} " if unexpected else ""
        fix = f"{near}Give the `model`, and the `data.tokenizer` and `data.vocab`, that the weights were trained with."
        raise UserError(f"the weights do not fit the model. {what}.", "checkpoint", fix)
    for name, tensor in given.items():
        put(own[name], tensor)
        settle(own[name])
