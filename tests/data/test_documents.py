"""Files become documents: by kind, cut where they are large, errors by name."""

from __future__ import annotations

import json
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scrimp.data import documents as documents_module
from scrimp.data.documents import documents, find, fingerprint
from scrimp.errors import UserError


def read(*files: Path, field: str = "text") -> tuple[list[str], Counter[str]]:
    tally: Counter[str] = Counter()
    return list(documents(list(files), field, tally)), tally


def lines(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_folder_takes_what_is_supported_and_not_hidden(tmp_path: Path) -> None:
    for name in ("b.md", "a/x.TXT", "a/y.py", "c.json", "d.png", ".venv/z.py", "a/.hidden.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [p.relative_to(tmp_path).as_posix() for p in find(str(tmp_path))] == ["a/x.TXT", "a/y.py", "b.md"]
    assert find(str(tmp_path / "**/*.json")) == [tmp_path / "c.json"]
    with pytest.raises(UserError, match=r"has no text.*\.parquet"):
        find(str(tmp_path / "*.nothing"))


def test_the_library_of_the_interpreter() -> None:
    files = find("python-stdlib")
    assert len(files) > 300
    assert files == sorted(set(files))
    assert not [p for p in files if {"site-packages", "test", "idle_test"} & set(p.parts)]


@pytest.mark.parametrize("name", ["t.parquet", "t.jsonl"])
def test_a_record_is_a_document(tmp_path: Path, name: str) -> None:
    rows = ["row one of the table", None, "", "row four", "vier Fünf"]
    path = tmp_path / name
    if name == "t.jsonl":
        lines(path, *({"body": row, "id": 1} for row in rows))
    else:
        pyarrow = import_module("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"body": rows, "id": [1] * 5}), path)
    found, tally = read(path, field="body")
    assert found == ["row one of the table", "row four", "vier Fünf"]
    assert tally == {"empty": 2}
    with pytest.raises(UserError, match=r"bodi.*Did you mean body") as caught:
        read(path, field="bodi")
    assert str(path) in caught.value.where
    with pytest.raises(UserError, match=r"`id` is not text but (1|int64)"):
        read(path, field="id")


def test_a_column_may_be_a_dictionary_or_not_be_unicode(tmp_path: Path) -> None:
    pyarrow = import_module("pyarrow")
    from pyarrow import parquet

    latin = pyarrow.Array.from_buffers(pyarrow.string(), 2, pyarrow.array([b"caf\xe9", b"tea"]).buffers())
    table = pyarrow.table({"coded": pyarrow.array(["a", "b"]).dictionary_encode(), "latin": latin})
    parquet.write_table(table, tmp_path / "t.parquet")
    assert read(tmp_path / "t.parquet", field="coded") == (["a", "b"], Counter())
    assert read(tmp_path / "t.parquet", field="latin") == (["caf\ufffd", "tea"], Counter(undecodable=1))
    (tmp_path / "bad.parquet").write_bytes(b"no")
    with pytest.raises(UserError, match=r"bad\.parquet: is not a parquet file"):
        read(tmp_path / "bad.parquet")


def test_a_faulty_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "x"}\n\n{"text"\n')
    with pytest.raises(UserError, match=r"bad\.jsonl: line 3 is not JSON"):
        read(path)
    path.write_text('{"text": "x"}\n[1]\n')
    with pytest.raises(UserError, match=r"bad\.jsonl, line 2: is not a record but a list"):
        read(path)


def test_what_is_not_unicode_is_replaced_and_counted(tmp_path: Path) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_bytes(b"caf\xe9 au lait \xef\xbf\xbd caf\xe9")  # the second is a replacement character already
    second.write_bytes(b"\xef\xbb\xbfwith a mark")
    assert read(first, second) == (["caf\ufffd au lait \ufffd caf\ufffd", "with a mark"], Counter(undecodable=2))
    path = lines(tmp_path / "s.jsonl", {"text": "lone \ud800 and pair \U0001f600"})
    assert read(path) == (["lone ? and pair \U0001f600"], Counter(undecodable=1))
    path.write_bytes(b'\xef\xbb\xbf{"text": "caf\xe9"}\n')
    assert read(path) == (["caf\ufffd"], Counter(undecodable=1))


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text", encoding="utf-16")
    with pytest.raises(UserError, match=r"a\.txt: holds null bytes"):
        read(tmp_path / "a.txt")


def test_a_single_text_is_cut_at_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("\n".join(f"line {i}\n" for i in range(3000)))
    cut, _ = read(path)
    assert "".join(cut) == path.read_text()
    assert len(cut) > 3
    assert all(4096 <= len(c) < 4200 and c.endswith("\n\n") for c in cut[:-1])
    (tmp_path / "other.txt").write_text("short")
    assert read(path, tmp_path / "other.txt")[0] == [path.read_text(), "short"]


def test_a_large_text_is_cut_even_among_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents_module, "LARGE", 50_000)
    large, small = tmp_path / "large.txt", tmp_path / "small.txt"
    large.write_text("a line of a text that has no blank lines\n" * 3000)
    small.write_text("small\n\n" * 1000)
    cut, _ = read(large, small)
    assert "".join(cut[:-1]) == large.read_text()
    assert max(map(len, cut[:-1])) < 4 * 4096 + 50
    assert cut[-1] == small.read_text()


@settings(deadline=None, max_examples=60)
@given(st.text(alphabet="aé€\U0001f600\n", max_size=60), st.integers(4, 9))
def test_a_long_line_is_cut_between_characters(text: str, limit: int) -> None:
    import io

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents_module, "LINE", limit)
        parts = list(documents_module._lines(io.BytesIO(text.encode())))
    assert "".join(part.decode() for part in parts) == text
    assert max(map(len, parts), default=0) <= limit + 4


def test_copies_have_one_fingerprint() -> None:
    assert fingerprint("a  b\nc") == fingerprint("a b\r\n c\n")
    assert len({fingerprint(f"text {i}") for i in range(1000)}) == 1000
    share = sum(fingerprint(f"text {i}") < 0.2 * 2**64 for i in range(2000)) / 2000
    assert 0.15 < share < 0.25
