"""Images for vision models: pictures become memory-mapped bytes of one size, built once and cached by content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Final

import numpy as np

from scrimp.data.cache import cache_folder, content_hash, publish, read_meta
from scrimp.data.documents import located
from scrimp.data.faults import Faults
from scrimp.data.pictures import Label, Source, UnreadableError, decoded, find, sources
from scrimp.data.pixels import Pixels, Processor
from scrimp.errors import UserError

FORMAT: Final = 2
"""Raised whenever the same settings would give other bytes, so that old caches are not used."""
SPLITS: Final = ("train", "validation")
NAMED: Final = 5
"""Strange classes that are named."""


@dataclass(frozen=True)
class Images:
    """Opened images."""

    train: Pixels
    validation: Pixels
    meta: dict[str, Any]
    """images of each split; image, channels, classes (names, or null), mean and std of the training images' channels;
    skipped: how many could not be read, and the first of them; key: of the content; files: sizes in bytes."""
    note: str = ""
    tokenizer: None = None

    @property
    def processor(self) -> Processor:
        """What an exported model's user needs to know of the images."""
        return Processor(self.train.image, self.train.mean, self.train.std, tuple(self.meta["classes"] or ()))

    @property
    def gives(self) -> tuple[str, ...]:
        """What items hold."""
        return ("images", "labels") if self.train.labeled else ("images",)

    @property
    def sizes(self) -> dict[str, int]:
        """What a model must fit."""
        found = {"image": self.train.image, "channels": self.train.channels}
        return found | ({"classes": len(self.meta["classes"])} if self.train.labeled else {})


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """Images from files."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "use_attribute_docstrings": True}
    source: str
    """A folder with a folder of pictures a class (or pictures without labels), an .npz, .parquet or IDX file (MNIST's,
    gzipped or not, its labels beside it), or a glob of such files."""
    validation: str = ""
    """Source of the held-out images; else a share of `source` is held out."""
    holdout: float = 0.05
    """Share that is held out, by content, so that copies stay together."""
    image: int = 0
    """Side of the images, to which others are resized and cut; 0 takes that of the first one."""
    channels: int = 0
    """1 for gray, 3 for color; 0 takes those of the first one."""
    field: str = "image"
    """Column of .parquet that holds the encoded images, or array of .npz that holds them, `x` if there is none."""
    label: str = "label"
    """Column or array with the labels, whole numbers or texts; of .npz, `y` if there is none."""
    crop: int = 0
    """Pixels of black around a training image before a square of its size is cut out at random."""
    flip: bool = False
    """Mirror half of the training images."""
    mean: tuple[float, ...] = ()
    """Of each channel, of values from 0 to 1, for normalization; empty takes the training images'."""
    std: tuple[float, ...] = ()
    """Standard deviation of each channel; empty takes the training images'."""
    skip: float = 0.01
    """Share of the images that may be unreadable; they are left out and named."""
    cache: str = ""
    """Folder of built images; default $SCRIMP_CACHE or ~/.cache/scrimp."""

    def __post_init__(self) -> None:
        if not 0 < self.holdout < 1:
            raise UserError(f"holdout must be between 0 and 1, not {self.holdout}.")
        if not 0 <= self.skip <= 1:
            raise UserError(f"skip must be from 0 to 1, not {self.skip}.")
        if self.image < 0 or self.crop < 0:
            raise UserError("image and crop must be at least 0.")
        if self.channels not in (0, 1, 3):
            raise UserError(f"channels must be 1, 3, or 0 for the images' own, not {self.channels}.")
        if any(value <= 0 for value in self.std):
            raise UserError("std must be above 0.")

    def open(self) -> Images:
        """The images, built if they are not in the cache.

        Raises:
            UserError: if there are none, too many cannot be read, or labels do not fit together.
        """
        root = cache_folder(self.cache, "images")
        folder = root / self._key(root)
        meta = read_meta(folder) or publish(folder, lambda partial: _build(self, partial))
        meta = {**meta, "key": folder.name}
        return _opened(self, meta, folder)

    def outline(self) -> Images:
        """The images if they are built, else zeros of their sizes, for a plan."""
        root = cache_folder(self.cache, "images")
        if read_meta(root / self._key(root)):
            return self.open()
        parts = sources(self.source, self.field, self.label)
        held = sources(self.validation, self.field, self.label) if self.validation else []
        first = _first(parts, self)
        count = sum(len(part.labels) for part in parts)
        kept = sum(len(part.labels) for part in held) or max(1, round(count * self.holdout))
        names = _classes([label for part in parts for label in part.labels])
        usual = [0.5] * len(first)
        meta = {"images": {"train": count - (0 if held else kept), "validation": kept}, "image": first.shape[1],
                "channels": len(first), "classes": names, "mean": usual, "std": usual}  # fmt: skip
        return replace(_opened(self, meta, None), note="The images are not read yet: some may be unreadable.")

    def anchored(self) -> ImageData:
        """The same settings with absolute paths, which hold from any working directory."""
        cache = str(Path(self.cache).expanduser().absolute()) if self.cache else ""
        held = located(self.validation) if self.validation else ""
        return replace(self, source=located(self.source), validation=held, cache=cache)

    def found(self) -> bool:
        """Whether there are images at the source."""
        try:
            return bool(find(self.source)) and (not self.validation or bool(find(self.validation)))
        except UserError:
            return False

    def _key(self, root: Path) -> str:
        """The name of the built images: a hash of all that their bytes and labels are a function of."""
        named: list[Any] = [FORMAT, self.image, self.channels, self.field, self.label, self.skip]
        for source in (self.source, self.validation) if self.validation else (self.source,):
            files, place = find(source), Path(source).expanduser()
            # Names of folders are labels; those above the source do not matter.
            names = [str(path.relative_to(place)) if place.is_dir() else path.name for path in files]
            named.append(list(zip(names, content_hash(files, root), strict=True)))
        if not self.validation:
            named.append(self.holdout)
        return hashlib.blake2b(json.dumps(named, sort_keys=True).encode(), digest_size=16).hexdigest()


