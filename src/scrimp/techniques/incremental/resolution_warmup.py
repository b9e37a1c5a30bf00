"""Progressive resolution: small images first, large ones later.

    side = image (start + (1 - start) n / levels) while n of the `levels` equal parts of the warm-up have passed

rounded up to whole patches. A smaller image is W x W^T of the whole one, and the table of its patches' positions is
(W' x W') of the whole table, where W and W' are linear interpolation that averages over all that it passes over; the
class token's position is left alone. So the table has its full size throughout, every stage trains the whole of it, and
nothing has to be carried over; fixed sines and cosines are read in the same way, and a place keeps its wave. Training
and validation see the same size, hence early validations are those of small images.

Papers: EfficientNetV2, Tan and Le, ICML 2021, arXiv 2104.00298, which also lets regularization grow with the images
(this does not: set the data's and the model's own); FixRes, Touvron et al., NeurIPS 2019, arXiv 1906.06423, on why the
last stage should have the size of the test. A ViT has a quarter of the tokens at half the side.

Saves: time and activation memory of early steps. Costs: images are made small on the host, and what needs detail
is learned late. Not for: images of a few patches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scrimp.clock import Duration
from scrimp.errors import UserError
from scrimp.models.seams import wrap_forward
from scrimp.technique import Card, Technique, above_zero, at_least

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import Batch


@dataclass(frozen=True, kw_only=True)
class ResolutionWarmup(Technique):
    """Small images first, large ones later."""

    card = Card(
        paper="arXiv:2104.00298",
        section="Incremental learning",
        saves="time and activation memory of early steps",
        costs="detail is learned late",
        sets=("length schedule",),
        phase={"model": "sizes"},
        example={"start": 1.0},
        neutral={"start": 1.0},
    )
    start: float = 0.5
    """First side of the images, as a share of the whole one; 1 leaves everything as it is."""
    until: str | float = 0.6
    """Duration until the full size."""
    levels: int = 3
    """How many times the images grow."""

    def __post_init__(self) -> None:
        at_least(1, self, "levels")
        above_zero(self, "start")
        Duration.parse(self.until, "until")

    def stages(self) -> tuple[str | float, ...]:
        """The points at which images grow: at each the run is rebuilt, hence planned for its own size."""
        if self.start == 1:
            return ()
        return Duration.parse(self.until).evenly(self.levels)

    def model(self, model: nn.Module, run: Run) -> nn.Module:
        """Read positions, and images, at the size of the stage."""
        if self.start == 1:
            return model
        config: Any = getattr(model, "config", None)
        image, patch = getattr(config, "image", 0), getattr(config, "patch", 0)
        if not (image and patch):
            fix = "Drop it, or use a model of images; length_warmup is its twin for sequences."
            raise UserError("the model reads no images.", run.where(self), fix)
        share = self.start + (1 - self.start) * run.clock.passed(self.stages()) / self.levels
        whole = image // patch
        first, small = (min(whole, -(-round(s * image) // patch)) for s in (self.start, share))
        if first == whole:
            what = f"{self.start:g} of a side of {image} pixels, rounded up to patches of {patch}, is the whole side."
            raise UserError(what, run.where(self, "start"), "Start smaller, or choose smaller patches.")
        if small == whole:
            return model
        self._check_masks(run, small**2)
        for table in _tables(model, whole**2, run.where(self)):
            _resample(table, whole, small)
        run.task = Resized(run.task, image, small * patch)
        return model

    def _check_masks(self, run: Run, patches: int) -> None:
        """Whether a task that hides a share of the patches can."""
        ratio = getattr(run.task, "ratio", None)
        if ratio is not None and not 0 < int(patches * (1 - ratio)) < patches:
            what = f"a ratio of {ratio} leaves {int(patches * (1 - ratio))} of {patches} patches visible."
            raise UserError(what, run.where(self, "start"), "Start with larger images.")


class Resized:
    """A task whose batches are of smaller images; all else is the task's own.

    Args:
        image: side of the images that come.
        side: to which they are made smaller.
    """

    def __init__(self, task: Any, image: int, side: int) -> None:
        self.task = task
        self.weights = shrinking(image, side).astype(np.float32)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def batch(self, items: dict[str, np.ndarray], sample: np.ndarray) -> Batch:
        """The task's batch of small images, float32 [B, channels, side, side]."""
        small = self.weights @ items["images"] @ self.weights.T
        return self.task.batch({**items, "images": np.ascontiguousarray(small)}, sample)


class Shrink(nn.Module):
    """A table of positions as a smaller grid reads it: [first + whole^2, C] -> [first + small^2, C]."""

    def __init__(self, whole: int, small: int) -> None:
        super().__init__()
        self.whole, self.small = whole, small
        self.register_buffer("weights", torch.empty(small**2, whole**2), persistent=False)

    def refill(self) -> None:
        """The interpolation, of rows and of columns at once."""
        one = shrinking(self.whole, self.small)
        self.weights.copy_(torch.from_numpy(np.kron(one, one)))  # type: ignore[operator]

    def forward(self, table: Tensor) -> Tensor:
        first = len(table) - self.whole**2
        return torch.cat([table[:first], self.weights.to(table.dtype) @ table[first:]])  # type: ignore[operator]


def shrinking(whole: int, small: int) -> np.ndarray:
    """Linear interpolation of a line of points at fewer ones, each an average over all that it stands for.

    The same as torch's bilinear interpolation with `antialias`. Shapes: float64 [small, whole].
    """
    scale = whole / small
    center = (np.arange(small) + 0.5) * scale
    weights = np.maximum(0.0, 1 - np.abs(np.arange(whole) + 0.5 - center[:, None]) / scale)
    return weights / weights.sum(1, keepdims=True)


def _tables(model: nn.Module, patches: int, where: str) -> list[nn.Module]:
    """The tables of positions of patches: not that of a text tower, whose parent reads tokens.

    Raises:
        UserError: if there is none.
    """
    found: list[nn.Module] = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        parent = model.get_submodule(name.rpartition(".")[0])
        images = hasattr(parent, "patch") or hasattr(parent, "predict")
        if name.rpartition(".")[2] == "positions" and images and isinstance(weight, Tensor):
            if len(weight) - patches not in (0, 1):
                raise UserError(f"`{name}` has {len(weight)} rows for {patches} patches.", where, "Drop it.")
            found.append(module)
    if not found:
        raise UserError("the model has no table of positions of its patches.", where, "Drop it.")
    return found


def _resample(table: nn.Module, whole: int, small: int) -> None:
    shrink = Shrink(whole, small)
    table.add_module("shrink", shrink)

    def around(forward: Callable[..., object]) -> Callable[..., object]:
        return lambda ids: F.embedding(ids, shrink(table.weight))

    wrap_forward(table, around)
