"""Labelled texts: tables of texts, or of pairs of texts, with a class or a score, tokenized once and cached by content.

What a tokenizer.json puts around texts (`[CLS] text [SEP]`) is put around them here. The rows are in memory once, when
they are built; after that they are mapped from disk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

from scrimp.data.cache import cache_folder, content_hash, publish, read_meta
from scrimp.data.documents import located
from scrimp.data.faults import Faults
from scrimp.data.labelling import SPLITS, build
from scrimp.data.padded import Longest, Texts
from scrimp.data.tables import find
from scrimp.data.tokenizer import Tokenizer
from scrimp.errors import UserError

FORMAT: Final = 2
"""Raised whenever the same settings would give other items, so that old caches are not used."""


@dataclass(frozen=True)
class Labelled:
    """Opened labelled texts."""

    train: Texts | Longest
    validation: Texts | Longest
    tokenizer: Tokenizer
    meta: dict[str, Any]
    """rows and tokens of each split, labels (names, in the order of their numbers), vocab, skipped, key."""
    note: str = ""

    @property
    def gives(self) -> tuple[str, ...]:
        """What items hold. Texts are sequences of their own, not windows of a stream."""
        texts = self.train.like if isinstance(self.train, Longest) else self.train
        return ("texts", *texts.streams[1:], *filter(None, [texts.target]))

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their numbers."""
        return tuple(self.meta["labels"])

    @property
    def sizes(self) -> dict[str, int]:
        """What a model must have."""
        found = {"vocab": self.tokenizer.vocab, "context": self.train.context, "segments": self.meta["segments"]}
        if "scores" in self.gives:
            return found | {"classes": 1}
        return found | ({"classes": len(self.labels)} if "labels" in self.gives else {})


