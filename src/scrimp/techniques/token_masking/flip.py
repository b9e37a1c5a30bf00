"""FLIP: the image tower of a contrastive model trains on a part of each image's patches.

    u = tower(class token, patches[S])        S = a random subset of the places, another one for each sample

Paper: Li et al., "Scaling Language-Image Pre-training via Masking", CVPR 2023, arXiv 2212.00794.

Texts are not masked, and nothing is reconstructed. The class token and at least one patch stay. Validation sees whole
images, which the model has not been trained on: `tune` lets the last part of the run train on whole images.

Saves: time and activations of the image tower, in proportion to what is hidden. Costs: patches that are not seen; a
gap between training and validation. Not for: small images of few patches. The paper spends the time that is saved on
more images, so compare at equal time as well as at equal images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from scrimp.errors import UserError
from scrimp.technique import Card, Technique, below_one

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import Batch

SALT: Final = 0x666C6970
"""Keeps these draws apart from all others that are keyed by the sample's number."""


@dataclass(frozen=True, kw_only=True)
class Flip(Technique):
    """The image tower trains on a part of each image's patches."""

    card = Card(
        paper="arXiv:2212.00794",
        section="Token masking",
        saves="time and activations of the image tower",
        costs="patches that are not seen; a gap between training and validation",
        sets=("tokens that are read",),
        phase={"batch": "augment"},
        example={"mask": 0.5, "tune": 0.25},
        neutral={"mask": 0.0},
    )
    mask: float = 0.5
    """Share of the patches that is left out."""
    tune: float = 0.0
    """Share of the run, its last, that trains on whole images."""

    def __post_init__(self) -> None:
        below_one(self, "mask", "tune")

    def stages(self) -> tuple[str | float, ...]:
        """Where the tuning begins."""
        return (1 - self.tune,) if self.tune and self.mask else ()

    def batch(self, batch: Callable[[int], Batch], run: Run) -> Callable[[int], Batch]:
        """Say which patches are seen."""
        if not {"images", "captions"} <= set(getattr(run.recipe.task, "needs", ())):
            what = "the task has no images with texts, whose patches could be left out."
            raise UserError(what, run.where(self), "Use the task `contrastive`, or drop it.")
        patches = getattr(getattr(run.model, "config", None), "patches", 0)
        if not patches:
            fix = "Use the model `two_towers`, or drop it."
            raise UserError("the model has no image tower that can leave out patches.", run.where(self), fix)
        points = self.stages()
        if not self.mask or (points and run.clock.passed(points)):
            return batch
        count = max(1, int(patches * (1 - self.mask) + 1e-9))

        def masked(step: int) -> Batch:
            found = batch(step)
            numbers = found["sample"].tolist()
            kept = np.stack([seen(int(number), patches, count) for number in numbers])
            return found | {"kept": torch.from_numpy(kept).to(found["sample"].device)}

        return masked


def seen(sample: int, patches: int, count: int) -> np.ndarray:
    """Places of the patches of a sample that are seen, in rising order: int64 [count]."""
    return np.sort(np.random.default_rng([SALT, sample]).permutation(patches)[:count])
