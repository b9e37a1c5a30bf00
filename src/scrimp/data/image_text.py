"""Pictures with captions: decoded once into bytes of one size, cached by content, cropped anew at every visit.

What is kept is a square a little larger than what the model sees. A training item is a random crop of it, mirrored half
of the time, with one of its captions, all drawn by the number of the sample; a held-out item is the middle, with the
first caption. Copies of one picture are held out together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np

from scrimp.data.cache import cache_folder, content_hash, publish, read_meta
from scrimp.data.captions import KINDS, Picture, listed, pictures
from scrimp.data.documents import located
from scrimp.data.faults import Faults
from scrimp.data.items import Blanks, Opened, clipped, distinct, edge_of, end_token, take, tokenizer_key, tokenizer_of
from scrimp.data.padding import padded
from scrimp.data.pictures import UnreadableError, decoded
from scrimp.data.tables import find
from scrimp.data.text import TRAINED
from scrimp.data.tokenizer import Tokenizer, bytes_tokenizer
from scrimp.errors import UserError

FORMAT: Final = 2
"""Raised whenever the same settings would give other items, so that old caches are not used."""
GIVES: Final = ("images", "captions")
SALT: Final = 0x1A4E
"""Keeps the draws of crops apart from all others that are keyed by the sample's number."""
AT_ONCE: Final = 1000
"""Captions that are tokenized at once."""
PICTURE_BYTES: Final = 20_000
"""Of a usual picture, for plans of what is not built yet."""


