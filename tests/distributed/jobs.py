"""What ranks do in tests of layouts: they train tiny recipes, and tell what came out.

References are computed by the test in one process and handed over in a file named by SCRIMP_TEST_FILES.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from scrimp.errors import UserError
from scrimp.meter import LiveBytes
from scrimp.recipe import Recipe
from scrimp.registry import technique_class
from scrimp.run import Run
from scrimp.sharding import whole
from scrimp.techniques.offloading import zero_offload
from scrimp.training import train
from tiny import HOME, TinyData, example, recipe

LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {
    "replicate": {"replicate": {}},
    "zero, stage 1": {"zero": {"stage": 1}},
    "zero, stage 2": {"zero": {"stage": 2}},
    "zero, stage 3": {"zero": {"stage": 3}},
    "tensor": {"tensor": {}},
    "pipeline": {"pipeline": {}},
    "context": {"context": {}},
    "context, ulysses": {"context": {"kind": "ulysses"}},
    "context x replicate": {"context": {}, "replicate": {}},
    "context x zero": {"context": {}, "zero": {}},
    "context x tensor": {"context": {}, "tensor": {}},
    "zero, replicated": {"zero": {}},
    "tensor x replicate": {"tensor": {}, "replicate": {}},
    "tensor x zero": {"tensor": {}, "zero": {}},
    "pipeline x replicate": {"pipeline": {}, "replicate": {}},
    "pipeline x tensor": {"pipeline": {}, "tensor": {}},
    "interleaved x tensor": {"pipeline": {"order": "interleaved"}, "tensor": {"sequence": False}},
}
MESHES: dict[str, dict[str, int]] = {
    "zero, replicated": {"replica": 2, "data": 2},
    "tensor x replicate": {"tensor": 2, "data": 2},
    "tensor x zero": {"tensor": 2, "data": 2},
    "context x replicate": {"context": 2, "data": 2},
    "context x zero": {"context": 2, "data": 2},
    "context x tensor": {"context": 2, "tensor": 2, "data": 1},
    "pipeline x replicate": {"pipeline": 2, "data": 2},
    "pipeline x tensor": {"pipeline": 2, "tensor": 2, "data": 1},
    "interleaved x tensor": {"pipeline": 2, "tensor": 2, "data": 1},
}
"""Layouts of four ranks; others have all ranks along one axis."""


def mesh(name: str, ranks: int) -> dict[str, int] | None:
    """A layout's mesh of so many ranks; None where it has none."""
    if name in MESHES:
        return MESHES[name] if ranks == 4 else None
    axis = next((axis for axis in ("tensor", "pipeline", "context") if name.startswith(axis)), "data")
    few = name in ("tensor", "context, ulysses")  # The model has two heads.
    return {axis: ranks} if axis == "data" else None if ranks > 2 and few else {axis: ranks, "data": 1}


def layouts() -> list[str]:
    """Those that this many ranks have."""
    return [name for name in LAYOUTS if mesh(name, dist.get_world_size()) is not None]


def files() -> Path:
    """Where a test and its ranks meet."""
    return Path(os.environ["SCRIMP_TEST_FILES"])


def made(*techniques: Any, **settings: Any) -> Recipe:
    """A recipe in float64, whose batch several ranks can share."""
    if not any("update rule" in t.card.sets for t in techniques):
        techniques = (*techniques, technique_class("sgd")(lr=0.1, momentum=0.9))
    common: dict[str, Any] = {"dtype": "float64", "batch": 8, "duration": "4 step", "sample": {"tokens": 0}}
    return recipe(*techniques, **(common | {"validate": {"every": "2 step", "batches": 1}} | settings))


def layout(name: str) -> list[Any]:
    """The techniques of a layout."""
    return [technique_class(kind)(**settings) for kind, settings in LAYOUTS[name].items()]


def state(run: Run) -> dict[str, Tensor]:
    """All named tensors, whole."""
    return {f"{kind}/{n}": whole(t).clone() for kind, named in run.state().items() for n, t in named.items()}


