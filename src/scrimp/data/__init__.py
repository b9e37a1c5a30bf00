"""Data: documents become a memory-mapped stream of tokens; batch i is a function of (seed, i)."""

from __future__ import annotations

from scrimp.data.order import sample_ids
from scrimp.data.stream import Tokens
from scrimp.data.text import Data, TextData
from scrimp.data.tokenizer import Tokenizer

__all__ = ["Data", "TextData", "Tokenizer", "Tokens", "open_data", "sample_ids"]


def open_data(settings: TextData) -> Data:
    """The data, built if it is not in the cache.

    Raises:
        UserError: if there is no text, a record is faulty, or a split is too short for one window.
    """
    return settings.open()
