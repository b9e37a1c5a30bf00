"""The closed form of a systolic array, against one that is stepped cycle by cycle and computes the product itself."""

from __future__ import annotations

import numpy as np
import pytest

from scrimp.machines.accelerators.architecture import accelerator
from scrimp.machines.accelerators.dataflows.matmul import systolic_cycles
from scrimp.machines.accelerators.traces import MatmulTrace


def stepped(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, int]:
    """One tile, output-stationary: a [R, K] enters at the left and b [K, C] at the top, skewed; -> product, cycles.

    Each element multiplies what its neighbors passed on in the cycle before; nothing here knows the closed form.
    """
    (rows, inner), columns = a.shape, b.shape[1]
    right, down, sums = np.full((rows, columns), np.nan), np.full((rows, columns), np.nan), np.zeros((rows, columns))
    done, cycle = 0, 0
    while done < rows * columns * inner:
        right, down = np.roll(right, 1, 1), np.roll(down, 1, 0)
        right[:, 0] = [a[r, cycle - r] if 0 <= cycle - r < inner else np.nan for r in range(rows)]
        down[0] = [b[cycle - c, c] if 0 <= cycle - c < inner else np.nan for c in range(columns)]
        works = ~np.isnan(right) & ~np.isnan(down)
        sums[works] += (right * down)[works]
        done, cycle = done + int(works.sum()), cycle + 1
    return sums, cycle


@pytest.mark.parametrize(("rows", "inner", "columns"), [(4, 3, 4), (9, 7, 5), (3, 1, 2), (8, 6, 4)])
def test_closed_form_is_an_array_stepped_cycle_by_cycle(rows: int, inner: int, columns: int) -> None:
    side, across = 4, 2
    described = accelerator("systolic")
    machine = described.model_copy(
        update={"array": described.array.model_copy(update={"rows": side, "columns": across})}
    )
    draw = np.random.default_rng(rows)
    a, b = draw.integers(-3, 4, (rows, inner)).astype(float), draw.integers(-3, 4, (inner, columns)).astype(float)
    # An array that is too large for the product has zeros in the rest of it, which take their cycles too.
    whole_a = np.pad(a, ((0, -rows % side), (0, 0)))
    whole_b = np.pad(b, ((0, 0), (0, -columns % across)))
    product, total = np.zeros((len(whole_a), whole_b.shape[1])), 0
    for top in range(0, len(whole_a), side):
        for left in range(0, whole_b.shape[1], across):
            part, taken = stepped(whole_a[top : top + side], whole_b[:, left : left + across])
            product[top : top + side, left : left + across] = part
            total += taken
    np.testing.assert_array_equal(product[:rows, :columns], a @ b)
    assert systolic_cycles(MatmulTrace(rows=rows, inner=inner, columns=columns), machine) == total
