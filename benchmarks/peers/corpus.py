"""The token stream that every peer trains on, made from the interpreter's own library sources.

A token is a pair of neighboring bytes, spread over the vocabulary: frequencies are as skewed as those of text. The last
id of the vocabulary ends a document. The same stream is written twice: as uint16 ids, and as text whose characters are
the tokens, with a tokenizer.json that turns them back into the same ids, for a trainer that reads text.
"""

from __future__ import annotations

import json
import sys
import sysconfig
from array import array
from pathlib import Path
from typing import Final

from workloads import Workload

COUNT: Final = 1_000_000
"""Tokens of the stream."""
DOCUMENT: Final = 4096
"""Tokens of a document of the text form."""
FIRST: Final = 0x20000
"""Code point of token 0: planes 2 and 3 hold enough characters that no normalization or splitting touches."""
END: Final = "<|endoftext|>"
SKIPPED: Final = {"test", "tests", "idle_test", "site-packages", "__pycache__"}


def build(root: Path, workload: Workload) -> Path:
    """The folder of a vocabulary's stream, written if it is not there."""
    folder = root / f"corpus-{workload.vocab}-py{sys.version_info.major}{sys.version_info.minor}"
    if (folder / "done").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    raw = source_bytes(2 * COUNT)
    ids = array("H", ((256 * a + b) * 40503 % (workload.vocab - 1) for a, b in zip(raw[::2], raw[1::2], strict=True)))
    (folder / "tokens.bin").write_bytes(ids.tobytes())
    with (folder / "text.jsonl").open("w", encoding="utf-8") as file:
        for i in range(0, COUNT, DOCUMENT):
            text = "".join(chr(FIRST + token) for token in ids[i : i + DOCUMENT])
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer(workload.vocab)), encoding="utf-8")
    (folder / "done").touch()
    return folder


def source_bytes(count: int) -> bytes:
    """The first `count` bytes of the library's sources, in the order of their names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    parts, size = [], 0
    for path in sorted(root.rglob("*.py")):
        if SKIPPED.isdisjoint(path.relative_to(root).parts) and size < count:
            parts.append(path.read_bytes())
            size += len(parts[-1])
    if size < count:
        raise SystemExit(f"the library at {root} has {size} bytes of sources, {count} are needed")
    return b"".join(parts)[:count]


def tokenizer(vocab: int) -> dict[str, object]:
    """A tokenizer.json with one character a token."""
    special = {"id": vocab - 1, "content": END, "single_word": False, "lstrip": False, "rstrip": False,
               "normalized": False, "special": True}  # fmt: skip
    words = {chr(FIRST + i): i for i in range(vocab - 1)} | {END: vocab - 1}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [special], "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False},
        "post_processor": None, "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": END},
    }  # fmt: skip
