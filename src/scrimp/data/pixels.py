"""Images of one split, memory-mapped, and what is drawn for each when it is trained on: a crop and a flip."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Final

import numpy as np

SALT: Final = 0x63726F70
"""Keeps the crops apart from other draws by sample, such as the masks."""


@dataclass(frozen=True)
class Pixels:
    """Images of one split on disk, or zeros where there is no file.

    The file is mapped read-only at the first use, so that processes share its pages and a fork does no harm.
    """

    path: Path | None
    """uint8 [count, channels, image, image]; beside it, if there are labels, an int64 file."""
    count: int
    channels: int
    image: int
    mean: tuple[float, ...]
    """Of each channel, of values from 0 to 1."""
    std: tuple[float, ...]
    labels: Path | None = None
    labeled: bool = False
    crop: int = 0
    """Pixels of black around an image before a square of its size is cut out at random."""
    flip: bool = False
    """Whether half of the images are mirrored."""
    context: ClassVar[int] = 1
    """An image counts as one token."""

    def __len__(self) -> int:
        return self.count

    @cached_property
    def _pixels(self) -> np.ndarray:
        shape = (self.count, self.channels, self.image, self.image)
        if self.path is None:
            return np.broadcast_to(np.zeros(1, np.uint8), shape)
        return np.memmap(self.path, dtype=np.uint8, mode="r", shape=shape)

    @cached_property
    def _labels(self) -> np.ndarray:
        if self.labels is None:
            return np.broadcast_to(np.zeros(1, np.int64), (self.count,))
        return np.memmap(self.labels, dtype=np.int64, mode="r", shape=(self.count,))

    def read(self, ids: np.ndarray, sample: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Images as a task takes them.

        Args:
            ids: of the images, int64 [B].
            sample: number of each sample in the run, [B]; keys crops and flips, which there are none of without it.
        Returns:
            images: float32 [B, channels, image, image], normalized; labels, if there are any: int64 [B].
        Raises:
            IndexError: if there is no such image.
        """
        ids = np.asarray(ids, dtype=np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.count:
            raise IndexError(f"images are 0 to {self.count - 1}, not {ids.min()} to {ids.max()}")
        pixels = np.asarray(self._pixels[ids])
        if sample is not None and (self.crop or self.flip):
            pixels = changed(pixels, sample, self.crop, self.flip)
        std = np.array(self.std, np.float32)
        scale, shift = 1 / (255 * std), np.array(self.mean, np.float32) / std
        images = pixels.astype(np.float32) * scale[:, None, None] - shift[:, None, None]
        return {"images": images} | ({"labels": np.array(self._labels[ids])} if self.labeled else {})


@dataclass(frozen=True)
class Processor:
    """What another library needs to know to give a model its images: written beside the model."""

    image: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...] = ()
    """Names of the classes; empty without labels."""

    def save(self, folder: Path) -> None:
        """Write preprocessor_config.json, which transformers' ViTImageProcessor loads."""
        side = {"height": self.image, "width": self.image}
        said = {"image_processor_type": "ViTImageProcessor", "do_resize": True, "size": side, "resample": 3,
                "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(self.mean),
                "image_std": list(self.std)}  # fmt: skip
        (folder / "preprocessor_config.json").write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


def changed(pixels: np.ndarray, sample: np.ndarray, crop: int, flip: bool) -> np.ndarray:
    """Each image moved by up to `crop` pixels and perhaps mirrored, as its sample's number says.

    Args:
        pixels: uint8 [B, channels, H, W]. sample: at least 0, int64 [B].
    Returns:
        A copy of the same shape.
    """
    height, width = pixels.shape[2:]
    around = np.pad(pixels, ((0, 0), (0, 0), (crop, crop), (crop, crop)))
    out = np.empty_like(pixels)
    for i, number in enumerate(sample):
        chance = np.random.default_rng([SALT, int(number)])
        down, right = chance.integers(0, 2 * crop + 1, 2)
        one = around[i, :, down : down + height, right : right + width]
        out[i] = one[:, :, ::-1] if flip and chance.random() < 0.5 else one
    return out


def moments(pixels: np.ndarray, chunk: int = 4096) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, of values from 0 to 1; a constant channel counts as 1/255.

    Args:
        pixels: uint8 [items, channels, H, W]. chunk: items at once.
    """
    total, squares = np.zeros(pixels.shape[1], np.uint64), np.zeros(pixels.shape[1], np.uint64)
    for begin in range(0, len(pixels), chunk):
        part = pixels[begin : begin + chunk].astype(np.uint32)
        total += part.sum((0, 2, 3), dtype=np.uint64)
        squares += (part * part).sum((0, 2, 3), dtype=np.uint64)
    count = pixels.size // pixels.shape[1]
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 1.0))
    return (mean / 255).tolist(), (std / 255).tolist()
