"""Tokenizers: bytes, a byte-level BPE trained on the corpus, or somebody's tokenizer.json."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from scrimp.errors import UserError

if TYPE_CHECKING:
    import tokenizers

END: Final = "<|endoftext|>"
MASK: Final = "<|mask|>"
ROLES: Final = {
    "mask": (MASK, "[MASK]", "<mask>"), "pad": ("[PAD]", "<pad>", "<|pad|>"), "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"), "unk": ("[UNK]", "<unk>"),
}  # fmt: skip
"""What special tokens are for -> their usual names."""
ENDS: Final = (END, "</s>", "<|end_of_text|>", "<|im_end|>", "<eos>", "[SEP]")


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back. Every document ends with `end`; so does a text where it spells that token out."""

    inner: tokenizers.Tokenizer
    end: int
    """Id of the end-of-text token."""
    raw: bool = False
    """Whether ids are the bytes of the text as UTF-8, so that a corpus needs no tokenizing."""

    @cached_property
    def vocab(self) -> int:
        """One more than the greatest id, so that ids index an embedding of as many rows even if some are not used."""
        return 1 + max(self.inner.get_vocab(with_added_tokens=True).values())

    def roles(self) -> dict[str, str]:
        """What special tokens are for -> their text, of those that it has under a usual name."""
        found = {role: [t for t in names if self.inner.token_to_id(t) is not None] for role, names in ROLES.items()}
        return {role: names[0] for role, names in found.items() if names}

    @property
    def mask(self) -> int | None:
        """Id of the token that hides another, if there is one."""
        return self._id("mask")

    @property
    def pad(self) -> int | None:
        """Id of the token that fills up batches, if there is one."""
        return self._id("pad")

    @cached_property
    def special(self) -> frozenset[int]:
        """Ids of the tokens that stand for no text."""
        table = self.inner.get_added_tokens_decoder()
        return frozenset({self.end, *(i for i, token in table.items() if token.special)})

    def _id(self, role: str) -> int | None:
        token = self.roles().get(role)
        return None if token is None else self.inner.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens around it."""
        return self.inner.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of several texts, on all cores."""
        return [found.ids for found in self.inner.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_documents(self, texts: list[str], dtype: str) -> list[np.ndarray]:
        """Ids of several documents, each with `end` after it: arrays of `dtype`, shape [ids + 1]."""
        if not self.raw or any(END in text or MASK in text for text in texts):
            return [np.array([*ids, self.end], dtype=dtype) for ids in self.encode_batch(texts)]
        whole = [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]
        return [np.append(ids.astype(dtype), np.array(self.end, dtype=dtype)) for ids in whole]

    def decode(self, ids: list[int]) -> str:
        """Text of ids; special tokens are shown."""
        return self.inner.decode(ids, skip_special_tokens=False)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, which `PreTrainedTokenizerFast` and `tokenizers` load."""
        (folder / "tokenizer.json").write_text(self.inner.to_str(pretty=True), encoding="utf-8")

    @classmethod
    def read(cls, path: Path, end: str = "") -> Tokenizer:
        """From a tokenizer.json, or a folder that has one.

        Args:
            end: the end-of-text token, as text; empty means the first of the usual names that it has.

        Raises:
            UserError: if there is none, or its end-of-text token is not known.
        """
        import tokenizers

        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            fix = "Set bpe, which trains one, or the path of a tokenizer.json or of a folder that has one."
            fix = f"This data set has no tokenizer of bytes. {fix}" if str(path) == "bytes" else fix
            raise UserError("there is no such tokenizer.", str(path), fix)
        try:
            inner = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises plain Exception
            raise UserError(f"is not a tokenizer: {error}.", str(file)) from None
        inner.no_truncation()
        inner.no_padding()
        for token in (end,) if end else ENDS:
            found = inner.token_to_id(token)
            if found is not None:
                return cls(inner, found)
        what = f"has no token `{end}`." if end else "has no end-of-text token that is known."
        raise UserError(what, str(file), "Name it in `data.end`.")


def bytes_tokenizer() -> Tokenizer:
    """Ids 0 to 255 are bytes, 256 ends a text. A byte-level BPE without merges, so that other libraries load it."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    letters = _byte_letters()
    inner = tokenizers.Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore[assignment]
    inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    inner.add_special_tokens([END])
    return Tokenizer(inner, 256, raw=True)


def train_bpe(texts: Iterator[str], vocab: int) -> Tokenizer:
    """A byte-level BPE with `vocab` ids, fewer if the texts are short; the last one ends a text.

    Raises:
        UserError: if `vocab` is less than 257.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab < 257:
        raise UserError(f"a byte-level BPE needs at least 257 ids, not {vocab}.", "data.vocab")
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab - 1, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(texts, trainer)
    inner.add_special_tokens([END])
    return Tokenizer(inner, inner.get_vocab_size() - 1)


def with_mask(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer with one more token, the last, which hides others from a masked language model."""
    tokenizer.inner.add_special_tokens([MASK])
    return Tokenizer(tokenizer.inner, tokenizer.end, tokenizer.raw)


def framed(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer with its end-of-text token before, between and after texts, as `[CLS]` and `[SEP]` are."""
    from tokenizers import processors

    token = {"id": "end", "ids": [tokenizer.end], "tokens": [tokenizer.inner.id_to_token(tokenizer.end)]}
    tokenizer.inner.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="end $A end", pair="end $A end $B:1 end:1", special_tokens=[token]
    )
    return tokenizer


def frame_texts(file: Path, end: int, after: bool = False) -> None:
    """Have a tokenizer.json put its end-of-text token before every text, where other libraries add special tokens.

    A language model here sees that token before every document, so that a prompt without it is unlike all it was
    trained on. Models that read whole texts see it after each. What the file put around texts before is replaced.
    `Tokenizer` adds no special tokens and reads the file as ever.

    Args:
        end: id of the token.
        after: put it after the text instead.
    """
    import tokenizers
    from tokenizers import processors

    inner = tokenizers.Tokenizer.from_file(str(file))
    token = {"id": "end", "ids": [end], "tokens": [inner.id_to_token(end)]}
    single, pair = ("$A end", "$A end $B:1 end:1") if after else ("end $A", "end $A end:1 $B:1")
    inner.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=single, pair=pair, special_tokens=[token]
    )
    file.write_text(inner.to_str(pretty=True), encoding="utf-8")


def _byte_letters() -> list[str]:
    """The printable letter that byte-level tokenizers use for each byte."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in plain]
    letters = {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(rest)}
    return [letters[b] for b in range(256)]
