"""What GGUF's types of numbers mean: blocks of bytes to float32, a whole tensor at once.

A block of 32 holds small integers q and one or two scales, x = d q + m; its low nibbles are the first half, its high
nibbles the second. The "K" types hold 256 numbers in groups of 16 or 32, whose own scales are 4 or 6 bits and share a
float16: x = d s q - m t. Layouts as in ggml's ggml-common.h; `_` in the comments is what a byte's lowest bits hold.

Legend of shapes: n blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

Bytes = np.ndarray
"""uint8 [n, bytes of a block]"""


@dataclass(frozen=True)
class Kind:
    """A type of numbers.

    Attributes:
        size: numbers in a block.
        bytes: of a block.
        read: uint8 [n, bytes] -> float32 [n, size].
    """

    name: str
    size: int
    bytes: int
    read: Callable[[Bytes], np.ndarray]


def half(raw: Bytes) -> np.ndarray:
    """float16 [n, 2 k bytes] -> float32 [n, k]."""
    return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)


def plain(dtype: str) -> Callable[[Bytes], np.ndarray]:
    """Numbers as numpy knows them."""
    return lambda raw: np.ascontiguousarray(raw).view(dtype).astype(np.float32)


def bfloat16(raw: Bytes) -> np.ndarray:
    """The upper half of a float32."""
    return (np.ascontiguousarray(raw).view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def nibbles(raw: Bytes) -> np.ndarray:
    """[n, k] -> [n, 2 k]: all low nibbles, then all high ones."""
    return np.concatenate([raw & 15, raw >> 4], 1)


def bits(raw: Bytes) -> np.ndarray:
    """[n, k] -> [n, 8 k]: each byte's bits, the lowest first."""
    return np.unpackbits(np.ascontiguousarray(raw), axis=1, bitorder="little")


def q4_0(raw: Bytes) -> np.ndarray:
    """d, 16 bytes: x = d (q - 8)."""
    return half(raw[:, :2]) * (nibbles(raw[:, 2:]).astype(np.float32) - 8)


def q4_1(raw: Bytes) -> np.ndarray:
    """d, m, 16 bytes: x = d q + m."""
    return half(raw[:, :2]) * nibbles(raw[:, 4:]) + half(raw[:, 2:4])


def q5_0(raw: Bytes) -> np.ndarray:
    """d, 32 fifth bits, 16 bytes: x = d (q - 16)."""
    q = nibbles(raw[:, 6:]) | bits(raw[:, 2:6]) << 4
    return half(raw[:, :2]) * (q.astype(np.float32) - 16)


def q5_1(raw: Bytes) -> np.ndarray:
    """d, m, 32 fifth bits, 16 bytes: x = d q + m."""
    return half(raw[:, :2]) * (nibbles(raw[:, 8:]) | bits(raw[:, 4:8]) << 4) + half(raw[:, 2:4])


def q8_0(raw: Bytes) -> np.ndarray:
    """d, 32 signed bytes: x = d q."""
    return half(raw[:, :2]) * raw[:, 2:].view(np.int8)