@dataclass(frozen=True, kw_only=True)
class LabelledData:
    """Texts with a class or a score each, from tables."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "use_attribute_docstrings": True}
    source: str = ""
    """A .csv, .tsv, .jsonl or .parquet file, a glob of them, or a folder that has some."""
    validation: str = ""
    """Tables of the held-out rows; empty holds out a share of the source by content."""
    columns: tuple[str, ...] = ()
    """Names of the columns of .csv and .tsv files whose first line does not say them."""
    text: str = "text"
    """Column of the text."""
    text_pair: str = ""
    """Column of a second text; empty for none."""
    pairs: Literal["joint", "apart"] = "joint"
    """Two texts are one sequence of two segments, or two sequences, as retrieval needs them."""
    label: str = ""
    """Column of the class."""
    score: str = ""
    """Column of a number to predict, instead of a class."""
    labels: tuple[str, ...] = ()
    """Names of the classes in the order of their numbers; empty finds and sorts them."""
    tokenizer: str = "bpe"
    """bpe, trained on the training texts; or the path of a tokenizer.json or of a folder that has one."""
    vocab: int = 8192
    """Size of the trained BPE."""
    mask: bool = False
    """Give the trained BPE a token which masked language models hide others with."""
    context: int = 128
    """Most tokens of an item, with those around texts; what is longer is cut."""
    stretch: int = 1
    """Training batches whose texts are sorted by length among each other, so that they are less filled up; 1 for none.
    Each epoch has the same texts as without."""
    duplicates: Literal["keep", "exact", "near"] = "keep"
    """exact leaves out rows whose texts were there before, near also those that are alike in most runs of five words;
    held-out rows count as before those that are trained on."""
    holdout: float = 0.1
    """Share of the rows that is held out, by content, so that copies stay together; at least one."""
    skip: float = 0.01
    """Largest share of faulty rows, which are left out; with more of them, nothing is trained."""
    cache: str = ""
    """Folder of built data; default $SCRIMP_CACHE or ~/.cache/scrimp."""

    def __post_init__(self) -> None:
        for name, low, high in (("holdout", 0.0, 1.0), ("skip", -1e-9, 1.0)):
            if not low < getattr(self, name) < high:
                raise UserError(f"{name} must be between 0 and 1, not {getattr(self, name)}.")
        for name in ("context", "stretch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.label and self.score:
            raise UserError("`label` and `score` are both given.", "", "Keep the one to predict.")
        if self.pairs == "apart" and not self.text_pair:
            raise UserError("`pairs` are apart, but there is only one text.", "", "Name the other in `text_pair`.")

    @property
    def needed(self) -> tuple[str, ...]:
        """The columns that are used."""
        return tuple(name for name in (self.text, self.text_pair, self.label, self.score) if name)

    def open(self) -> Labelled:
        """The texts, tokenized if they are not in the cache.

        Raises:
            UserError: if there are none, a column is missing, or too many rows are faulty.
        """
        root = cache_folder(self.cache, "labelled")
        files = self._files()
        key = _key(self, files, root)
        folder = root / key
        meta = read_meta(folder) or publish(folder, lambda partial: build(self, files, partial))
        faults = Faults.kept(self.skip, meta["skipped"])
        faults.check()
        tokenizer = Tokenizer.read(folder, meta["end_token"])
        train, validation = (
            Texts(folder=folder, split=split, count=meta["rows"][split], context=self.context, pad=meta["pad"],
                  **_kind(self)) for split in SPLITS
        )  # fmt: skip
        note = faults.told()
        return Labelled(train, validation, tokenizer, {**meta, "key": key}, note)

    def outline(self) -> Labelled:
        """What a plan needs: every item as long as the longest, so that no batch is larger than planned."""
        data = self.open()
        longest = data.meta["longest"]
        train, validation = (Longest(split, longest[name]) for name, split in
                             zip(SPLITS, (data.train, data.validation), strict=True)
                             if isinstance(split, Texts))  # fmt: skip
        note = f"Batches are planned with texts of {longest['train']} tokens, the longest; most are shorter and faster."
        return replace(data, train=train, validation=validation, note=note)

    def used(self, folder: Path, tokens: Mapping[str, int], labels: tuple[str, ...] = ()) -> Labelled:
        """What using a trained model needs of its data, without the data.

        Args:
            folder: has the tokenizer.json that the texts were tokenized with.
            labels: names of the classes.
        """
        stand = Texts(folder=folder, split="", count=1, context=self.context, pad=0, **_kind(self))
        tokenizer = Tokenizer.read(folder)
        meta = {"labels": list(labels), "tokens": dict(tokens), "vocab": tokenizer.vocab, "segments": 0}
        return Labelled(Longest(stand, self.context), Longest(stand, self.context), tokenizer, meta)

    def anchored(self) -> LabelledData:
        """The same settings with absolute paths, which hold from any working directory."""
        cache = str(Path(self.cache).expanduser().absolute()) if self.cache else ""
        tokenizer = self.tokenizer if self.tokenizer == "bpe" else located(self.tokenizer)
        validation = located(self.validation) if self.validation else ""
        return replace(self, source=located(self.source), validation=validation, tokenizer=tokenizer, cache=cache)

    def found(self) -> bool:
        """Whether there are tables at the source."""
        try:
            return bool(self._files())
        except UserError:
            return False

    def _files(self) -> dict[str, list[Path]]:
        held = find(self.validation, "data.validation") if self.validation else []
        return {"train": find(self.source, "data.source"), "validation": held}


def _kind(settings: LabelledData) -> dict[str, Any]:
    apart = settings.pairs == "apart"
    return {
        "streams": ("tokens", "pair_tokens") if apart else ("tokens",),
        "segments": bool(settings.text_pair) and not apart,
        "target": "labels" if settings.label else "scores" if settings.score else "",
        "stretch": settings.stretch,
    }


def _key(settings: LabelledData, files: Mapping[str, list[Path]], root: Path) -> str:
    """The name of the built data: a hash of all that its items are a function of."""
    names = ("columns", "text", "text_pair", "pairs", "label", "score", "labels", "tokenizer", "context")
    named: dict[str, Any] = {name: getattr(settings, name) for name in names}
    if settings.tokenizer == "bpe":
        named |= {"vocab": settings.vocab, "mask": settings.mask}
    else:
        given = Path(settings.tokenizer).expanduser()
        file = given / "tokenizer.json" if given.is_dir() else given
        named["tokenizer"] = content_hash([file], root) if file.is_file() else [str(file)]
    if settings.duplicates != "keep":
        named["duplicates"] = settings.duplicates
    if not settings.validation:
        named["holdout"] = settings.holdout
    contents = {split: [[path.suffix.lower(), value] for path, value in
                        zip(paths, content_hash(paths, root), strict=True)]
                for split, paths in files.items()}  # fmt: skip
    text = json.dumps([FORMAT, named, contents], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