def _opened(settings: ImageData, meta: dict[str, Any], folder: Path | None) -> Images:
    """The splits of a built folder, or of zeros."""
    mean, std = settings.mean or tuple(meta["mean"]), settings.std or tuple(meta["std"])
    for name, given in (("mean", mean), ("std", std)):
        if len(given) != meta["channels"]:
            raise UserError(f"has {len(given)} values for {meta['channels']} channels.", f"data.{name}")
    if settings.crop >= meta["image"]:
        raise UserError(f"crop must be below the images' {meta['image']} pixels.", "data.crop")
    labeled = meta["classes"] is not None
    splits = [
        Pixels(folder / f"{s}.bin" if folder else None, meta["images"][s], meta["channels"], meta["image"], mean, std,
               folder / f"{s}.labels" if folder and labeled else None, labeled)
        for s in SPLITS
    ]  # fmt: skip
    told = Faults.kept(settings.skip, meta["skipped"]).told() if folder else ""
    return Images(replace(splits[0], crop=settings.crop, flip=settings.flip), splits[1], meta, told)


def _build(settings: ImageData, partial: Path) -> dict[str, Any]:
    """Fill a folder with the images and labels; returns what to say about them."""
    parts = sources(settings.source, settings.field, settings.label)
    first = _first(parts, settings)
    given = replace(settings, image=first.shape[1], channels=len(first))
    labels: dict[str, list[Label]] = {split: [] for split in SPLITS}
    faults = Faults(settings.skip)
    edge = round(settings.holdout * 2**64)
    with (partial / "train.bin").open("wb") as train, (partial / "validation.bin").open("wb") as validation:
        outputs: dict[str, BinaryIO] = {"train": train, "validation": validation}
        for pixels, label in _readable(parts, given, faults):
            split = "validation" if not settings.validation and fingerprint(pixels) < edge else "train"
            outputs[split].write(pixels.tobytes())
            labels[split].append(label)
        if settings.validation:
            others = sources(settings.validation, settings.field, settings.label)
            for pixels, label in _readable(others, given, faults):
                validation.write(pixels.tobytes())
                labels["validation"].append(label)
    faults.check()
    _check(labels)
    names = _classes(labels["train"])
    for split in SPLITS if names is not None else ():
        _numbers(labels[split], names or []).tofile(partial / f"{split}.labels")
    counts = {split: len(found) for split, found in labels.items()}
    shape = (counts["train"], given.channels, given.image, given.image)
    mean, std = moments(np.memmap(partial / "train.bin", dtype=np.uint8, mode="r", shape=shape))
    return {"images": counts, "image": given.image, "channels": given.channels, "classes": names, "mean": mean,
            "std": std, "skipped": faults.meta()}  # fmt: skip


def _first(parts: list[Source], settings: ImageData) -> np.ndarray:
    """The first readable image, which settles what the settings leave open."""
    for pixels, _ in _readable(parts, settings, Faults(1.0)):
        return pixels
    raise UserError("none of the images can be read.", "data.source", "Look at one of them.")


def _readable(parts: list[Source], settings: ImageData, faults: Faults) -> Iterator[tuple[np.ndarray, Label]]:
    """Decoded images with labels; those that are damaged are noted."""
    pairs = (pair for part in parts for pair in zip(part.pictures(), part.labels, strict=True))
    for (name, raw), label in pairs:
        faults.total += 1
        try:
            found = decoded(raw, settings.image, settings.channels)
        except UnreadableError as error:
            faults.add(name, str(error))
        else:
            yield found, label


def _check(labels: dict[str, list[Label]]) -> None:
    """Refuse an empty split."""
    count = sum(len(found) for found in labels.values())
    for split, found in labels.items():
        if not found:
            fix = "Use another `data.holdout`, or name a source in `data.validation`."
            raise UserError(f"of {count} images, none is left for {split}.", "data.holdout", fix)


def _classes(labels: list[Label]) -> list[str] | None:
    """The names of the classes: texts in order, or numbers from 0 to the largest; None without labels."""
    if not labels or labels[0] is None:
        return None
    if all(isinstance(label, int) for label in labels):
        whole = [int(label) for label in labels if label is not None]
        if min(whole) < 0:
            raise UserError(f"the label {min(whole)} is negative.", "data.label", "Number the classes from 0.")
        return [str(i) for i in range(max(whole) + 1)]
    return sorted({str(label) for label in labels})


def _numbers(labels: list[Label], names: list[str]) -> np.ndarray:
    """Labels as numbers of the classes: int64."""
    place = {name: i for i, name in enumerate(names)}
    strange = sorted({str(label) for label in labels} - place.keys())
    if strange:
        what = f"held-out images are of classes that training has none of: {', '.join(strange[:NAMED])}."
        raise UserError(what, "data.validation", "Use sources of the same classes.")
    return np.array([place[str(label)] for label in labels], dtype=np.int64)


def fingerprint(pixels: np.ndarray) -> int:
    """64 bits of an image's content, so that copies get the same split."""
    return int.from_bytes(hashlib.blake2b(pixels.tobytes(), digest_size=8).digest(), "little")


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