def fields(raw: Bytes, width: int) -> np.ndarray:
    """[n, groups, k] -> [n, groups, 8 / width, k]: parts of bytes of `width` bits, the lowest first."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    return raw[:, :, None] >> shifts & (2**width - 1)


def scales_6(raw: Bytes) -> tuple[np.ndarray, np.ndarray]:
    """12 bytes -> 8 scales and 8 minima of 6 bits: the last four of each have their upper bits in the first bytes."""
    low, middle, high = raw[:, :4], raw[:, 4:8], raw[:, 8:]
    scale = np.concatenate([low & 63, high & 15 | (low >> 6) << 4], 1)
    least = np.concatenate([middle & 63, high >> 4 | (middle >> 6) << 4], 1)
    return scale, least


def scaled(raw: Bytes, q: np.ndarray) -> np.ndarray:
    """d, m, 12 bytes of scales, and q [n, 8, 32]: x = d s q - m t."""
    scale, least = scales_6(raw[:, 4:16])
    d, m = half(raw[:, :2]) * scale, half(raw[:, 2:4]) * least
    return (d[..., None] * q - m[..., None]).reshape(len(raw), 256)


def q4_k(raw: Bytes) -> np.ndarray:
    """d, m, scales, 4 x 32 bytes, each with a group in its low and one in its high nibbles."""
    return scaled(raw, fields(raw[:, 16:].reshape(-1, 4, 32), 4).reshape(-1, 8, 32))


def q5_k(raw: Bytes) -> np.ndarray:
    """As q4_k, with 32 bytes of fifth bits: bit g of byte i belongs to number i of group g."""
    q = fields(raw[:, 48:].reshape(-1, 4, 32), 4).reshape(-1, 8, 32)
    return scaled(raw, q | fields(raw[:, None, 16:48], 1).reshape(-1, 8, 32) << 4)


def q2_k(raw: Bytes) -> np.ndarray:
    """16 bytes of scale _ and minimum, 2 x 32 bytes of four groups each, d, m: x = d s q - m t."""
    q = fields(raw[:, 16:80].reshape(-1, 2, 32), 2).reshape(-1, 16, 16)
    d, m = half(raw[:, 80:82]) * (raw[:, :16] & 15), half(raw[:, 82:84]) * (raw[:, :16] >> 4)
    return (d[..., None] * q - m[..., None]).reshape(len(raw), 256)


def q3_k(raw: Bytes) -> np.ndarray:
    """32 bytes of third bits, 2 x 32 bytes, 12 bytes of 16 scales, d: x = d (s - 32) (q - 4)."""
    q = fields(raw[:, 32:96].reshape(-1, 2, 32), 2).reshape(-1, 8, 32)
    q = (q | fields(raw[:, None, :32], 1).reshape(-1, 8, 32) << 2).astype(np.float32) - 4
    low, high = nibbles(raw[:, 96:104]), fields(raw[:, None, 104:108], 2).reshape(-1, 16)
    d = half(raw[:, 108:110]) * ((low | high << 4).astype(np.float32) - 32)
    return (d[..., None] * q.reshape(-1, 16, 16)).reshape(len(raw), 256)


def q6_k(raw: Bytes) -> np.ndarray:
    """2 x 64 bytes of low nibbles, 2 x 32 of upper two bits, 16 signed scales, d: x = d s (q - 32)."""
    low = fields(raw[:, :128].reshape(-1, 2, 64), 4).reshape(-1, 2, 4, 32)
    q = low | fields(raw[:, 128:192].reshape(-1, 2, 32), 2) << 4
    d = half(raw[:, 208:210]) * np.ascontiguousarray(raw[:, 192:208]).view(np.int8)
    return (d[..., None] * (q.reshape(-1, 16, 16).astype(np.float32) - 32)).reshape(len(raw), 256)


KINDS: Final[dict[int, Kind]] = {
    0: Kind("F32", 1, 4, plain("<f4")),
    1: Kind("F16", 1, 2, half),
    2: Kind("Q4_0", 32, 18, q4_0),
    3: Kind("Q4_1", 32, 20, q4_1),
    6: Kind("Q5_0", 32, 22, q5_0),
    7: Kind("Q5_1", 32, 24, q5_1),
    8: Kind("Q8_0", 32, 34, q8_0),
    10: Kind("Q2_K", 256, 84, q2_k),
    11: Kind("Q3_K", 256, 110, q3_k),
    12: Kind("Q4_K", 256, 144, q4_k),
    13: Kind("Q5_K", 256, 176, q5_k),
    14: Kind("Q6_K", 256, 210, q6_k),
    28: Kind("F64", 1, 8, plain("<f8")),
    30: Kind("BF16", 1, 2, bfloat16),
}
"""Number of a type in the file -> what it is."""
