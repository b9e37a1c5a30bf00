"""Masked images: predict the pixels of hidden patches from the visible ones.

    loss = sum over hidden patches of mean over their values of (prediction - target)^2
    target = (patch - mean(patch)) / sqrt(var(patch) + 1e-6)      with the unbiased variance, as MAE has it

Paper: He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, arXiv 2111.06377.

Which patches are hidden is a function of the sample's number: it is part of the batch, so that a resumed run, a plan or
other micro-batches see the same.

Legend of shapes: B batch, N patches, K visible patches, P values of a patch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Final

import numpy as np
import torch
from torch import Tensor, nn

from scrimp.errors import UserError
from scrimp.models.patches import unfolded
from scrimp.tasks.sums import Sums, evaluated

SALT: Final = 0x6D61736B
"""Keeps the masks apart from other draws by sample, such as the crops."""


@dataclass(frozen=True, kw_only=True)
class MaskedImage:
    """Loss: squared error of the hidden patches' values, a mean over each patch, summed over hidden patches."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "use_attribute_docstrings": True}
    needs: ClassVar[tuple[str, ...]] = ("images",)
    ratio: float = 0.75
    """Share of the patches that is hidden."""
    normalize: bool = True
    """Targets are patches of mean 0 and variance 1."""
    patch: int = 0
    """Side of what is hidden, in pixels; 0 takes the model's patch."""

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise UserError(f"ratio must be between 0 and 1, not {self.ratio}.")
        if self.patch < 0:
            raise UserError(f"patch must be at least 0, not {self.patch}.")

    def fitted(self, config: Any) -> MaskedImage:
        """The task with the model's patch.

        Raises:
            UserError: if the model reconstructs no images, has another patch, or too few patches to hide some.
        """
        if not {"decoder_layers", "patch"} <= {f.name for f in fields(config)}:
            fix = "Use `name: masked_autoencoder`, or one of its presets."
            raise UserError("the task `masked-image` needs a model that predicts patches.", "model", fix)
        if self.patch not in (0, config.patch):
            raise UserError(f"patch is {self.patch}, the model's {config.patch}.", "task.patch", "Leave it out.")
        kept = visible(config.patches, self.ratio)
        if not 0 < kept < config.patches:
            what = f"a ratio of {self.ratio} leaves {kept} of {config.patches} patches visible."
            raise UserError(what, "task.ratio", "Use another ratio or smaller patches.")
        return replace(self, patch=config.patch)

    def batch(self, items: dict[str, np.ndarray], sample: np.ndarray) -> dict[str, Tensor]:
        """A batch from images [B, channels, H, W] and the samples' numbers in the run, [B].

        Returns:
            images; kept, the visible patches, int64 [B, K]; restore, where each patch is in a list of the kept ones
            followed by the hidden ones, int64 [B, N]; sample.
        """
        images = torch.from_numpy(items["images"])
        patches = (images.shape[2] // self.patch) * (images.shape[3] // self.patch)
        order = np.stack([np.random.default_rng([SALT, int(s)]).permutation(patches) for s in sample])
        return {
            "images": images,
            "kept": torch.from_numpy(order[:, : visible(patches, self.ratio)].copy()),
            "restore": torch.from_numpy(order.argsort(1)),
            "sample": torch.from_numpy(sample),
        }

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        """How many hidden patches the summed loss sums over: int64, a scalar."""
        return hidden(batch).sum()

    def tokens(self, batch: dict[str, Tensor]) -> Tensor:
        """Images, which are what a run of images counts as tokens."""
        return torch.tensor(len(batch["images"]))

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The summed loss."""
        predicted = model(batch["images"], batch["kept"], batch["restore"], batch["sample"])
        goal = target(batch["images"], self.patch, self.normalize).to(predicted.dtype)
        error = (predicted - goal).square().mean(2)
        return (error * hidden(batch)).sum()

    def evaluate(self, model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        """Mean loss of a hidden patch over the batches; guessing the target's mean gives about 1 if normalized."""
        return evaluated(self, model, batches)

    def sums(self, model: nn.Module, batch: dict[str, Tensor]) -> Sums:
        """What scores follow from."""
        return {"loss": self.loss(model, batch), "count": self.count(batch)}

    def scores(self, sums: Sums) -> dict[str, float]:
        """What sums over all batches say."""
        return {"loss": float(sums["loss"] / sums["count"])}


def visible(patches: int, ratio: float) -> int:
    """How many patches stay visible: the whole part of what the ratio leaves, as MAE has it."""
    return int(patches * (1 - ratio))


def hidden(batch: dict[str, Tensor]) -> Tensor:
    """Which patches are hidden: bool [B, N]."""
    return batch["restore"] >= batch["kept"].shape[1]


def target(images: Tensor, patch: int, normalize: bool) -> Tensor:
    """What is predicted: the patches' values, [B, N, P]."""
    values = unfolded(images, patch)
    if not normalize:
        return values
    variance, mean = torch.var_mean(values, dim=2, keepdim=True)
    return (values - mean) / (variance + 1e-6).sqrt()
