"""Products of sparse matrices in three dataflows: `python benchmarks/spgemm.py` -> evidence/spgemm.json.

    python benchmarks/spgemm.py --sizes 500 --most 1e5 --out /tmp/spgemm.json     # does it run?
    python benchmarks/spgemm.py --again                                           # rows that are there are run again

C = A B of two N x N matrices in float64: `uniform` draws entries independently, `rmat` as a graph whose degrees
follow a power law (quadrants of 0.57, 0.19, 0.19, 0.05). A row has the seconds of the processor, the least of up to
three tries, of each dataflow, of scipy and of torch.sparse, and the bytes of the closed forms. What would take more
than `--most` products (the inner product: 64 times as many lookups) is left out. Rows are written as they come.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import scipy
import scipy.sparse
import torch

from scrimp.folder import environment
from scrimp.sparse.products import CSR, DATAFLOWS, Traffic, spgemm
from scrimp.sparse.products.dataflows import TESTED
from scrimp.sparse.products.traffic import count

EVIDENCE: Final = Path(__file__).resolve().parents[1] / "evidence" / "spgemm.json"
DENSITIES: Final = (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
QUADRANTS: Final = (0.57, 0.19, 0.19, 0.05)


def uniform(size: int, density: float, seed: int) -> Any:
    """Entries that are drawn independently."""
    made: Any = scipy.sparse.random  # its stub knows fewer parameters
    return made(size, size, density, format="csr", random_state=seed)


def rmat(size: int, density: float, seed: int) -> Any:
    """Entries that fall into a quadrant, a quadrant of it, and so on. Those that fall together count once."""
    draw = np.random.default_rng(seed)
    levels = int(np.ceil(np.log2(size)))
    found = np.zeros(0, dtype=np.int64)
    wanted = round(density * size * size)
    for _ in range(20):
        part = draw.choice(4, (wanted, levels), p=QUADRANTS)
        powers = 2 ** np.arange(levels)
        row, col = (part >> 1) @ powers, (part & 1) @ powers
        kept = (row < size) & (col < size)
        found = np.unique(np.concatenate([found, row[kept] * size + col[kept]]))
        if len(found) >= wanted:
            break
    found = np.sort(draw.permutation(found)[:wanted])
    return scipy.sparse.csr_array((draw.random(len(found)), (found // size, found % size)), shape=(size, size))


def least(job: Callable[[], Any]) -> float:
    """Seconds of the processor: of three tries, or of one if it is long."""
    best = np.inf
    for _ in range(3):
        before = time.process_time()
        job()
        best = min(best, time.process_time() - before)
        if best > 2:
            break
    return best


def measured(kind: str, size: int, density: float, most: float) -> dict[str, Any] | None:
    """One row; nothing if there are too many products."""
    make = {"uniform": uniform, "rmat": rmat}[kind]
    left, right = make(size, density, 0), make(size, density, 1)
    a, b = CSR.of_scipy(left), CSR.of_scipy(right)
    if count(a, b) > most:
        return None
    lookups = size * b.entries
    seconds: dict[str, float] = {}
    want = (left @ right).tocsr()
    for name in DATAFLOWS:
        if name == "inner" and lookups > most * 64:
            continue
        multiply = partial(spgemm, a, b, cast(Any, name))
        c = multiply()
        if c.entries != want.nnz or abs(c.values.sum().item() - want.data.sum()) > 1e-9 * abs(want.data.sum()):
            raise ValueError(f"{name} differs from scipy on {kind} {size} {density}")
        seconds[name] = least(multiply)
    pair = a.torch(), b.torch()
    seconds["scipy"] = least(lambda: left @ right)
    seconds["torch.sparse"] = least(lambda: torch.sparse.mm(*pair))
    moved = Traffic.of(a, b, want.nnz)
    return {
        "entries": [moved.a, moved.b, moved.c], "products": moved.products, "seconds": seconds,
        "bytes": {"least": moved.least, "outer": moved.outer, "gustavson": moved.gustavson(),
                  "gustavson, cached": moved.gustavson(moved.cached), "inner": moved.inner(),
                  f"inner, tiles of {TESTED} rows": moved.inner(high=TESTED, wide=size)},
    }  # fmt: skip


def main() -> None:
    """All rows that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 5000, 20000])
    parser.add_argument("--most", type=float, default=1e7, help="products")
    parser.add_argument("--again", action="store_true", help="run rows that are there again")
    parser.add_argument("--out", type=Path, default=EVIDENCE)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, Any] = json.loads(given.out.read_text())["rows"] if given.out.exists() else {}
    for size in given.sizes:
        for kind in ("uniform", "rmat"):
            for density in DENSITIES:
                key = f"{kind}/{size}/{density:g}"
                if (key in rows and not given.again) or density * size * size < size / 10:
                    continue
                row = measured(kind, size, density, given.most)
                if row is None:
                    break
                rows[key] = row
                print(key, row["products"], {k: round(v, 5) for k, v in row["seconds"].items()}, flush=True)
                about = {k: v for k, v in environment().items() if k != "command"}
                about["scipy"] = scipy.__version__
                given.out.write_text(json.dumps({"environment": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
