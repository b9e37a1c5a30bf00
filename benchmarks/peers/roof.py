"""The machine's float32 matrix product rate: prints {size: best FLOP/s} of square products as JSON.

The best of torch's two libraries, MKL and oneDNN, whichever a trainer uses.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch


def best_rate(size: int, seconds: float) -> float:
    """The fastest of the products that fit into `seconds`, at least two of each library, in FLOP/s."""
    a, b, c = torch.rand(size, size), torch.rand(size, size), torch.empty(size, size)
    best, done, end = 0.0, 0, time.perf_counter() + seconds
    library: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    default = library.fp32_precision
    while done < 4 or time.perf_counter() < end:
        library.fp32_precision = "bf16" if done % 2 else default
        began = time.perf_counter()
        torch.mm(a, b, out=c)
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
        done += 1
    library.fp32_precision = default
    return best


if __name__ == "__main__":
    print(json.dumps({size: best_rate(int(size), float(sys.argv[1])) for size in sys.argv[2:]}))
