"""What two ranks find out together for `test_tensor.py`: `torchrun --nproc-per-node 2 tensor_ranks.py FOLDER`.

Each rank also trains alone what both train together, so that a difference is a number.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import scrimp.training
from scrimp.errors import UserError
from scrimp.lanes import Ranks
from scrimp.recipe import Recipe
from scrimp.registry import technique_class
from scrimp.run import exported
from scrimp.sharding import whole
from scrimp.training import Result, train
from scrimp.vocabulary import SharedCrossEntropy
from scrimp.world import ALONE, World, arranged
from tiny import MODEL, TinyData, home, recipe
from tiny_tasks import TINY, Memory

MESH = {"tensor": 2, "data": 1}
LLAMA = {"heads": 4, "kv_heads": 2, "activation": "swiglu", "norm": "rmsnorm", "qk_norm": True, "positions": "rotary",
         "bias": False, "vocab": 33}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "decoder": {},
    "llama": {"model": {**MODEL, **LLAMA}},
    "whole stream": {"tensor": {"sequence": False, "vocabulary": False}, "model": {**MODEL, "norm_at": "post"}},
    "encoder-decoder": {"task": "seq2seq", "names": ("clip", "muon", "ema")},
    "images": {"task": "classify, images", "names": ("lamb",)},
    "tuned": {"names": ("lora", "recompute", "adamw"), "lora": {"targets": "qkv|proj|up|down"}},
}
"""Name of a check -> what differs in its recipe from the tiny one."""


def made(case: dict[str, Any], together: bool, **more: Any) -> Recipe:
    """The recipe of a case, for one process or for both ranks."""
    used: list[Any] = [technique_class(n)(**{**technique_class(n).card.example, **case.get(n, {})})
                       for n in case.get("names", ())]  # fmt: skip
    settings: dict[str, Any] = {"dtype": "float64", "batch": 4, "duration": "10 step",
                                "validate": {"every": "10 step", "batches": 1}, **home()}  # fmt: skip
    if "task" in case:
        tiny = TINY[case["task"]]
        settings |= {"model": dict(tiny.model), "data": Memory(case["task"]), "task": tiny.name or case["task"]}
    settings |= {"model": case["model"]} if "model" in case else {}
    if together:
        used.append(technique_class("tensor")(**case.get("tensor", {})))
        settings["mesh"] = MESH
    return recipe(*used, **{**settings, **more})


def saved(out: Path, together: bool) -> Recipe:
    """The recipe of a run that is saved."""
    case = {"model": {**MODEL, **LLAMA}, "names": ("adamw",)}
    return made(case, together, out=str(out), name="run", data="text")


def alone(given: Recipe) -> Result:
    """A run of this process, though there are others."""
    with patch.object(scrimp.training, "arranged", lambda mesh, device: ALONE):
        return train(given, save=False, force=True)


def difference(case: dict[str, Any]) -> dict[str, Any]:
    """The largest of all weights, states and exported weights, each in units of its tensor's largest number."""
    one, both = alone(made(case, together=False)), train(made(case, together=True), save=False, force=True)
    tables: list[dict[str, Tensor]] = []
    for found in (one, both):
        state = {f"{kind}/{n}": whole(t) for kind, tensors in found.run.state().items() for n, t in tensors.items()}
        tables.append(state | {f"export/{n}": t for n, t in exported(found.run).items()})
    a, b = tables
    same = a.keys() == b.keys() and all(a[name].shape == b[name].shape for name in a)
    worst = max(float((a[n] - b[n]).abs().max() / a[n].abs().max().clamp(min=1e-30)) for n in a if a[n].numel())
    held = [sum(p.numel() for p in found.run.model.parameters()) for found in (one, both)]
    return {"same": same, "worst": worst, "share": held[1] / held[0], "text": one.text == both.text,
            "validation": abs(one.validation["loss"] - both.validation["loss"])}  # fmt: skip


def refused(**case: Any) -> str:
    """What a user is told instead of training."""
    try:
        train(made(case, together=True), save=False, force=True)
    except UserError as error:
        return str(error)
    return ""


def loss(ranks: Ranks) -> dict[str, float]:
    """How far the shared loss of logits of 5 tokens and its gradient are from torch's, with and without smoothing."""
    found: dict[str, float] = {}
    chance = torch.Generator().manual_seed(0)
    logits = 30 * torch.randn(6, 5, generator=chance, dtype=torch.float64)
    targets = torch.tensor([0, 2, 3, -100, 4, 2])
    for smoothing in (0.0, 0.1):
        full, part = (logits.clone().requires_grad_() for _ in range(2))
        own = slice(3 * ranks.place, 3 * ranks.place + 3)
        head = SharedCrossEntropy(lambda x, own=own: x[..., own], 5, ranks)
        expected = F.cross_entropy(full, targets, reduction="sum", label_smoothing=smoothing)
        value = head(part, head, targets, smoothing)
        (2 * expected).backward()
        (2 * value).backward()
        assert full.grad is not None and part.grad is not None
        found[f"value {smoothing}"] = float((value - expected).detach().abs())
        found[f"gradient {smoothing}"] = float((part.grad - full.grad)[:, own].abs().max())
    return found


def lengths(world: World) -> dict[str, int]:
    """Tokens that the second block sees: in training, in evaluation, and of a sequence that is not even."""
    run = train(made({}, together=True), save=False, force=True).run
    seen: list[int] = []
    run.model.get_submodule("blocks.1").register_forward_pre_hook(lambda block, args: seen.append(args[0].shape[1]))
    tokens = run.batch(0)["tokens"]
    run.model.train()
    for given in (tokens, tokens[:, :15]):
        run.model(given, sample=torch.arange(len(given)))
    run.model.eval()
    run.model(tokens)
    return dict(zip(("training", "uneven", "evaluation"), seen, strict=True))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world = arranged(made({}, together=True).mesh, "cpu")
    found: dict[str, Any] = {name: difference(case) for name, case in CASES.items()}
    found["loss"], found["lengths"] = loss(Ranks.of(world)), lengths(world)
    found["refused"] = {
        "heads": refused(model={**MODEL, "heads": 3, "head_width": 8}),
        "hidden": refused(model={**MODEL, "hidden": 33}),
        "scaled": refused(names=("ssf",)),
        "dropped": refused(names=("token_drop",)),
    }
    train(saved(folder / "run", together=True), data=TinyData().open(), force=True)
    (folder / f"found-{world.rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
