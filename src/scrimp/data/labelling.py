"""How labelled texts are built: rows are gathered, parted, tokenized and written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from scrimp.data.documents import fingerprint
from scrimp.data.duplicates import first_of_its_kind
from scrimp.data.faults import Faults
from scrimp.data.items import edge_of
from scrimp.data.padded import save
from scrimp.data.tables import Row, rows, text_of, value_of
from scrimp.data.tokenizer import Tokenizer, framed, train_bpe, with_mask
from scrimp.errors import UserError

if TYPE_CHECKING:
    from scrimp.data.labelled import LabelledData

SPLITS: Final = ("train", "validation")
AT_ONCE: Final = 4096
"""Texts that are tokenized at once."""


@dataclass
class Table:
    """Rows that are whole, in the order of the files."""

    texts: list[str] = field(default_factory=list[str])
    pairs: list[str] = field(default_factory=list[str])
    targets: list[str] = field(default_factory=list[str])

    def text(self, i: int) -> str:
        """Both texts of a row."""
        return "\n".join([self.texts[i], *(self.pairs[i : i + 1] if self.pairs else ())])

    def chosen(self, keep: Callable[[int], bool]) -> Table:
        """The rows at some places."""
        ids = [i for i in range(len(self.texts)) if keep(i)]
        return Table(*([side[i] for i in ids] if side else [] for side in (self.texts, self.pairs, self.targets)))


def build(settings: LabelledData, files: Mapping[str, list[Path]], partial: Path) -> dict[str, Any]:
    """Fill a folder with tokens, targets and the tokenizer; returns what to say about them.

    Args:
        files: of each split; those of `validation` may be none.
    Raises:
        UserError: if there are no rows, too many are faulty, or held-out ones are of unknown classes.
    """
    faults = Faults(settings.skip)
    table, held = (gathered(settings, files[split], faults) for split in SPLITS)
    faults.check()
    new = first_of_its_kind(settings.duplicates)
    held, table = (part.chosen(lambda i, part=part: new(part.text(i))) for part in (held, table))
    names = list(settings.labels) or ordered(set(table.targets)) if settings.label else []
    strange = sorted({*table.targets, *held.targets} - set(names)) if settings.label else []
    if strange:
        what = f"rows are of classes that {'`labels`' if settings.labels else 'training'} does not have"
        raise UserError(f"{what}: {', '.join(strange[:6])}.", "data", f"Known: {', '.join(names[:20])}.")
    if not files["validation"]:
        table, held = parted(table, settings.holdout)
    if not table.texts or not held.texts:
        empty = "validation" if table.texts else "source"
        raise UserError("there is no whole row.", f"data.{empty}", "Give at least one, and one more to hold out.")
    tokenizer = _tokenizer(settings, table)
    meta: dict[str, Any] = {
        "rows": {}, "tokens": {}, "longest": {}, "labels": names, "vocab": tokenizer.vocab, "segments": 0,
        "end_token": tokenizer.inner.id_to_token(tokenizer.end),
        "pad": tokenizer.end if tokenizer.pad is None else tokenizer.pad, "skipped": faults.meta(),
    }  # fmt: skip
    for split, part in zip(SPLITS, (table, held), strict=True):
        _write(settings, part, names, tokenizer, partial, split, meta)
    tokenizer.inner.no_truncation()
    tokenizer.save(partial)
    return meta


def gathered(settings: LabelledData, files: Sequence[Path], faults: Faults) -> Table:
    """The whole rows of files; what is wrong with the others is noted."""
    table = Table()
    for row in (row for path in files for row in rows(path, settings.needed, settings.columns)):
        faults.total += 1
        try:
            _add(settings, row, table)
        except ValueError as error:
            faults.add(row.where, str(error))
    return table


def _add(settings: LabelledData, row: Row, table: Table) -> None:
    """Take a row.

    Raises:
        ValueError: saying what is wrong with it.
    """
    if row.fault:
        raise ValueError(row.fault)
    texts = [text_of(row.values, name).strip() for name in (settings.text, settings.text_pair) if name]
    targets = [_target(row, name, name == settings.score) for name in (settings.label, settings.score) if name]
    table.texts.append(texts[0])
    table.pairs += texts[1:]
    table.targets += targets


def _target(row: Row, name: str, score: bool) -> str:
    """The name of a class, or the text of a number."""
    value = value_of(row.values, name)
    said = "" if value is None else str(value).strip()
    if not said:
        raise ValueError(f"its field `{name}` is empty")
    if not isinstance(value, str | int | float):
        raise ValueError(f"its field `{name}` is no name but {said[:40]}")
    if score and not _is_number(said):
        raise ValueError(f"its field `{name}` is no number but {said[:40]}")
    try:
        said.encode()
    except UnicodeEncodeError:
        raise ValueError(f"its field `{name}` is not Unicode") from None
    return said


def _is_number(text: str) -> bool:
    """Whether it is one that float32, as scores are kept, can hold."""
    try:
        return abs(float(text)) <= float(np.finfo(np.float32).max)
    except ValueError:
        return False


def ordered(names: set[str]) -> list[str]:
    """Names of classes, sorted: as numbers if all are whole numbers."""
    numbers = all(name.removeprefix("-").isdecimal() for name in names)
    return sorted(names, key=lambda name: (int(name), name)) if numbers else sorted(names)


def parted(table: Table, holdout: float) -> tuple[Table, Table]:
    """Training and held-out rows, by content; at least one is held out, and not all.

    Raises:
        UserError: if all texts are alike.
    """
    marks = [fingerprint("\n".join(texts)) for texts in
             (zip(table.texts, table.pairs, strict=True) if table.pairs else ((t,) for t in table.texts))]  # fmt: skip
    edge = edge_of(marks, holdout)
    return table.chosen(lambda i: marks[i] >= edge), table.chosen(lambda i: marks[i] < edge)


def _tokenizer(settings: LabelledData, table: Table) -> Tokenizer:
    if settings.tokenizer != "bpe":
        try:
            return Tokenizer.read(Path(settings.tokenizer).expanduser())
        except UserError as error:
            raise UserError(error.what, f"data.tokenizer ({error.where})", error.fix) from None
    trained = train_bpe(iter([*table.texts, *table.pairs]), settings.vocab - settings.mask)
    return framed(with_mask(trained) if settings.mask else trained)


def _write(
    settings: LabelledData,
    table: Table,
    names: Sequence[str],
    tokenizer: Tokenizer,
    partial: Path,
    split: str,
    meta: dict[str, Any],
) -> None:
    """One split: its streams of tokens, segments and targets. Adds to `meta` what it says of the split."""
    dtype = "uint16" if tokenizer.vocab <= 2**16 else "uint32"
    joint = settings.pairs == "joint" and bool(table.pairs)
    around = tokenizer.inner.num_special_tokens_to_add(joint)
    if settings.context <= around:
        what = f"the tokenizer puts {around} tokens around texts, which leaves none of {settings.context} for them."
        raise UserError(what, "data.context", "Raise it.")
    tokenizer.inner.enable_truncation(settings.context)
    streams = {"tokens": list(zip(table.texts, table.pairs, strict=True)) if joint else table.texts}
    if table.pairs and not joint:
        streams["pair_tokens"] = table.pairs
    meta["rows"][split], meta["tokens"][split], meta["longest"][split] = len(table.texts), 0, 1
    for name, texts in streams.items():
        ids, kinds = _encoded(tokenizer, texts)
        save(partial, split, name, ids, dtype)
        if joint:
            save(partial, split, "segments", kinds, "uint8")
            meta["segments"] = max(meta["segments"], 1 + max(int(kind.max()) for kind in kinds))
        meta["tokens"][split] += sum(map(len, ids))
        meta["longest"][split] = max(meta["longest"][split], *map(len, ids))
    if settings.label:
        place = {name: i for i, name in enumerate(names)}
        labels = np.array([place[name] for name in table.targets], dtype=np.int64)
        np.save(partial / f"{split}.labels.npy", labels, allow_pickle=False)
    elif settings.score:
        scores = np.array([float(score) for score in table.targets], dtype=np.float32)
        np.save(partial / f"{split}.scores.npy", scores, allow_pickle=False)


def _encoded(tokenizer: Tokenizer, texts: Sequence[Any]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Ids of each text or pair, with the tokens around it, and the segment of each id."""
    ids, kinds = list[np.ndarray](), list[np.ndarray]()
    for first in range(0, len(texts), AT_ONCE):
        for found in tokenizer.inner.encode_batch(texts[first : first + AT_ONCE], add_special_tokens=True):
            # A text of letters that the tokenizer drops, with nothing around it, would be a row without tokens.
            ids.append(np.array(found.ids or [tokenizer.end], dtype=np.int64))
            kinds.append(np.array(found.type_ids or [0], dtype=np.int64))
    return ids, kinds
