"""Tokenizers: there and back, and into other libraries."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from scrimp.data.tokenizer import END, Tokenizer, bytes_tokenizer, train_bpe
from scrimp.errors import UserError

TEXT = "document 7 says 49 and ünicode \U0001f600\n\tand ends"


def bpe() -> Tokenizer:
    return train_bpe(iter([f"document {i} says {i * i} and ends\n" for i in range(200)]), 300)


@given(st.lists(st.one_of(st.text(), st.just(END))).map("".join))
def test_bytes_there_and_back(text: str) -> None:
    tokenizer = bytes_tokenizer()
    ids = tokenizer.encode(text)
    if END not in text:
        assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert (tokenizer.vocab, tokenizer.end) == (257, 256)
    got = tokenizer.encode_documents([text, "x"], "uint16")
    assert [(a.dtype, a.tolist()) for a in got] == [(np.uint16, [*ids, 256]), (np.uint16, [120, 256])]


def test_bpe_there_and_back() -> None:
    tokenizer = bpe()
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert len(ids) < len(TEXT.encode())
    assert tokenizer.encode_batch([TEXT, "", "a"]) == [ids, [], tokenizer.encode("a")]
    assert (tokenizer.vocab, tokenizer.end) == (300, 299)
    assert tokenizer.encode_documents([TEXT], "uint32")[0].tolist() == [*ids, 299]
    assert tokenizer.encode(f"a{END}a") == [*tokenizer.encode("a"), 299, *tokenizer.encode("a")]


def test_a_short_text_gives_a_smaller_bpe() -> None:
    tokenizer = train_bpe(iter(["ab ab"]), 8192)
    assert 257 < tokenizer.vocab < 270
    assert tokenizer.end == tokenizer.vocab - 1
    with pytest.raises(UserError, match="at least 257"):
        train_bpe(iter(["ab"]), 256)


@pytest.mark.parametrize("make", [bpe, bytes_tokenizer])
def test_others_load_it(make: object, tmp_path: Path) -> None:
    transformers = import_module("transformers")
    tokenizer = make()  # type: ignore[operator]
    tokenizer.save(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert theirs.encode(TEXT) == tokenizer.encode(TEXT)
    assert theirs.decode(tokenizer.encode(TEXT)) == TEXT
    assert theirs.convert_tokens_to_ids(END) == tokenizer.end
    again = Tokenizer.read(tmp_path)
    assert (again.encode(TEXT), again.end) == (tokenizer.encode(TEXT), tokenizer.end)


def foreign(folder: Path, special: str, **vocab: int) -> Path:
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    inner.add_special_tokens([special])
    inner.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("end", ["<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[SEP]"])
def test_the_usual_ends_are_found(end: str, tmp_path: Path) -> None:
    assert Tokenizer.read(foreign(tmp_path, end, a=0, b=1)).end == 2


def test_another_end_must_be_named(tmp_path: Path) -> None:
    foreign(tmp_path, "<fin>", a=0, b=1)
    with pytest.raises(UserError, match=r"no end-of-text token.*data\.end"):
        Tokenizer.read(tmp_path)
    with pytest.raises(UserError, match=r"no token `<end>`"):
        Tokenizer.read(tmp_path, "<end>")
    assert Tokenizer.read(tmp_path, "<fin>").end == 2
    assert Tokenizer.read(tmp_path / "tokenizer.json", "<fin>").end == 2


def test_ids_with_gaps_fit_the_embedding(tmp_path: Path) -> None:
    assert Tokenizer.read(foreign(tmp_path, "</s>", a=0, b=900)).vocab == 901


def test_what_is_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such tokenizer"):
        Tokenizer.read(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: is not a tokenizer"):
        Tokenizer.read(tmp_path)
