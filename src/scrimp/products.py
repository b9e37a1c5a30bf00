"""float32 matrix products by oneDNN where torch's default, MKL, holds a processor back.

On AMD processors with AVX-512 MKL takes its AVX2 kernels and reaches half of what the cores can do; oneDNN takes
AVX-512. torch hands float32 products to oneDNN when it is allowed to round their inputs to bfloat16, which oneDNN does
only with AMX tiles; AMD has none, so the products stay float32. That is not taken on trust: `exact` multiplies numbers
that bfloat16 cannot hold and compares every bit. `SCRIMP_PRODUCTS=default` leaves torch alone.

The choice depends on the processor and not on a timing, so that a resumed run adds in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


@contextmanager
def fast_products() -> Iterator[bool]:
    """Inside, float32 products on this CPU run by oneDNN if that is faster and exact; yields whether they do."""
    setting: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if os.environ.get("SCRIMP_PRODUCTS") == "default" or setting is None or not held_back():
        yield False
        return
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        if not exact():
            setting.fp32_precision = before
        yield setting.fp32_precision == "bf16"
    finally:
        setting.fp32_precision = before


def held_back() -> bool:
    """Whether this is an AMD processor with AVX-512 and without AMX, and torch has both libraries."""
    cpu: Any = torch.cpu
    try:
        amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
        wide, tiles = cpu._is_avx512_supported(), cpu._is_amx_tile_supported()
    except (OSError, AttributeError):
        return False
    return bool(
        amd and wide and not tiles and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    )


def exact() -> bool:
    """Whether products of numbers with 13 significant bits come out to the last bit, in the shapes that training uses.

    Rounded to bfloat16's 8 bits, 1 + 2^-12 is 1.
    """
    fine = 1 + 2.0**-12
    for rows, inner, columns in ((1, 64, 64), (64, 96, 33), (257, 512, 128)):
        a, b = torch.full((rows, inner), fine), torch.ones(columns, inner)
        expected = torch.full((rows, columns), inner * fine)
        batch = torch.bmm(a.expand(2, rows, inner).contiguous(), b.t().expand(2, inner, columns).contiguous())
        results = (a @ b.t(), torch.addmm(torch.zeros(columns), a, b.t()), batch[1], (b @ a.t()).t())
        if not all(torch.equal(result, expected) for result in results):
            return False
    return True
