"""Text becomes tokens: splits by document, caches by content, errors by name."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scrimp.data import text as text_module
from scrimp.data.documents import documents, find, held_out
from scrimp.data.order import sample_ids
from scrimp.data.text import TextData
from scrimp.data.tokenizer import Tokenizer, bytes_tokenizer
from scrimp.errors import UserError


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02d}.txt").write_text(f"document {i} says {i * i} and ends\n" * 8)
    return folder


def opened(source: Path | str, tmp_path: Path, **settings: object) -> text_module.Data:
    base = {"tokenizer": "bytes", "context": 16, "holdout": 0.2, "cache": str(tmp_path / "cache")}
    return TextData(source=str(source), **(base | settings)).open()  # type: ignore[arg-type]


def whole(tokens: text_module.Tokens) -> list[int]:
    return np.fromfile(tokens.path, dtype=tokens.dtype).tolist()


def test_documents_are_held_out_whole(corpus: Path, tmp_path: Path) -> None:
    data = opened(corpus, tmp_path)
    parts = {}
    for name, split in (("train", data.train), ("validation", data.validation)):
        ids = whole(split)
        assert ids[-1] == 256
        parts[name] = set(data.tokenizer.decode(ids).split("<|endoftext|>")) - {""}
    assert parts["train"].isdisjoint(parts["validation"])
    assert parts["train"] | parts["validation"] == {p.read_text() for p in corpus.iterdir()}
    assert data.meta["documents"]["validation"] >= 1


def test_copies_of_a_document_stay_on_one_side() -> None:
    assert all(held_out(t, 0.5) == held_out(t.replace(" ", "\n"), 0.5) for t in ("a b c", "x y", "one two"))


def test_windows_are_inputs_and_targets(corpus: Path, tmp_path: Path) -> None:
    data = opened(corpus, tmp_path)
    ids = whole(data.train)
    got = data.train.windows(np.array([0, 3]))
    assert got.dtype == np.int64
    assert got.tolist() == [ids[:17], ids[48:65]]
    assert len(data.train) == (len(ids) - 1) // 16


@given(st.integers(1, 40), st.integers(0, 5), st.integers(0, 100), st.integers(1, 50))
def test_order_visits_each_item_once_an_epoch(items: int, seed: int, first: int, count: int) -> None:
    index = np.arange(items) * 10
    run = sample_ids(index, seed, 0, first + count)
    assert run[first:].tolist() == sample_ids(index, seed, first, count).tolist()
    for epoch in range((first + count) // items):
        assert sorted(run[epoch * items : (epoch + 1) * items]) == index.tolist()


def test_a_second_start_uses_the_cache_and_a_changed_text_does_not(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = opened(corpus, tmp_path)
    monkeypatch.setattr(text_module, "_build", lambda *_: pytest.fail("built again"))
    assert opened(corpus, tmp_path).train.path == first.train.path
    monkeypatch.undo()
    (corpus / "00.txt").write_text("something else entirely, and longer than before\n" * 9)
    assert opened(corpus, tmp_path).train.path != first.train.path


def test_a_damaged_cache_is_built_again(corpus: Path, tmp_path: Path) -> None:
    data = opened(corpus, tmp_path)
    before = data.train.path.read_bytes()
    data.train.path.write_bytes(before[:-4])
    assert opened(corpus, tmp_path).train.path.read_bytes() == before


def test_a_builder_that_dies_leaves_nothing_half_built(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(text_module, "_write", dies)
    with pytest.raises(KeyboardInterrupt):
        opened(corpus, tmp_path)
    monkeypatch.undo()
    assert not list((tmp_path / "cache/text").glob(".partial-*"))
    assert len(opened(corpus, tmp_path).train) > 0


def test_two_builders_at_once(corpus: Path, tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        paths = pool.starmap(_built, [(str(corpus), str(tmp_path))] * 2)
    assert paths[0] == paths[1]


def _built(corpus: str, tmp_path: str) -> str:
    return str(opened(corpus, Path(tmp_path)).train.path)


def test_records_and_columns(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [f"row {i} of the table" for i in range(30)]
    parquet.write_table(pyarrow.table({"body": rows}), tmp_path / "t.parquet")
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"body": r}) + "\n" for r in rows))
    for name in ("t.parquet", "t.jsonl"):
        assert list(documents(find(str(tmp_path / name)), "body", {})) == rows
        with pytest.raises(UserError, match=r"bodi.*Did you mean body"):
            list(documents(find(str(tmp_path / name)), "bodi", {}))
    (tmp_path / "bad.jsonl").write_text('{"body": "x"}\n{"body"\n')
    with pytest.raises(UserError, match=r"bad\.jsonl: line 2 is not JSON"):
        list(documents(find(str(tmp_path / "bad.jsonl")), "body", {}))


def test_a_single_text_is_cut_at_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("\n".join(f"line {i}\n" for i in range(3000)))
    cut = list(documents([path], "", {}))
    assert "".join(cut) == path.read_text()
    assert len(cut) > 3
    assert all(4096 <= len(c) < 4200 for c in cut[:-1])


def test_bytes_that_are_no_text_are_replaced_and_counted(corpus: Path, tmp_path: Path) -> None:
    (corpus / "zz.txt").write_bytes(b"caf\xe9 " * 50)
    assert opened(corpus, tmp_path).meta["undecodable"] == 1


@given(st.text())
def test_bytes_round_trip(text: str) -> None:
    tokenizer = bytes_tokenizer()
    ids = tokenizer.encode(text)
    assert ids == list(text.encode("utf-8", "surrogatepass"))
    assert tokenizer.decode(ids) == text
    assert tokenizer.vocab == 257


def test_bpe_is_trained_and_loads_in_transformers(corpus: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    data = opened(corpus, tmp_path, tokenizer="bpe", vocab=300)
    assert data.tokenizer.vocab == 300
    text = "document 7 says 49 and ünicode"
    ids = data.tokenizer.encode(text)
    assert data.tokenizer.decode(ids) == text
    data.tokenizer.save(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert theirs.encode(text) == ids
    again = opened(corpus, tmp_path, tokenizer=str(tmp_path))
    assert again.tokenizer.encode(text) == ids


def test_a_tokenizer_without_a_known_end_must_name_it(tmp_path: Path) -> None:
    import tokenizers

    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    inner.add_special_tokens(["<fin>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"no end-of-text token.*data\.end"):
        Tokenizer.read(tmp_path)
    assert Tokenizer.read(tmp_path, "<fin>").end == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"source": "nowhere"}, "`nowhere` has no text"), ({"context": 10**6}, "too few for a window"),
     ({"tokenizer": "bpe", "vocab": 100}, "at least 257"), ({"tokenizer": "wordpiece"}, "no such tokenizer")],
)  # fmt: skip
def test_mistakes(corpus: Path, tmp_path: Path, settings: dict[str, object], words: str) -> None:
    source = settings.pop("source", corpus)
    with pytest.raises(UserError, match=words):
        opened(source, tmp_path, **settings)  # type: ignore[arg-type]


def test_a_corpus_larger_than_its_memory(tmp_path: Path) -> None:
    """40 MB of text must not take 40 MB of tokens as Python integers, which would be more than a gigabyte."""
    path = tmp_path / "big.jsonl"
    with path.open("w") as file:
        for i in range(4000):
            file.write(json.dumps({"text": f"{i} " + "lorem ipsum dolor " * 555}) + "\n")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        grown = pool.apply(_growth, (str(path), str(tmp_path)))
    assert os.path.getsize(path) > 35e6
    assert grown < 500e6


def _growth(path: str, tmp_path: str) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    opened(path, Path(tmp_path))
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def test_the_default_corpus_is_there() -> None:
    files = find("python-stdlib")
    assert len(files) > 300
    assert not [p for p in files if "site-packages" in p.parts or "test" in p.parts]
