"""Each type of GGUF against blocks worked out by hand, and against llama.cpp's own Python package."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest

from scrimp.models.gguf_types import KINDS, Kind

BY_NAME: dict[str, Kind] = {kind.name: kind for kind in KINDS.values()}


def f16(*values: float) -> list[int]:
    return list(np.array(values, dtype=np.float16).tobytes())


def read(name: str, raw: list[int]) -> list[float]:
    kind = BY_NAME[name]
    assert len(raw) == kind.bytes
    return kind.read(np.array([raw], dtype=np.uint8))[0].tolist()


def test_blocks_of_32_by_hand() -> None:
    """Byte i holds i in its low nibble and 15 - i in its high one."""
    q = [i | (15 - i) << 4 for i in range(16)]
    low, high = list(range(16)), [15 - i for i in range(16)]
    assert read("Q4_0", [*f16(0.5), *q]) == [0.5 * (x - 8) for x in low + high]
    assert read("Q4_1", [*f16(0.5, 3.0), *q]) == [0.5 * x + 3 for x in low + high]
    fifth = [0b00000011, 0, 0b00000100, 0b10000000]
    more = [16 if i in (0, 1, 18, 31) else 0 for i in range(32)]
    assert read("Q5_0", [*f16(2.0), *fifth, *q]) == [2.0 * (x + y - 16) for x, y in zip(low + high, more, strict=True)]
    assert read("Q5_1", [*f16(2.0, -1.0), *fifth, *q]) == [
        2.0 * (x + y) - 1 for x, y in zip(low + high, more, strict=True)
    ]
    signed = [0, 1, 127, 128, 255, *[3] * 27]
    assert read("Q8_0", [*f16(0.25), *signed])[:6] == [0, 0.25, 31.75, -32.0, -0.25, 0.75]


def test_blocks_of_256_by_hand() -> None:
    # Scales 1, 2, 3, 4 and 33, 0, 0, 0; minima 5, 0, 0, 0 and 0, 0, 0, 17, as 6 bits.
    scales = [1 | 2 << 6, 2, 3, 4, 5, 0, 0, 1 << 6, 1, 0, 0, 1 << 4]
    q = [7 | 9 << 4] * 32 + [1 | 2 << 4] * 32 + [3 | 4 << 4] * 32 + [5 | 6 << 4] * 32
    groups = [7, 9, 1, 2, 3, 4, 5, 6]
    factor, least = [1, 2, 3, 4, 33, 0, 0, 0], [5, 0, 0, 0, 0, 0, 0, 17]
    found = read("Q4_K", [*f16(0.5, 2.0), *scales, *q])
    assert found == [0.5 * s * g - 2 * m for s, g, m in zip(factor, groups, least, strict=True) for _ in range(32)]
    fifth = [0b00000001] + [0] * 30 + [0b10010000]
    found = read("Q5_K", [*f16(0.5, 2.0), *scales, *fifth, *q])
    assert found[0] == 0.5 * (7 + 16) - 10 and found[1] == 0.5 * 7 - 10
    assert found[4 * 32 + 31] == 0.5 * 33 * (3 + 16) and found[4 * 32 + 30] == 0.5 * 33 * 3
    low, high = [0x21] * 64 + [0x43] * 64, [0b11100100] * 64
    found = read("Q6_K", [*low, *high, *[1, 255] * 8, *f16(0.5)])
    halves = ((1, 17, 2 + 32, 2 + 48), (3, 19, 4 + 32, 4 + 48))
    assert found == [0.5 * sign * (q - 32) for part in halves for q in part for sign in (1, -1) for _ in range(16)]
    found = read("Q2_K", [*[2 | 3 << 4] * 16, *[0b11100100] * 64, *f16(0.5, 1.0)])
    assert found == [1.0 * q - 3 for _ in range(2) for q in range(4) for _ in range(32)]
    found = read("Q3_K", [*[0b00001111] * 32, *[0b11100100] * 64, *[1] * 8, *[0b10] * 4, *f16(0.5)])
    signs = [0.5 * (1 + 32 - 32)] * 4 + [0.5 * (1 - 32)] * 4 + [0.5 * (0 - 32)] * 8
    steps = [q - 4 + 4 * (part == 0) for part in range(2) for q in range(4) for _ in range(2)]
    assert found == [s * q for s, q in zip(signs, steps, strict=True) for _ in range(16)]


def test_plain_numbers() -> None:
    for name, dtype in (("F32", "<f4"), ("F16", "<f2"), ("F64", "<f8")):
        assert read(name, list(np.array([-1.5], dtype=dtype).tobytes())) == [-1.5]
    assert read("BF16", list(np.array([-1.5], dtype="<f4").tobytes()[2:])) == [-1.5]


@pytest.mark.parametrize("name", sorted(set(BY_NAME) - {"F64"}))
def test_the_same_as_llama_cpp(name: str) -> None:
    gguf = import_module("gguf")
    kind = BY_NAME[name]
    raw = np.random.default_rng(0).integers(0, 256, (500, kind.bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):  # some of the random scales are infinite
        found = kind.read(raw)
        wanted = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
    assert found.dtype == np.float32
    assert found.shape == wanted.reshape(len(raw), -1).shape == (500, kind.size)
    finite = np.isfinite(wanted.reshape(found.shape))
    assert finite.mean() > 0.5
    np.testing.assert_allclose(found[finite], wanted.reshape(found.shape)[finite], rtol=1e-6)


def test_sizes_are_llama_cpps() -> None:
    gguf = import_module("gguf")
    for number, kind in KINDS.items():
        theirs = gguf.GGMLQuantizationType(number)
        assert theirs.name == kind.name
        assert gguf.GGML_QUANT_SIZES[theirs] == (kind.size, kind.bytes)
