"""Token masking: the same task with and without, in time, floating-point operations and live memory of a step.

    python benchmarks/token_masking.py                 # some minutes on one thread; writes evidence/token_masking.json
    python benchmarks/token_masking.py --only mae      # replaces the rows whose names hold the word
    python benchmarks/token_masking.py --rounds 2      # quicker, noisier

    mae    masked images at 75 %: mask tokens in the encoder, against hidden patches left out; an encoder of 12 blocks
           of width 192, 196 patches, and decoders from the light one to one as wide as the encoder
    flip   images and texts at 50 and 75 %, images a second at equal settings
    mass   fragments of 50 %: the decoder over all places, against over the fragment; the encoder is kept short, and
           the decoder's own forward and backward pass is timed by itself, too

Arms take turns, so that another load on the machine hits both alike; numbers are medians over rounds, ratios medians
of the rounds' ratios. Data are random: what is measured does not depend on them. FLOPs are those of the operators
that ran (torch.utils.flop_counter, attention with its square part). Bytes are those on top of weights: of a step the
peak of live storages, gradients included; of activations what lives when the forward pass is done.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from scrimp.folder import environment
from scrimp.meter import LiveBytes
from scrimp.recipe import Recipe
from scrimp.registry import technique_class
from scrimp.run import Run, build
from scrimp.stages import new_clock

ROOT = Path(__file__).parents[1]
OUT = ROOT / "evidence" / "token_masking.json"
SIDE, CONTEXT, VOCAB = 112, 256, 512
TRUNK = {"width": 192, "heads": 3}
MAE = {"name": "masked_autoencoder", **TRUNK, "layers": 12, "patch": 8, "drop": False}
DECODERS = {
    "2 blocks of 96": {"decoder_layers": 2, "decoder_width": 96, "decoder_heads": 3},
    "4 blocks of 96": {"decoder_layers": 4, "decoder_width": 96, "decoder_heads": 3},
    "4 blocks of 192": {"decoder_layers": 4, "decoder_width": 192, "decoder_heads": 3},
    "8 blocks of 192": {"decoder_layers": 8, "decoder_width": 192, "decoder_heads": 3},
    "12 blocks of 192": {"decoder_layers": 12, "decoder_width": 192, "decoder_heads": 3},
}
CLIP = {"name": "two_towers", **TRUNK, "layers": 3, "image_layers": 12, "patch": 8, "projection": 128}
MASS = {"name": "encoder_decoder", **TRUNK, "layers": 2, "decoder_layers": 8}


class Rows:
    """Random items in memory."""

    context = CONTEXT

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.arrays = arrays

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def read(self, ids: np.ndarray, sample: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """The items of these numbers."""
        return {name: value[np.asarray(ids)] for name, value in self.arrays.items()}


@dataclass(frozen=True)
class RandomData:
    """A data set of noise: of images, of images with texts, or of texts."""

    kind: str

    def open(self) -> Any:
        """Sixteen items."""
        chance = np.random.default_rng(0)
        images = {"images": chance.standard_normal((16, 3, SIDE, SIDE)).astype(np.float32)}
        text = {"captions": chance.integers(3, VOCAB, (16, 32)), "caption_length": np.full(16, 32)}
        picture, words = {"image": SIDE, "channels": 3}, {"vocab": VOCAB, "context": CONTEXT}
        arrays, sizes = {
            "images": (images, picture),
            "pairs": (images | text, {**picture, "vocab": VOCAB, "context": 32}),
            "text": ({"tokens": chance.integers(3, VOCAB, (16, CONTEXT + 1))}, words),
        }[self.kind]
        tokenizer = SimpleNamespace(vocab=VOCAB, end=0, mask=1, special=frozenset({0, 1, 2}))
        rows = Rows(arrays)
        gives = {"images": ("images",), "pairs": ("images", "captions"), "text": ("tokens",)}[self.kind]
        return SimpleNamespace(train=rows, validation=rows, tokenizer=tokenizer, gives=gives, sizes=sizes)


def run_of(task: str, model: dict[str, Any], data: str, batch: int, **techniques: dict[str, Any]) -> Run:
    """A run, built."""
    made = [technique_class(name)(**settings) for name, settings in {"adamw": {}, **techniques}.items()]
    recipe = Recipe(model=dict(model), task=task, data=RandomData(data), techniques=tuple(made), batch=batch,
                    duration="100 step", log={"tensorboard": False})  # fmt: skip
    opened = RandomData(data).open()
    return build(recipe, opened, new_clock(recipe, opened))


@dataclass(frozen=True)
class Arm:
    """Something that is timed."""

    step: Callable[[], None]
    forward: Callable[[], torch.Tensor]
    """Its forward pass, whose result holds the activations."""
    weights: int
    """Bytes of the weights, which the meter counts as soon as they are read."""


def weighed(run: Run, step: Callable[[], None], forward: Callable[[], torch.Tensor]) -> Arm:
    """A step and the weights that it reads."""
    return Arm(step, forward, sum(p.nbytes for p in run.model.parameters()))


def stepped(run: Run) -> Arm:
    """A whole step of training, always on the same batch."""
    batch = run.batch(0)
    count = run.task.count(batch)

    def step() -> None:
        assert run.backward and run.step and run.optimizer
        run.set_lr()
        run.backward(batch, count)
        run.step()
        run.optimizer.zero_grad(set_to_none=True)

    def forward() -> torch.Tensor:
        assert run.loss
        return run.loss(run.model, batch)

    return weighed(run, step, forward)


def decoded(run: Run) -> Arm:
    """The decoder, head and loss of a step by themselves, forward and backward."""
    batch, model = run.batch(0), run.model
    states = model.encode(batch["tokens"]).detach().requires_grad_()
    names = ("read", "places", "written")

    def forward() -> torch.Tensor:
        given = {name: batch[name] for name in names if name in batch}
        return model(None, batch["decoder_tokens"], batch["targets"], sample=batch["sample"], states=states, **given)

    def step() -> None:
        forward().backward()
        model.zero_grad(set_to_none=True)
        states.grad = None

    return weighed(run, step, forward)


def compared(arms: dict[str, Arm], items: int, rounds: int) -> dict[str, Any]:
    """Arms in turns; the first is what others are compared with."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    rows: dict[str, Any] = {}
    for name, arm in arms.items():
        arm.step()
        with FlopCounterMode(display=False) as counter:
            arm.step()
        with LiveBytes() as meter:
            arm.step()
        with LiveBytes() as held:
            loss = arm.forward()
        rows[name] = {"flops": counter.get_total_flops(), "peak_bytes": meter.peak - arm.weights,
                      "activation_bytes": held.live - arm.weights}  # fmt: skip
        del loss
    for turn in range(rounds):
        for name in list(arms)[:: 1 if turn % 2 == 0 else -1]:
            begin = time.perf_counter()
            arms[name].step()
            seconds[name].append(time.perf_counter() - begin)
    first = next(iter(arms))
    for name, row in rows.items():
        row["seconds"] = statistics.median(seconds[name])
        row["items_per_second"] = items / row["seconds"]
        row["times_as_fast"] = statistics.median(a / b for a, b in zip(seconds[first], seconds[name], strict=True))
        row["flops_ratio"] = row["flops"] / rows[first]["flops"]
        row["bytes_ratio"] = row["peak_bytes"] / rows[first]["peak_bytes"]
        row["activations_ratio"] = row["activation_bytes"] / rows[first]["activation_bytes"]
    return rows