@dataclass(frozen=True)
class Captioned:
    """Pictures of one split on disk, mapped at the first use."""

    folder: Path
    ids: np.ndarray
    """Places of this split's pictures among all, int64."""
    settings: ImageTextData
    pictures: int
    """Of both splits."""
    vary: bool
    """Whether crops and captions are drawn."""

    @property
    def context(self) -> int:
        """Tokens of the longest caption, its end among them."""
        return self.settings.context

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def _images(self) -> np.ndarray:
        side = self.settings.kept
        shape = (self.pictures, 3, side, side)
        return np.memmap(self.folder / "images.bin", dtype=np.uint8, mode="r", shape=shape)

    @cached_property
    def _tables(self) -> dict[str, np.ndarray]:
        """captions: where each begins among the tokens. owned: where each picture's begin among the captions."""
        return {name: np.load(self.folder / f"{name}.npy") for name in ("captions", "owned", "tokens", "classes")}

    def read(self, ids: np.ndarray, sample: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """`images`, float32 [B, 3, S, S], normalized; `captions`, int64 [B, longest rounded up to 8], with
        `caption_length`, int64 [B]; and `classes`, int64 [B], -1 for none.
        """
        chosen = self.ids[np.asarray(ids)]
        s, side, tables = self.settings, self.settings.image, self._tables
        images = np.empty((len(chosen), 3, side, side), dtype=np.float32)
        texts: list[np.ndarray] = []
        for row, item in enumerate(chosen):
            first, last = tables["owned"][item : item + 2]
            top = left = (s.kept - side) // 2
            caption, mirrored = first, False
            if self.vary and sample is not None:
                chance = np.random.default_rng([SALT, int(sample[row])])
                top, left = chance.integers(0, s.kept - side + 1, 2)
                mirrored = bool(chance.integers(2)) and s.flip
                caption = chance.integers(first, last)
            cut = self._images[item, :, top : top + side, left : left + side]
            images[row] = cut[:, :, ::-1] if mirrored else cut
            texts.append(tables["tokens"][slice(*tables["captions"][caption : caption + 2])])
        mean, deviation = (np.array(v, dtype=np.float32)[:, None, None] for v in (s.mean, s.deviation))
        captions, lengths = padded(texts, s.context)
        return {"images": (images / 255 - mean) / deviation, "captions": captions, "caption_length": lengths,
                "classes": tables["classes"][chosen]}  # fmt: skip


@dataclass(frozen=True)
class OpenedPictures(Opened):
    """Opened pictures."""

    classes: tuple[str, ...] = field(default=())
    """Names of the classes, by number."""


@dataclass(frozen=True, kw_only=True)
class ImageTextData:
    """Pictures with captions, from .jsonl lists or .tar shards."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "use_attribute_docstrings": True}
    source: str
    """A file, a folder, or a glob. A line of .jsonl is `{"image": path from the file, "text": caption or captions,
    "class": name or nothing}`; a .tar has members `KEY.png` or `.jpg` with `KEY.txt`, and `KEY.cls` for a class."""
    fields: tuple[str, str, str] = ("image", "text", "class")
    """Fields of a line with the path, the text and the class."""
    image: int = 64
    """Side of the images that the model sees, in pixels."""
    kept: int = 0
    """Side of the squares that are kept, of which crops are cut; 0 for 9/8 of `image`."""
    flip: bool = True
    """Mirror half of the crops."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Subtracted from red, green and blue between 0 and 1; CLIP's by default."""
    deviation: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """What they are divided by then."""
    tokenizer: str = "bpe"
    """bytes; bpe, trained on the training captions; or the path of a tokenizer.json or of a folder that has one."""
    vocab: int = 4096
    """Size of the trained BPE."""
    end: str = ""
    """End-of-text token of a given tokenizer.json; found by itself when it has a usual name."""
    context: int = 32
    """Tokens of a caption at most, its end among them; longer ones are cut."""
    holdout: float = 0.05
    """Share of the pictures that is held out, by content, so that copies stay together; at least one."""
    skip: float = 0.01
    """Share of faulty items that are left out; with more, nothing is built."""
    cache: str = ""
    """Folder of built data; default $SCRIMP_CACHE or ~/.cache/scrimp."""

    def __post_init__(self) -> None:
        if not self.kept:
            object.__setattr__(self, "kept", self.image * 9 // 8)
        for name, least in {"image": 1, "kept": self.image, "context": 2}.items():
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, not {getattr(self, name)}.")
        if not 0 < self.holdout < 1:
            raise UserError(f"holdout must be between 0 and 1, not {self.holdout}.")
        if not 0 <= self.skip < 1:
            raise UserError(f"skip must be at least 0 and less than 1, not {self.skip}.")
        if not all(value > 0 for value in self.deviation):
            raise UserError(f"deviation must be above 0, not {self.deviation}.")
        if self.tokenizer == "bpe" and self.vocab < 257:
            raise UserError(f"vocab must be at least 257 for a byte-level BPE, not {self.vocab}.")

    def open(self) -> OpenedPictures:
        """The pictures, built if they are not in the cache.

        Raises:
            UserError: if there are none, or too many are faulty.
        """
        folder = self._folder()
        meta = read_meta(folder) or publish(folder, lambda partial: _build(self, partial))
        held = np.load(folder / "held.npy")
        train, validation = (Captioned(folder, np.flatnonzero(held == side), self, len(held), not side)
                             for side in (False, True))  # fmt: skip
        raw = self.tokenizer == "bytes"
        tokenizer = bytes_tokenizer() if raw else Tokenizer.read(folder, meta["end_token"])
        told = Faults.kept(self.skip, meta["skipped"]).told()
        return OpenedPictures(train, validation, tokenizer, GIVES, self._sizes(tokenizer.vocab),
                              meta | {"key": folder.name}, told, tuple(meta["classes"]))  # fmt: skip

    def anchored(self) -> ImageTextData:
        """The same settings with absolute paths, which hold from any working directory."""
        places = {"source": located(self.source)}
        if self.tokenizer not in TRAINED:
            places["tokenizer"] = located(self.tokenizer)
        if self.cache:
            places["cache"] = str(Path(self.cache).expanduser().absolute())
        return replace(self, **places)

    def found(self) -> bool:
        """Whether there is data at the source."""
        try:
            return bool(find(self.source, kinds=KINDS))
        except UserError:
            return False

    def used(self, folder: Path, tokens: dict[str, int]) -> OpenedPictures:
        """What using a trained model needs of its data, without the data.

        Args:
            folder: has the tokenizer.json that the captions were tokenized with.
            tokens: of each split.
        """
        tokenizer = Tokenizer.read(folder, end_token(self.tokenizer, self.end))
        return self._blank(tokenizer, tokenizer.vocab, 2, "")

    def outline(self) -> OpenedPictures:
        """The pictures if they are built, else their sizes, without reading them."""
        files = find(self.source, kinds=KINDS)
        if read_meta(self._folder()):
            return self.open()
        size = sum(path.stat().st_size for path in [*files, *listed(files, self.fields)])
        count = max(2, size // PICTURE_BYTES)
        note = f"The data is not built yet: {count:,} pictures are an estimate from {size:,} bytes of files."
        trained = self.tokenizer in TRAINED
        tokenizer = bytes_tokenizer() if trained else tokenizer_of(self.tokenizer, self.vocab, self.end, ())
        return self._blank(tokenizer, self.vocab if self.tokenizer == "bpe" else tokenizer.vocab, count, note)

    def _sizes(self, vocab: int) -> dict[str, int]:
        return {"vocab": vocab, "context": self.context, "image": self.image, "channels": 3}

    def _blank(self, tokenizer: Tokenizer, vocab: int, count: int, note: str) -> OpenedPictures:
        shapes = {"images": (3, self.image, self.image), "captions": (self.context,), "caption_length": ()}
        held = max(1, int(count * self.holdout))
        splits = [Blanks(n, self.context, shapes) for n in (max(1, count - held), held)]
        return OpenedPictures(splits[0], splits[1], tokenizer, GIVES, self._sizes(vocab), note=note)

    def _folder(self) -> Path:
        """Where the built pictures are: named by all that they are a function of."""
        root = cache_folder(self.cache, "image_text")
        files = find(self.source, kinds=KINDS)
        contents = [content_hash(files, root), content_hash(listed(files, self.fields), root)]
        kept = {name: getattr(self, name) for name in ("fields", "kept", "context", "holdout", "skip")}
        tokenizer = tokenizer_key(self.tokenizer, self.vocab, self.end, root)
        return root / distinct(kept | {"format": FORMAT, "tokenizer": tokenizer, "contents": contents})


def _kept(settings: ImageTextData, partial: Path, faults: Faults) -> Iterator[tuple[Picture, int]]:
    """Every picture that can be decoded, written to the disk, and the fingerprint of what is seen."""
    with (partial / "images.bin").open("wb") as out:
        for picture in pictures(find(settings.source, kinds=KINDS), settings.fields, faults):
            try:
                image = decoded(picture.content, settings.kept, 3)
            except UnreadableError as error:
                faults.add(picture.place, f"its image is broken: {error}")
                continue
            out.write(image.data)
            digest = hashlib.blake2b(image.data, digest_size=8).digest()
            yield replace(picture, content=b""), int.from_bytes(digest, "little")


def _build(settings: ImageTextData, partial: Path) -> dict[str, Any]:
    """Fill a folder with the pictures, the captions and the tokenizer; returns what to say about them."""
    faults = Faults(settings.skip)
    found = list(_kept(settings, partial, faults))
    faults.check()
    edge = edge_of([mark for _, mark in found], settings.holdout)
    held = np.array([mark < edge for _, mark in found])
    training = (text for (picture, _), out in zip(found, held, strict=True) if not out for text in picture.texts)
    tokenizer = tokenizer_of(settings.tokenizer, settings.vocab, settings.end, training)
    ids, cut = list[np.ndarray](), 0
    for texts in take((text for picture, _ in found for text in picture.texts), AT_ONCE):
        more, longer = clipped(tokenizer, texts, settings.context)
        ids += more
        cut += longer
    classes = sorted({picture.label for picture, _ in found} - {""})
    numbers = {name: i for i, name in enumerate(classes)}
    tables = {
        "held": held,
        "tokens": np.concatenate(ids),
        "captions": np.cumsum([0, *map(len, ids)]),
        "owned": np.cumsum([0, *(len(picture.texts) for picture, _ in found)]),
        "classes": np.array([numbers.get(picture.label, -1) for picture, _ in found], dtype=np.int64),
    }
    for name, table in tables.items():
        np.save(partial / f"{name}.npy", table)
    tokenizer.save(partial)
    counts = {"train": int((~held).sum()), "validation": int(held.sum())}
    return {"documents": counts, "tokens": {}, "cut": cut, "classes": classes, "vocab": tokenizer.vocab,
            "end": tokenizer.end, "end_token": tokenizer.inner.id_to_token(tokenizer.end),
            "skipped": faults.meta()}  # fmt: skip
