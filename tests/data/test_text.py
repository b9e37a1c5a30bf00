"""Text becomes tokens: split by document, cached by content, built whole or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from scrimp.data import Data, TextData, Tokens, open_data
from scrimp.data import cache as cache_module
from scrimp.data import text as text_module
from scrimp.data.cache import PARTIAL, STALE
from scrimp.errors import UserError

END = "<|endoftext|>"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SCRIMP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "text"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02d}.txt").write_text(f"document {i} says {i * i} and ends\n" * 8)
    return folder


def settings(source: Path | str, **changes: object) -> TextData:
    base = TextData(source=str(source), tokenizer="bytes", context=16, holdout=0.2)
    return replace(base, **changes)  # type: ignore[arg-type]


def whole(tokens: Tokens) -> list[int]:
    return np.fromfile(tokens.path, dtype=tokens.dtype).tolist()


def texts(data: Data, split: Tokens) -> list[str]:
    *found, last = data.tokenizer.decode(whole(split)).split(END)
    assert last == ""  # every document has its end
    return found


def left(cache: Path) -> list[Path]:
    return list(cache.glob(f"{PARTIAL}*"))


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_documents_are_held_out_whole(corpus: Path, tokenizer: str) -> None:
    data = open_data(settings(corpus, tokenizer=tokenizer, vocab=300))
    train, held = texts(data, data.train), texts(data, data.validation)
    assert sorted(train + held) == sorted(p.read_text() for p in corpus.iterdir())
    assert not set(train) & set(held)
    assert data.meta["documents"] == {"train": len(train), "validation": len(held)}
    assert data.meta["tokens"] == {"train": len(whole(data.train)), "validation": len(whole(data.validation))}
    assert 2 <= len(held) <= 16


def test_copies_are_held_out_together(corpus: Path) -> None:
    for path in list(corpus.iterdir()):
        (corpus / f"copy-{path.name}").write_text(path.read_text().replace("\n", "\r\n") + "\n")
    data = open_data(settings(corpus))
    plain = [{" ".join(t.split()) for t in texts(data, split)} for split in (data.train, data.validation)]
    assert not plain[0] & plain[1]
    assert len(plain[0]) + len(plain[1]) == 40


@pytest.mark.parametrize("holdout", [1e-12, 1 - 1e-12])
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_each_side_has_a_document(tmp_path: Path, holdout: float, tokenizer: str) -> None:
    folder = tmp_path / "few"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.txt").write_text(f"{i} of three short texts\n" * 40)
    data = open_data(settings(folder, holdout=holdout, tokenizer=tokenizer, vocab=270))
    counts = data.meta["documents"]
    assert counts == {"train": 2, "validation": 1} if holdout < 0.5 else counts == {"train": 1, "validation": 2}
    assert len(texts(data, data.train)) == counts["train"]
    if tokenizer == "bpe":  # it never saw the one that is held out
        digits = {t[0] for t in texts(data, data.train)}
        assert digits | {t[0] for t in texts(data, data.validation)} == set("012")


def test_the_bpe_sees_training_documents_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    train = text_module.train_bpe

    def spied(found: object, vocab: int) -> object:
        seen[:] = list(found)  # type: ignore[call-overload]
        return train(iter(seen), vocab)

    monkeypatch.setattr(text_module, "train_bpe", spied)
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {i} " * 9}) + "\n" for i in range(200)))
    data = open_data(settings(path, tokenizer="bpe", vocab=280))
    assert seen == texts(data, data.train)
    monkeypatch.setattr(text_module, "BPE_SAMPLE", 4000)
    data = open_data(settings(path, tokenizer="bpe", vocab=281))
    every = -(-path.stat().st_size // 4000)
    assert seen == texts(data, data.train)[::every][: len(seen)]
    assert 2000 < sum(map(len, seen)) < 4100


def test_sources_of_the_library_are_the_same_every_time(tmp_path: Path) -> None:
    folder = tmp_path / "library"
    folder.mkdir()
    for name in ("abc", "bisect", "cmd", "copy", "heapq", "json/decoder", "keyword", "queue", "sched", "token", "uuid"):
        source = Path(sysconfig.get_paths()["stdlib"]) / f"{name}.py"
        (folder / f"{name.replace('/', '_')}.py").write_bytes(source.read_bytes())
    first = open_data(settings(folder, tokenizer="bpe", vocab=1000, cache=str(tmp_path / "one")))
    second = open_data(settings(folder, tokenizer="bpe", vocab=1000, cache=str(tmp_path / "two")))
    assert first.train.path.is_relative_to(tmp_path / "one")
    for name in ("train.bin", "validation.bin", "tokenizer.json", "meta.json"):
        one, two = first.train.path.with_name(name), second.train.path.with_name(name)
        assert one.read_bytes() == two.read_bytes()
    assert one.parent.name == two.parent.name
    sources = {p.read_text() for p in folder.iterdir()}
    assert {*texts(first, first.train), *texts(first, first.validation)} == sources


def test_a_second_start_uses_the_cache_and_a_changed_text_does_not(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_data(settings(corpus))
    with monkeypatch.context() as patch:
        patch.setattr(text_module, "_build", lambda *_: pytest.fail("built again"))
        assert open_data(settings(corpus, context=8)).train.path == first.train.path
    was = (corpus / "00.txt").read_text()
    tick = (corpus / "00.txt").stat().st_mtime_ns
    (corpus / "00.txt").write_text(was[::-1])  # as long as before, and in the same tick of the clock
    os.utime(corpus / "00.txt", ns=(tick, tick))
    assert open_data(settings(corpus)).train.path != first.train.path
    (corpus / "00.txt").write_text(was)
    assert open_data(settings(corpus)).train.path == first.train.path


def test_hashes_are_remembered_once_files_are_old(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in corpus.iterdir():
        os.utime(path, (1e9, 1e9))
    first = open_data(settings(corpus))
    with monkeypatch.context() as patch:
        patch.setattr(cache_module.hashlib, "file_digest", lambda *_: pytest.fail("hashed again"))
        assert open_data(settings(corpus)).train.path == first.train.path
    (first.train.path.parents[1] / "hashes.json").write_text("[")
    assert open_data(settings(corpus)).train.path == first.train.path


def test_what_changes_the_tokens_changes_the_folder(corpus: Path, tmp_path: Path) -> None:
    body = "".join(json.dumps({"text": f"line {i} " * 300}) + "\n\n" for i in range(40))
    (tmp_path / "a.txt").write_text(body)
    (tmp_path / "a.jsonl").write_text(body)
    open_data(settings(corpus, tokenizer="bpe", vocab=300)).tokenizer.save(tmp_path)
    several = [
        settings(corpus), settings(corpus, holdout=0.3), settings(corpus, tokenizer="bpe", vocab=300),
        settings(corpus, tokenizer="bpe", vocab=310), settings(corpus, tokenizer=str(tmp_path)),
        settings(tmp_path / "a.txt"), settings(tmp_path / "a.jsonl"),
    ]  # fmt: skip
    assert len({open_data(s).train.path for s in several}) == len(several)


def test_a_given_tokenizer_is_copied(corpus: Path, tmp_path: Path) -> None:
    trained = open_data(settings(corpus, tokenizer="bpe", vocab=300))
    trained.tokenizer.save(tmp_path)
    given = open_data(settings(corpus, tokenizer=str(tmp_path / "tokenizer.json")))
    assert whole(given.train) == whole(trained.train)
    (tmp_path / "tokenizer.json").unlink()
    assert given.train.path.with_name("tokenizer.json").is_file()


@pytest.mark.parametrize("name", ["train.bin", "validation.bin", "tokenizer.json", "meta.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_cache_is_built_again(corpus: Path, cache: Path, name: str, damage: str) -> None:
    path = open_data(settings(corpus, tokenizer="bpe", vocab=300)).train.path.with_name(name)
    before = path.read_bytes()
    if damage == "cut":
        path.write_bytes(before[:-4])
    else:
        path.unlink()
    again = open_data(settings(corpus, tokenizer="bpe", vocab=300))
    assert again.train.path.with_name(name) == path
    assert path.read_bytes() == before
    assert not left(cache)


KILLED = """
import sys, time
from scrimp.data import TextData, open_data
from scrimp.data.tokenizer import Tokenizer