def cases() -> dict[str, Callable[[], tuple[dict[str, Arm], int]]]:
    """name -> what makes its arms, and the items of a step."""
    found: dict[str, Callable[[], tuple[dict[str, Arm], int]]] = {}
    for name, decoder in DECODERS.items():
        found[f"mae, decoder of {name}"] = lambda decoder=decoder: (
            {
                "mask tokens": stepped(run_of("masked-image", MAE | decoder, "images", 8)),
                "mae": stepped(run_of("masked-image", MAE | decoder, "images", 8, mae={})),
            },
            8,
        )
    found["flip"] = lambda: (
        {
            "none": stepped(run_of("contrastive", CLIP, "pairs", 8)),
            "flip 50 %": stepped(run_of("contrastive", CLIP, "pairs", 8, flip={"mask": 0.5})),
            "flip 75 %": stepped(run_of("contrastive", CLIP, "pairs", 8, flip={"mask": 0.75})),
        },
        8,
    )
    for name, made in {"mass, a step": stepped, "mass, the decoder": decoded}.items():
        found[name] = lambda made=made: (
            {
                "whole decoder": made(run_of("fragment", MASS, "text", 8)),
                "mass": made(run_of("fragment", MASS, "text", 8, mass={})),
            },
            8,
        )
    return found


def main() -> None:
    """Measure what is asked for, print a line an arm, and replace the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a word that a row's name must hold")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(OUT.read_text())["rows"] if OUT.exists() else {}
    for name, make in cases().items():
        if args.only not in name:
            continue
        rows[name] = compared(*make(), args.rounds)
        for arm, row in rows[name].items():
            ratios = ", ".join(f"{key} {row[f'{key}_ratio']:5.3f}" for key in ("flops", "bytes", "activations"))
            print(f"{name:32} {arm:14} {row['seconds']:8.3f} s  {row['times_as_fast']:5.2f} x  {ratios}", flush=True)
        OUT.write_text(json.dumps({"environment": environment(), "rounds": args.rounds, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
