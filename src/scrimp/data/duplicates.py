"""Texts that were seen before, exactly or nearly, so that a corpus is trained on once.

exact: the same letters but for space around them.

near, by MinHash: a text is the set of its runs of 5 words; the share that two sets have in common (Jaccard similarity)
is about the share of equal places in their signatures,

    signature[i] = min over runs s of (a_i h(s) + b_i) mod p          for 128 random pairs (a_i, b_i)

Signatures are cut into 16 bands of 8 places. Only texts that agree in a whole band are compared, which finds a pair of
similarity s with chance 1 - (1 - s^8)^16: 0.95 at 0.8. Papers: Broder, "On the resemblance and containment of
documents", 1997; Lee et al., "Deduplicating Training Data Makes Language Models Better", ACL 2022, arXiv 2107.06499.

Memory: 16 bytes a text for exact ones, about 1.5 KiB for near ones.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Final, Literal

import numpy as np

Kind = Literal["keep", "exact", "near"]
WORDS: Final = 5
"""Words of a run."""
PLACES: Final = 128
BANDS: Final = 16
PRIME: Final = 2**31 - 1
SIMILAR: Final = 0.8
"""Share of equal places from which texts count as the same."""


def first_of_its_kind(kind: Kind) -> Callable[[str], bool]:
    """A function that says of each text whether none like it was given before."""
    if kind == "keep":
        return lambda text: True
    return _exactly() if kind == "exact" else _nearly()


def unique(texts: Iterable[str], kind: Kind, found: Callable[[], None] = lambda: None) -> Iterator[str]:
    """The texts without those that were seen before.

    Args:
        found: is called for each that is left out.
    """
    new = first_of_its_kind(kind)
    for text in texts:
        if new(text):
            yield text
        else:
            found()


def _exactly() -> Callable[[str], bool]:
    seen = set[bytes]()

    def new(text: str) -> bool:
        key = hashlib.blake2b(text.strip().encode(), digest_size=16).digest()
        known = key in seen
        seen.add(key)
        return not known

    return new


def _nearly() -> Callable[[str], bool]:
    bands: list[dict[bytes, list[int]]] = [{} for _ in range(BANDS)]
    signatures = list[np.ndarray]()

    def new(text: str) -> bool:
        mine = signature(text)
        keys = [part.tobytes() for part in np.split(mine, BANDS)]
        rivals = {n for band, key in zip(bands, keys, strict=True) for n in band.get(key, ())}
        if any(float((signatures[n] == mine).mean()) >= SIMILAR for n in rivals):
            return False
        for band, key in zip(bands, keys, strict=True):
            band.setdefault(key, []).append(len(signatures))
        signatures.append(mine)
        return True

    return new


def signature(text: str) -> np.ndarray:
    """Smallest hashes of a text's runs of words: uint32, [128]."""
    words = text.split()
    runs = {" ".join(words[i : i + WORDS]) for i in range(max(1, len(words) - WORDS + 1))}
    # Both factors are below 2**31, so that products fit into 64 bits.
    hashes = np.fromiter((zlib.crc32(run.encode()) % PRIME for run in runs), np.uint64, len(runs))
    a, b = _factors()
    least = np.full(PLACES, PRIME, np.uint64)
    for part in np.array_split(hashes, -(-len(hashes) // 4096)):
        least = np.minimum(least, ((a[:, None] * part + b[:, None]) % PRIME).min(1))
    return least.astype(np.uint32)


def _factors() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    return draw.integers(1, PRIME, PLACES, np.uint64), draw.integers(0, PRIME, PLACES, np.uint64)