encode = Tokenizer.encode_documents
calls = []
def slow(self, texts, dtype):
    calls.append(1)
    if len(calls) == 3:
        print("half", flush=True)
        time.sleep(60)
    return encode(self, texts, dtype)
Tokenizer.encode_documents = slow
import scrimp.data.text
scrimp.data.text.BATCH = 2000
open_data(TextData(source=sys.argv[1], tokenizer="bytes", context=16, holdout=0.2))
"""


def test_a_builder_that_is_killed_leaves_no_half_cache(corpus: Path, cache: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(corpus)], stdout=subprocess.PIPE, text=True)
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "half\n"
        child.kill()
    (partial,) = left(cache)
    assert [p for p in cache.iterdir() if p.is_dir()] == [partial]
    data = open_data(settings(corpus))
    assert sum(data.meta["documents"].values()) == 40
    assert left(cache) == [partial]  # its builder might still be alive
    old = time.time() - STALE - 60
    for path in (*partial.iterdir(), partial):
        os.utime(path, (old, old))
    (corpus / "more.txt").write_text("more " * 20)
    open_data(settings(corpus))
    assert not left(cache)


def test_a_builder_that_fails_removes_its_part(corpus: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(text_module, "_write", fails)
    with pytest.raises(KeyboardInterrupt):
        open_data(settings(corpus))
    assert not [p for p in cache.iterdir() if p.is_dir()]


def test_a_full_disk_is_told(corpus: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(text_module, "_write", full)
    with pytest.raises(UserError, match=r"No space left on device.*data\.cache"):
        open_data(settings(corpus))
    assert not left(cache)


def test_builders_at_once_agree(corpus: Path, cache: Path) -> None:
    open_data(settings(corpus)).train.path.write_bytes(b"damaged")
    with ThreadPoolExecutor(8) as pool:
        several = list(pool.map(lambda _: open_data(settings(corpus)), range(8)))
    assert len({data.train.path for data in several}) == 1
    assert {len(whole(data.train)) for data in several} == {several[0].meta["tokens"]["train"]}
    assert not left(cache)


def test_files_that_change_during_the_build_are_noticed(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write: Callable[..., Any] = text_module._write

    def meddled(*arguments: Any) -> Any:
        found = write(*arguments)
        (corpus / "07.txt").write_text("something else")
        return found

    monkeypatch.setattr(text_module, "_write", meddled)
    with pytest.raises(UserError, match="changed while they were read"):
        open_data(settings(corpus))


GROWTH = """
import resource, sys
import numpy, tokenizers
from scrimp.data import TextData, open_data

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
open_data(TextData(source=sys.argv[1], tokenizer="bytes"))
assert "torch" not in sys.modules
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
@pytest.mark.parametrize("name", ["big.jsonl", "big.txt"])
def test_a_corpus_larger_than_its_memory(tmp_path: Path, name: str) -> None:
    """60 MB of text, of which 40 MB or more must not be in memory at once, nor their tokens."""
    path = tmp_path / name
    with path.open("w") as file:
        for i in range(6000):
            text = f"{i} " + "lorem ipsum dolor " * 555
            file.write(json.dumps({"text": text}) + "\n" if name == "big.jsonl" else text)  # a text without lines
    assert path.stat().st_size > 59e6
    grown = subprocess.run(
        [sys.executable, "-c", GROWTH, str(path)], capture_output=True, text=True, check=True, timeout=100
    )
    assert int(grown.stdout) < 40
    assert grown.stderr == ""