def apart(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest relative difference of what both have; each tensor by its own largest value."""
    gaps = [0.0] + [
        float((found[n].double() - t.double()).abs().max() / t.double().abs().max().clamp(min=1e-12))
        for n, t in wanted.items()
        if n in found and t.numel()
    ]
    if not dist.is_initialized():
        return max(gaps)
    told: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(told, max(gaps))
    return max(told)


def names_of_all(mine: dict[str, Tensor]) -> set[str]:
    """Names of the tensors that any rank has."""
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, list(mine))
    return {name for names in told for name in names}


def parity() -> dict[str, Any]:
    """layout -> difference of weights and moments from one process, and the validation."""
    wanted = torch.load(files() / "alone.pt")
    found: dict[str, Any] = {}
    for name in layouts():
        axes = mesh(name, dist.get_world_size())
        result = train(made(*layout(name), example("clip"), mesh=axes), save=False)
        found[name] = [apart(state(result.run), wanted), result.validation["loss"]]
    return found


def catalogue(name: str) -> dict[str, Any]:
    """technique -> the difference from one process in this layout, or why it is refused, or how it fails.

    Who is told to keep the tokens between layers whole does so, and is tried again.
    """
    found: dict[str, Any] = {}
    for technique, wanted in torch.load(files() / "catalogue.pt").items():
        found[technique] = tried(technique, layout(name), mesh(name, dist.get_world_size()), wanted)
        if "Set `sequence: false`." in str(found[technique]):
            found[f"{technique}, whole tokens"] = tried(
                technique, [technique_class("tensor")(sequence=False)], mesh(name, 2), wanted
            )
    if name == "replicate":
        found["token_drop, by loss"] = float(len(hardest()))
    return found


def tried(technique: str, beside: list[Any], axes: Any, wanted: dict[str, Tensor]) -> float | str:
    """The largest relative difference of any tensor, or what was said instead."""
    events: list[str] = []
    try:
        run = train(short(technique, *beside, mesh=axes), save=False, force=True,
                    observe=lambda event, fields: events.append(event)).run  # fmt: skip
    except UserError as error:
        return f"refused: {error}" if "stage" not in events else f"refused when it ran: {error}"
    except Exception as error:
        # The others stand where this one does: told with the rest.
        return f"{type(error).__name__}: {error}"
    mine = state(run)
    held = names_of_all(mine)
    if unlike := unlike_on_ranks(mine):
        return f"a checkpoint would hold one rank's of what they have unlike: {unlike[:4]}"
    return apart(mine, wanted) if held == set(wanted) else f"names differ: {sorted(held ^ set(wanted))[:4]}"


def unlike_on_ranks(mine: dict[str, Tensor]) -> list[str]:
    """Names under which two ranks hold other bits."""
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, {name: hashlib.sha256(t.cpu().numpy().tobytes()).digest() for name, t in mine.items()})
    return sorted(
        {name for own in told for name in own if any(other.get(name, own[name]) != own[name] for other in told)}
    )


def hardest() -> list[str]:
    """What ranks hold unlike after tokens were dropped by their losses."""
    from tiny_tasks import Memory

    technique = technique_class("token_drop")(mode="loss", keep=0.5, until=1.0, levels=1, multiple=1)
    model = {"layers": 3, "width": 16, "heads": 2, "causal": False}
    given = made(technique, *layout("replicate"), model=model, task="masked-lm", data=Memory("masked-lm"),
                 duration="2 step", validate={"every": 0}, mesh={"data": 2})  # fmt: skip
    run = train(given, save=False, force=True).run
    assert any("memory.token_drop" in name for name in state(run))
    return unlike_on_ranks(state(run))


def short(name: str, *beside: Any, **settings: Any) -> Recipe:
    """Two steps of a technique on a small model of tokens, or of what it is for."""
    own = {} if name in HOME else {"model": {"layers": DEEP.get(name, 2), "width": 32, "heads": 4, "dropout": 0.1}}
    given = {"duration": "2 step", "validate": {"every": 0}} | own | settings
    return made(example(name), *beside, **given)


DEEP = {"share": 4, "token_drop": 4}
"""Techniques that need more blocks than two."""


CROWDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "sharded": ("zero, stage 3", ("lamb", "lora", "clip", "accumulate", "sam", "recompute", "warmup_cosine", "sanger",
                                  "length_warmup", "layer_drop")),
    "cut": ("tensor", ("muon", "lora", "clip", "adascale", "ema", "recompute", "warmup_linear", "sanger",
                       "length_warmup", "layer_drop")),
    "cut, states on disk": ("tensor", ("lars", "offload_states", "noise_scale", "autocast", "autoprog")),
    "cut, updates on the host": ("tensor", ("lamb", "zero_offload", "clip", "linear_scaling", "stack")),
    "stages": ("pipeline", ("adamw", "lora", "clip", "ema", "recompute", "wsd", "sanger", "length_warmup", "layer_drop",
                            "sam")),
}  # fmt: skip
"""Name -> layout and techniques that train together."""


def crowd(name: str) -> Recipe:
    """Many techniques at once, without a layout."""
    model = {"layers": 4, "width": 32, "heads": 4, "dropout": 0.1}
    return made(*map(example, CROWDS[name][1]), model=model, duration="4 step", validate={"every": 0})


def crowds() -> dict[str, float]:
    """crowd -> the difference from one process in its layout."""
    found: dict[str, float] = {}
    for name, wanted in torch.load(files() / "crowds.pt").items():
        chosen, alone = CROWDS[name][0], crowd(name)
        both = replace(alone, techniques=(*alone.techniques, *layout(chosen)), mesh=mesh(chosen, 2))
        # Weights of this machine are where the host updates them, and need no copies: those of a GPU do.
        with patch.object(zero_offload, "at_home", lambda p: False):
            mine = state(train(both, save=False, force=True).run)
        assert names_of_all(mine) >= set(wanted), name
        found[name] = apart(mine, wanted)
    return found


def live() -> dict[str, int]:
    """layout -> the highest live bytes of a rank."""
    found: dict[str, int] = {}
    for name in (name for name in layouts() if name in MEMORY):
        with LiveBytes() as meter:
            train(measured(name), save=False, force=True)
        found[name] = meter.peak
    return found


MEMORY = ("replicate", "zero, stage 1", "zero, stage 2", "zero, stage 3", "context x replicate")


def measured(name: str) -> Recipe:
    """The recipe whose memory is planned and measured."""
    model = {"layers": 4, "width": 64, "heads": 4, "dropout": 0.1}
    axes = MESHES.get(name, {})
    return recipe(example("adamw"), *layout(name), model=model, data=TinyData(context=32), batch=8, duration="3 step",
                  sample={"tokens": 0}, validate={"every": 0}, mesh=axes)  # fmt: skip


RULES: dict[str, dict[str, Any]] = {"sgd": {"lr": 0.1, "momentum": 0.9}, "adamw": {"lr": 1e-2}}
WAYS: dict[str, dict[str, int]] = {"data": {"data": 2}, "tensor": {"tensor": 2, "data": 1}, "alone": {"data": 1}}
"""Meshes that go on with what four ranks of `data` have saved."""


def saved() -> None:
    """Runs of zero that are saved on the way; `tensor` changes nothing yet."""
    for rule, settings in RULES.items():
        given = {"data": "text", "out": str(files()), "name": rule, "checkpoint": {"every": "2 step", "keep": 9}}
        shared = [technique_class(name)() for name in ("zero", "tensor")]
        train(made(technique_class(rule)(**settings), *shared, **given), data=made().data.open(), force=True)


def resumed(rule: str, way: str) -> float:
    """A copy of such a run resumed from its first checkpoint: the difference at its end from one process."""
    copy = files() / f"{rule}-{way}/checkpoints/step-000000002"
    run = train(resume=copy, mesh=WAYS.get(way), data=made().data.open(), force=True).run
    return apart(state(run), torch.load(files() / f"{rule}.pt"))


def plain_resumed() -> float:
    """What one process has saved, whose recipe names no technique for ranks."""
    return resumed("sgd", "plain")


def resumed_by_two() -> dict[str, float]:
    """All that two ranks can resume."""
    return {f"{rule}, {way}": resumed(rule, way) for rule in RULES for way in WAYS if way != "alone"}
