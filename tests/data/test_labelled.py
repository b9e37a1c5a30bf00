"""Labelled texts: tables of every kind, faulty rows, splits, padding, what a tokenizer puts around texts."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from scrimp.data.labelled import LabelledData
from scrimp.data.labelling import ordered
from scrimp.data.order import items_at, places_by_length, sample_ids
from scrimp.data.tokenizer import MASK
from scrimp.errors import RecipeError, UserError
from scrimp.recipe import Recipe
from tiny import run_of

WORDS = ["good", "bad", "film", "very", "not", "so", "plot"]
ROWS = [(" ".join(WORDS[(i * k) % 7] for k in range(1, 2 + i % 9)) + f" {i}", ("neg", "pos")[i % 2]) for i in range(60)]


def written(path: Path, rows: list[tuple[str, ...]] = ROWS, names: tuple[str, ...] = ("text", "label")) -> Path:
    """A table of the kind that the file's ending says."""
    records = [dict(zip(names, row, strict=True)) for row in rows]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif path.suffix == ".parquet":
        pyarrow = import_module("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        mark = {".csv": ",", ".tsv": "\t"}[path.suffix]
        path.write_text("\n".join(mark.join(row) for row in [names, *rows]) + "\n")
    return path


def bert(folder: Path) -> Path:
    """A tokenizer.json of whole words with [CLS], [SEP], [PAD] and [MASK], as BERT's has."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = {word: i for i, word in enumerate([*special, *WORDS, *map(str, range(60))])}
    inner = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    inner.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    inner.add_special_tokens(special)
    inner.enable_padding(length=64)
    inner.enable_truncation(5)
    inner.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def settings(folder: Path, source: Path, **more: Any) -> LabelledData:
    return LabelledData(**{"source": str(source), "label": "label", "tokenizer": str(bert(folder)), "context": 32,
                           "holdout": 0.2, **more})  # fmt: skip


def everything(split: Any) -> list[tuple[list[int], int]]:
    items = split.read(np.arange(len(split)))
    rows = zip(items["tokens"], items["attended"], items["labels"], strict=True)
    return [(t[a].tolist(), int(y)) for t, a, y in rows]


@pytest.mark.parametrize("kind", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_kind_of_table_gives_the_same_items(kind: str, tmp_path: Path) -> None:
    data = settings(tmp_path, written(tmp_path / f"rows{kind}")).open()
    found = everything(data.train) + everything(data.validation)
    words = {i: w for w, i in data.tokenizer.inner.get_vocab().items()}
    said = Counter((" ".join(words[i] for i in ids[1:-1]), data.labels[y]) for ids, y in found)
    assert said == Counter(ROWS)
    assert all(ids[0] == 2 and ids[-1] == 3 for ids, _ in found)
    assert data.labels == ("neg", "pos")
    assert data.gives == ("texts", "labels")
    assert data.sizes == {"vocab": 72, "context": 32, "segments": 0, "classes": 2}
    assert 0 < len(data.validation) < 30


def test_batches_are_as_wide_as_their_longest_item(tmp_path: Path) -> None:
    data = settings(tmp_path, written(tmp_path / "rows.csv"), context=13).open()
    lengths = [len(ids) for ids, _ in everything(data.train)]
    short, long = [i for i, n in enumerate(lengths) if n <= 8][:3], int(np.argmax(lengths))
    assert lengths[long] == 12
    few = data.train.read(np.array(short))
    assert few["tokens"].shape == few["attended"].shape == (3, 8)
    assert few["attended"].sum(1).tolist() == [lengths[i] for i in short]
    assert (few["tokens"][~few["attended"]] == 0).all()
    assert data.train.read(np.array([short[0], long]))["tokens"].shape == (2, 13)  # never wider than the context
    cut = settings(tmp_path, tmp_path / "rows.csv", context=6).open()
    assert max(len(ids) for ids, _ in everything(cut.train)) == 6
    assert {ids[-1] for ids, _ in everything(cut.train)} == {3}


def test_a_csv_quotes_and_a_tsv_does_not(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,label\n"so, ""good""\nfilm",1\nbad film,0\n')
    (tmp_path / "b.tsv").write_text('"so good\t1\nbad "film"\t0\n')
    csv = settings(tmp_path, tmp_path / "a.csv", holdout=0.5).open()
    tsv = settings(tmp_path, tmp_path / "b.tsv", holdout=0.5, columns=("text", "label")).open()
    assert csv.meta["rows"] == tsv.meta["rows"] == {"train": 1, "validation": 1}
    assert csv.meta["skipped"]["count"] == tsv.meta["skipped"]["count"] == 0
    # [CLS] so , " good " film [SEP], and [CLS] " so good [SEP]
    assert sorted(len(ids) for s in (csv.train, csv.validation) for ids, _ in everything(s)) == [4, 8]
    assert sorted(len(ids) for s in (tsv.train, tsv.validation) for ids, _ in everything(s)) == [5, 6]


def test_faulty_rows_are_counted_named_and_left_out(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text, "label": label}) for text, label in ROWS]
    lines[3], lines[5], lines[8], lines[9] = "{half", '{"text": "so"}', '{"text": " ", "label": 1}', "[1]"
    (tmp_path / "r.jsonl").write_text("\n".join(lines))
    data = settings(tmp_path, tmp_path / "r.jsonl", skip=0.1).open()
    first = data.meta["skipped"]["first"]
    assert data.meta["skipped"]["count"] == 4
    assert [fault.rpartition(", line ")[2] for fault in first] == [
        "4: is not JSON", "6: has no field `label`. Known: text", "9: its field `text` is empty",
        "10: is not a record but a list",
    ]  # fmt: skip
    assert "4 of 60 items were left out: " in data.note
    for again in range(2):  # the second time from the cache
        with pytest.raises(UserError) as error:
            settings(tmp_path, tmp_path / "r.jsonl", skip=0.01 * again).open()
        assert "4 of 60 items are faulty" in str(error.value)
        assert "line 4: is not JSON" in str(error.value)
    (tmp_path / "r.csv").write_text("text,label\ngood,1,extra\nbad,0\nso,1\n")
    assert settings(tmp_path, tmp_path / "r.csv", skip=0.5).open().meta["skipped"]["count"] == 1


def test_scores_are_numbers(tmp_path: Path) -> None:
    rows = [(f"film {i}", str(i / 7)) for i in range(30)]
    table = written(tmp_path / "s.csv", [*rows, ("bad", "nan"), ("so", "high")], ("text", "mark"))
    data = settings(tmp_path, table, label="", score="mark", skip=0.2).open()
    assert data.meta["skipped"]["first"][1].endswith("its field `mark` is no number but high")
    assert data.gives == ("texts", "scores")
    assert data.sizes["classes"] == 1
    scores = np.concatenate([s.read(np.arange(len(s)))["scores"] for s in (data.train, data.validation)])
    assert scores.dtype == np.float32
    np.testing.assert_allclose(np.sort(scores), np.arange(30, dtype=np.float32) / 7, rtol=1e-6)


def test_pairs_are_joint_or_apart(tmp_path: Path) -> None:
    rows = [(f"good {i}", f"not so bad {i}", "1") for i in range(20)]
    table = written(tmp_path / "p.tsv", rows, ("a", "b", "same"))
    named = {"text": "a", "text_pair": "b", "label": "same"}
    joint = settings(tmp_path, table, **named).open()
    items = joint.train.read(np.arange(2))
    assert items["segments"][0].tolist() == [0] * 4 + [1] * 5 + [0] * 7  # [CLS] good 3 [SEP] not so bad 3 [SEP]
    assert items["tokens"][0, [0, 3, 8]].tolist() == [2, 3, 3]
    assert (joint.sizes["segments"], joint.gives) == (2, ("texts", "labels"))
    apart = settings(tmp_path, table, **named, pairs="apart").open()
    items = apart.train.read(np.arange(2))
    assert items["tokens"].shape == items["pair_tokens"].shape == (2, 8)
    assert (items["attended"].sum(), items["pair_attended"].sum()) == (8, 12)
    assert "segments" not in items
    assert apart.gives == ("texts", "pair_tokens", "labels")
    assert items["tokens"][0, 2] == items["pair_tokens"][0, 4]  # the number that both texts of a pair end with


def test_copies_stay_on_one_side_and_a_file_may_be_held_out(tmp_path: Path) -> None:
    table = written(tmp_path / "rows.csv", [row for row in ROWS for _ in range(3)])
    data = settings(tmp_path, table).open()
    train, held = ({tuple(ids) for ids, _ in everything(s)} for s in (data.train, data.validation))
    assert not train & held
    assert len(data.validation) == 3 * len(held)
    other = written(tmp_path / "dev.csv", ROWS[:7])
    data = settings(tmp_path, table, validation=str(other)).open()
    assert data.meta["rows"] == {"train": 180, "validation": 7}
    written(other, [("good", "none")])
    with pytest.raises(UserError, match="classes that training does not have: none"):
        settings(tmp_path, table, validation=str(other)).open()


def test_names_of_classes_are_sorted_or_given(tmp_path: Path) -> None:
    assert ordered({"10", "9", "-1"}) == ["-1", "9", "10"]
    assert ordered({"b", "10", "9"}) == ["10", "9", "b"]
    table = written(tmp_path / "rows.csv")
    given = settings(tmp_path, table, labels=("pos", "neg")).open()
    plain = settings(tmp_path, table).open()
    assert given.labels == ("pos", "neg")
    assert [1 - y for _, y in everything(given.train)] == [y for _, y in everything(plain.train)]


def test_a_trained_bpe_frames_texts_and_may_have_a_mask(tmp_path: Path) -> None:
    table = written(tmp_path / "rows.csv")
    plain = settings(tmp_path, table, tokenizer="bpe", vocab=300).open()
    ids = everything(plain.train)[0][0]
    end = plain.tokenizer.end
    assert (ids[0], ids[-1], end, plain.tokenizer.mask) == (end, end, 299, None)
    masked = settings(tmp_path, table, tokenizer="bpe", vocab=300, mask=True).open()
    assert (masked.tokenizer.mask, masked.tokenizer.end, masked.tokenizer.vocab) == (299, 298, 300)
    assert masked.tokenizer.inner.id_to_token(299) == MASK


def test_what_is_built_is_found_again_by_content(tmp_path: Path) -> None:
    table = written(tmp_path / "rows.csv")
    first = settings(tmp_path, table, cache=str(tmp_path / "cache")).open()
    table.rename(tmp_path / "moved.csv")
    again = settings(tmp_path, tmp_path / "moved.csv", cache=str(tmp_path / "cache")).open()
    assert (again.train, again.meta) == (first.train, first.meta)
    written(tmp_path / "moved.csv", ROWS[1:])
    other = settings(tmp_path, tmp_path / "moved.csv", cache=str(tmp_path / "cache")).open()
    assert other.meta["key"] != first.meta["key"]


def test_a_plan_has_room_for_the_longest(tmp_path: Path) -> None:
    made = settings(tmp_path, written(tmp_path / "rows.csv"))
    data, outline = made.open(), made.outline()
    items = outline.train.read(np.arange(4))
    assert items["tokens"].shape == (4, 16)
    assert items["attended"].all()
    assert len(outline.train) == len(data.train)
    assert {name: value.dtype for name, value in items.items()} == {
        name: value.dtype for name, value in data.train.read(np.arange(4)).items()
    }
    assert (outline.gives, outline.sizes) == (data.gives, data.sizes)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"text": "sentense"}, "has no column `sentense`"),
        ({"source": "nowhere.csv"}, "has no table"),
        ({"context": 2}, "puts 2 tokens around texts"),
        ({"tokenizer": "nowhere"}, "data.tokenizer"),
        ({"columns": ("text",)}, "has no column `label`"),
    ],
)
def test_mistakes_are_told(more: dict[str, Any], words: str, tmp_path: Path) -> None:
    table = written(tmp_path / "rows.csv")
    with pytest.raises(UserError, match=words):
        settings(tmp_path, **{"source": table, **more}).open()


def test_settings_that_contradict_each_other_are_refused() -> None:
    base = {"model": {"layers": 1}, "task": "classify", "techniques": "sgd"}
    for more, words in (
        ({"label": "a", "score": "b"}, "both given"),
        ({"pairs": "apart"}, "only one text"),
        ({"holdout": 1.0}, "holdout must be between"),
    ):
        with pytest.raises(RecipeError, match=words):
            Recipe.read({**base, "data": {"name": "labelled", **more}})


def test_batches_of_a_stretch_are_sorted_by_length() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 40)
    places = np.array([places_by_length(40, lengths, 3, step, 4, 5) for step in range(20)])
    # Each stretch of 5 batches has the 20 places that it has without sorting, and two stretches are an epoch.
    for stretch in range(4):
        inside = places[5 * stretch : 5 * stretch + 5]
        assert sorted(inside.flatten()) == list(range(20 * stretch, 20 * stretch + 20))
        spans = sorted((lengths[items_at(40, 3, row)].min(), lengths[items_at(40, 3, row)].max()) for row in inside)
        assert all(a[1] <= b[0] for a, b in pairwise(spans))
    assert sorted(items_at(40, 3, places[:10].flatten())) == list(range(40))
    assert np.array_equal(places_by_length(40, lengths, 3, 7, 4, 5), places[7])
    shortest = [
        int(np.argmin([lengths[items_at(40, 3, row)].sum() for row in places[5 * s : 5 * s + 5]])) for s in range(4)
    ]
    assert len(set(shortest)) > 1  # their order is drawn anew for each stretch
    assert np.array_equal(items_at(40, 3, np.arange(8, 12)), sample_ids(40, 3, 8, 4))


def test_a_sorted_run_trains_on_the_same_texts_with_less_to_fill_up(tmp_path: Path) -> None:
    def batches(stretch: int) -> list[Any]:
        data = settings(tmp_path, written(tmp_path / "rows.csv"), stretch=stretch)
        made = Recipe.read({"model": {"layers": 1, "width": 8, "heads": 1}, "task": "classify", "batch": 4,
                            "duration": "10 step", "techniques": "sgd"})  # fmt: skip
        run = run_of(replace(made, data=data))
        return [run.batch(step) for step in range(10)]

    plain, sorted_ = batches(1), batches(10)
    assert {int(s) for b in plain for s in b["sample"]} == {int(s) for b in sorted_ for s in b["sample"]}
    rows = [Counter(tuple(t[a].tolist()) for b in side for t, a in zip(b["tokens"], b["attended"], strict=True))
            for side in (plain, sorted_)]  # fmt: skip
    assert rows[0] == rows[1]
    assert sum(b["tokens"].numel() for b in sorted_) < sum(b["tokens"].numel() for b in plain)


LINES = [f"row {i},{i % 2}" for i in range(60)]


def test_a_quote_that_is_never_closed_does_not_pass_for_one_row(tmp_path: Path) -> None:
    """Else all rows after it would be lost and one fault be told."""
    (tmp_path / "a.csv").write_text("\n".join(["text,label", *LINES, '"oops,1', *LINES]))
    with pytest.raises(UserError, match="61 of 121 items are faulty"):
        LabelledData(source=str(tmp_path / "a.csv"), label="label", vocab=300).open()
    (tmp_path / "b.csv").write_text("\n".join(['"text,label', *LINES]))
    with pytest.raises(UserError, match="its first line is none of a table"):
        LabelledData(source=str(tmp_path / "b.csv"), label="label", vocab=300).open()


@pytest.mark.parametrize(
    ("kind", "value", "said"), [("label", b"caf\xe9", "not Unicode"), ("score", b"1e39", "no number")]
)
def test_a_target_that_cannot_be_kept_is_a_fault(kind: str, value: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("\n".join(["text,target", *LINES]).encode() + b"\nx," + value)
    with pytest.raises(UserError, match=said):
        LabelledData(source=str(tmp_path / "a.csv"), **{kind: "target"}, vocab=300, skip=0.0).open()


def test_names_that_are_one_number_have_an_order() -> None:
    orders = [ordered(dict.fromkeys(names)) for names in (["1", "01", "10", "2"], ["10", "01", "2", "1"])]
    assert orders == [["01", "1", "2", "10"]] * 2