def test_importing_is_light() -> None:
    code = (
        "import sys, scrimp.data; print(*{'torch', 'tokenizers', 'pyarrow', 'rich', 'pydantic'} & sys.modules.keys())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "\n"


def test_settings_are_validated() -> None:
    adapter = TypeAdapter(TextData)
    assert adapter.validate_python({"context": 64}) == TextData(context=64)
    for wrong in ({"contxt": 64}, {"context": 0}, {"holdout": 1}, {"vocab": 100}, {"vocab": "many"}):
        with pytest.raises(ValidationError):
            adapter.validate_python(wrong)
    about = adapter.json_schema()["properties"]
    assert all(about[name]["description"] for name in about)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"source": "nowhere"}, "`nowhere` has no text"),
     ({"context": 10**6}, r"train split has \d+ tokens.*shorter context, more text"),
     ({"tokenizer": "bpe", "vocab": 100}, "at least 257"), ({"tokenizer": "wordpiece"}, "no such tokenizer"),
     ({"holdout": 0.0}, "between 0 and 1")],
)  # fmt: skip
def test_mistakes(corpus: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        open_data(replace(settings(corpus), **changes))  # type: ignore[arg-type]


def test_one_document_cannot_be_split(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("short\n" * 100)
    with pytest.raises(UserError, match="only one document"):
        open_data(settings(path))
    path.write_text("")
    with pytest.raises(UserError, match="only empty documents"):
        open_data(settings(path))
