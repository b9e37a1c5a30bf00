"""Pairs of texts: what is read, what is held out, what is left out, and what a cache is a function of."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scrimp.data.items import Opened
from scrimp.data.padding import padded
from scrimp.data.parallel import ParallelData
from scrimp.errors import UserError

END = 256


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SCRIMP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "parallel"


def rows(count: int = 40) -> list[dict[str, str]]:
    return [{"source": f"the number {i}", "target": f"die Zahl {i}"} for i in range(count)]


def jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def settings(source: Path, **changes: Any) -> ParallelData:
    return replace(ParallelData(source=str(source), tokenizer="bytes", context=32, holdout=0.2), **changes)


def pairs(data: Opened, split: Any) -> list[tuple[str, str]]:
    found = split.read(np.arange(len(split)))
    sides = []
    for side in ("source", "target"):
        ids = [row[:n].tolist() for row, n in zip(found[side], found[f"{side}_length"], strict=True)]
        assert all(row[-1] == END for row in ids)
        sides.append([data.tokenizer.decode(row[:-1]) for row in ids])
    return list(zip(*sides, strict=True))


def test_every_pair_is_on_one_side(tmp_path: Path) -> None:
    data = settings(jsonl(tmp_path / "p.jsonl", rows())).open()
    train, held = pairs(data, data.train), pairs(data, data.validation)
    assert sorted(train + held) == sorted((r["source"], r["target"]) for r in rows())
    assert 2 <= len(held) <= 16 and data.meta["documents"] == {"train": len(train), "validation": len(held)}
    assert data.gives == ("source", "target") and data.sizes == {"vocab": 257, "context": 32}


def test_translations_of_one_text_stay_together(tmp_path: Path) -> None:
    twice = rows() + [{"source": r["source"] + " ", "target": "anders"} for r in rows()]
    data = settings(jsonl(tmp_path / "p.jsonl", twice)).open()
    sides = [{source.strip() for source, _ in pairs(data, s)} for s in (data.train, data.validation)]
    assert not sides[0] & sides[1] and len(sides[0]) + len(sides[1]) == 40


@pytest.mark.parametrize("kind", ["tsv", "numbered", "nested", "parquet"])
def test_formats_hold_the_same(kind: str, tmp_path: Path) -> None:
    path, changes = tmp_path / f"p.{'tsv' if kind in ('tsv', 'numbered') else 'jsonl'}", {}
    lines = [f"{r['source']}\t{r['target']}\tnote" for r in rows()]
    if kind == "tsv":
        path.write_text("\n".join(["source\ttarget\tmore", *lines]) + "\n")
    elif kind == "numbered":
        path.write_text("\n".join(lines) + "\n")
        changes = {"columns": ("source", "target", "note")}
    elif kind == "nested":
        jsonl(path, [{"translation": {"en": r["source"], "de": r["target"]}} for r in rows()])
        changes = {"read": "translation.en", "write": "translation.de"}
    else:
        arrow = import_module("pyarrow")
        from pyarrow import parquet

        path = tmp_path / "p.parquet"
        parquet.write_table(arrow.Table.from_pylist(rows()), path)
    data = settings(path, **changes).open()
    plain = settings(jsonl(tmp_path / "plain.jsonl", rows())).open()
    assert pairs(data, data.train) == pairs(plain, plain.train)
    assert pairs(data, data.validation) == pairs(plain, plain.validation)


def test_a_file_of_its_own_is_held_out(tmp_path: Path) -> None:
    held = [{"source": f"held {i}", "target": "x"} for i in range(3)]
    source, other = jsonl(tmp_path / "p.jsonl", rows()), jsonl(tmp_path / "v.jsonl", held)
    data = settings(source, validation=str(other)).open()
    assert len(data.train) == 40 and pairs(data, data.validation) == [(r["source"], "x") for r in held]


def test_long_sides_are_cut_and_keep_their_end(tmp_path: Path) -> None:
    data = settings(jsonl(tmp_path / "p.jsonl", rows()), context=6).open()
    source, target = pairs(data, data.train)[0]
    assert source == "the n" and target == "die Z" and data.meta["cut"] == 80
    assert data.train.read(np.arange(2))["source"].shape == (2, 6)


def test_faulty_pairs_are_counted_named_and_left_out(tmp_path: Path) -> None:
    bad = ["{", "[1]", {"source": "a"}, {"source": "a", "target": 3}, {"source": " ", "target": "b"},
           '{"source": "\\ud800", "target": "b"}']  # fmt: skip
    path = jsonl(tmp_path / "p.jsonl", [*rows(), *bad])
    data = settings(path, skip=0.2).open()
    assert len(data.train) + len(data.validation) == 40
    assert data.meta["skipped"]["count"] == 6 and len(data.meta["skipped"]["first"]) == 5
    said = data.note
    assert "6 of 46 items were left out" in said and "and 1 more" in said
    for words in ("line 41: is not JSON", "line 42: is not a record but a list", "line 43: has no field `target`",
                  "line 44: its field `target` is not text but 3", "line 45: its field `source` is empty"):  # fmt: skip
        assert words in said
    with pytest.raises(UserError, match="6 of 46 items are faulty, more than 0.01 of them"):
        settings(path).open()


def test_bytes_that_are_no_text_are_faults_in_a_table(tmp_path: Path) -> None:
    path = tmp_path / "p.tsv"
    lines = [f"{r['source']}\t{r['target']}".encode() for r in rows()]
    path.write_bytes(b"\n".join([b"source\ttarget", *lines, b"\xff\xfe\tx", b"alone"]) + b"\n")
    data = settings(path, skip=0.1).open()
    assert data.meta["skipped"]["count"] == 2
    assert (
        "is not Unicode" in data.meta["skipped"]["first"][0]
        and "has 1 fields instead of 2" in data.meta["skipped"]["first"][1]
    )


def test_bytes_that_are_no_text_are_faults_in_parquet(tmp_path: Path) -> None:
    arrow = import_module("pyarrow")
    from pyarrow import parquet

    sources = arrow.array([r["source"].encode() for r in rows()] + [b"\xff"]).view(arrow.string())
    targets = [r["target"] for r in rows()] + ["x"]
    parquet.write_table(arrow.table({"source": sources, "target": targets, "more": targets}), tmp_path / "p.parquet")
    data = settings(tmp_path / "p.parquet", skip=0.1).open()
    assert len(data.train) + len(data.validation) == 40
    assert data.meta["skipped"]["first"] == [f"{tmp_path}/p.parquet, row 41: is not UTF-8"]


def test_a_wrong_field_is_an_error_with_the_nearest(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", rows())
    with pytest.raises(UserError, match=r"no item can be used.*has no field `sorce`. Did you mean `?source"):
        settings(path, read="sorce").open()
    with pytest.raises(UserError, match="has no table"):
        settings(tmp_path / "nothing").open()


def test_a_cache_is_a_function_of_content_and_settings(tmp_path: Path, cache: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", rows())
    first = settings(path).open()
    again = settings(jsonl(tmp_path / "copy.jsonl", rows())).open()
    assert first.meta["key"] == again.meta["key"]
    changed = [settings(path, **c).open().meta["key"] for c in ({"context": 30}, {"holdout": 0.3}, {"write": "source"})]
    jsonl(path, rows(41))
    assert len({first.meta["key"], *changed, settings(path).open().meta["key"]}) == 5


def test_a_bpe_is_trained_on_both_sides_of_the_training_pairs(tmp_path: Path) -> None:
    data = settings(jsonl(tmp_path / "p.jsonl", rows(200)), tokenizer="bpe", vocab=300).open()
    assert data.tokenizer.vocab == 300
    assert len(data.tokenizer.encode("the number")) < 6 and len(data.tokenizer.encode("die Zahl")) < 5


def test_an_outline_has_the_sizes_without_the_pairs(tmp_path: Path, cache: Path) -> None:
    made = settings(jsonl(tmp_path / "p.jsonl", rows()), tokenizer="bpe", vocab=300)
    outline = made.outline()
    assert not list(cache.glob("*/meta.json")) and "estimate" in outline.note
    assert outline.sizes == {"vocab": 300, "context": 32}
    found = outline.train.read(np.arange(2))
    assert found["source"].shape == (2, 32) and found["target_length"].tolist() == [32, 32]
    data = made.open()
    assert not made.outline().note
    data.tokenizer.save(tmp_path)
    assert made.used(tmp_path, {}).sizes == data.sizes


def test_rows_are_padded_to_a_multiple_of_eight() -> None:
    found, lengths = padded([np.array([1, 2]), np.arange(9)], 40, fill=-1)
    assert found.shape == (2, 16) and lengths.tolist() == [2, 9]
    assert found[0].tolist() == [1, 2] + [-1] * 14
    assert padded([np.arange(9)], 10)[0].shape == (1, 10)


@pytest.mark.parametrize("changes", [{"holdout": 1.0}, {"skip": 1.0}, {"context": 1}, {"vocab": 9}], ids=str)
def test_bad_settings_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(changes))):
        ParallelData(source="x", **changes)
