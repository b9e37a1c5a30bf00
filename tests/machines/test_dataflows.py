"""Dataflows of single accelerators against counts by hand and by brute force."""

from __future__ import annotations

from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scrimp.errors import UserError
from scrimp.machines.accelerators.architecture import accelerator
from scrimp.machines.accelerators.dataflows import dota, elsa, gpu, outerspace, sanger, vitcod
from scrimp.machines.accelerators.report import simulate
from scrimp.machines.accelerators.traces import AttentionTrace, MatmulTrace, ProductTrace

ATTENDS = ("vitcod_released", "vitcod", "sanger", "sanger_v1", "sanger_v2", "dota", "a3", "a3_aggressive", "elsa",
           "elsa_base", "spatten", "v100", "a100_flash")  # fmt: skip


def mask(heads: int, tokens: int, keys: int, density: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((heads, tokens, keys)) < density


def test_a_trace_counts_its_mask() -> None:
    bits = mask(2, 5, 11, 0.4)
    trace = AttentionTrace.of(bits, head_width=8, predictor="elsa")
    assert trace.kept == bits.sum() and (trace.columns == bits.sum(1)).all()
    assert (trace.rows == bits.sum(2)).all() and trace.predictor.kind == "elsa"
    banks = np.array([[[bits[h, i, b::4].sum() for b in range(4)] for i in range(5)] for h in range(2)])
    assert (trace.banks(4) == banks).all()
    runs = np.array([[[bits[h, i, s : s + 3].sum() for s in range(0, 11, 3)] for i in range(5)] for h in range(2)])
    assert (trace.segments(3) == runs).all()
    short = AttentionTrace.of(bits, head_width=8, real=4).trimmed()
    assert short.kept == bits[:, :4, :4].sum() and short.queries == 4
    merged = AttentionTrace.of(bits.reshape(1, 2, 5, 11), head_width=8)
    assert (merged.rows == trace.rows).all()


@pytest.mark.parametrize("causal", [False, True])
def test_dense_attention_needs_no_mask(causal: bool) -> None:
    trace = AttentionTrace.dense(2, 6, 6, 8, causal=causal)
    bits = np.broadcast_to(np.tril(np.ones((6, 6), bool)) if causal else np.ones((6, 6), bool), (2, 6, 6))
    assert (trace.full() == bits).all() and (trace.columns == bits.sum(1)).all()


def test_a_mask_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match="boolean"):
        AttentionTrace.of(np.ones((2, 3, 3)), head_width=4)
    with pytest.raises(UserError, match="boolean"):
        AttentionTrace.of(np.ones((3, 3), bool), head_width=4)


def test_a_product_counts_its_scalar_products() -> None:
    a, b = mask(1, 6, 5, 0.4, 1)[0], mask(1, 5, 7, 0.5, 2)[0]

    def csr(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.concatenate([[0], matrix.sum(1).cumsum()]), np.nonzero(matrix)[1]

    trace = ProductTrace.of(csr(a), csr(b), 7)
    product = a.astype(int) @ b.astype(int)
    assert trace.products == product.sum() == trace.merged.sum()
    assert (trace.merged == product.sum(1)).all() and trace.nonzeros == (product > 0).sum()
    assert trace.entries == (a.sum(), b.sum()) and (trace.ways == a.sum(1)).all()
    every = 12 * (a.sum() + b.sum() + (product > 0).sum())
    assert outerspace.bytes_moved(trace, "outer") == every + 24 * trace.products
    assert outerspace.bytes_moved(trace, "row", reuse=1.0) == every
    report = simulate([trace], accelerator("outerspace_events"))
    assert report.bytes["memory"] == every + 24 * trace.products


@pytest.mark.parametrize("name", ATTENDS)
def test_more_kept_keys_never_take_less(name: str) -> None:
    machine, few = accelerator(name), mask(4, 70, 70, 0.1)
    more = few | mask(4, 70, 70, 0.3, 1)
    reports = [simulate([AttentionTrace.of(m, head_width=32)], machine) for m in (few, more)]
    if name.startswith("vitcod"):  # It reloads queries where no column is dense, so that denser masks may load less.
        assert reports[0].parts["scores"] <= reports[1].parts["scores"]
    else:
        assert 0 < reports[0].cycles <= reports[1].cycles
    twice = simulate([AttentionTrace.of(few, head_width=32)] * 2, machine)
    assert twice.cycles == pytest.approx(2 * reports[0].cycles)
    assert all(share <= 1 + 1e-9 for report in reports for share in report.utilization.values())


@pytest.mark.parametrize("name", [*ATTENDS, "a3_conservative", "dota_scaled", "tx2", "xeon", "a100"])
def test_a_machine_takes_a_mask_with_nothing_in_it(name: str) -> None:
    report = simulate([AttentionTrace.of(np.zeros((2, 9, 9), bool), head_width=8)], accelerator(name))
    assert np.isfinite(report.cycles)


def test_sub_rows_by_brute_force() -> None:
    bits = mask(2, 7, 150, 0.3)
    count = sum(ceil(bits[h, i, s : s + 64].sum() / 16) for h in range(2) for i in range(7) for s in (0, 64, 128))
    trace = AttentionTrace.of(bits, head_width=8)
    assert sanger.subrows(trace, 64, 16).sum() == count
    assert sanger.balance(trace, 64, 16) == pytest.approx(bits.sum() / 16 / count)


def test_elsa_waits_for_the_fullest_bank() -> None:
    bits = np.zeros((1, 2, 64), bool)
    bits[0, 0, 0:40:4] = True  # ten keys of bank 0
    report = simulate([AttentionTrace.of(bits, head_width=64)], accelerator("elsa"))
    # Hashes of 64 keys; then ten cycles, and the division's four.
    assert report.cycles == 3 * 64 + 10 + 4
    assert simulate([AttentionTrace.dense(24, 512, 512, 64)], accelerator("elsa_base")).cycles == 2 * 512 * 128
    assert elsa.head_cycles(AttentionTrace.dense(1, 64, 512, 64), accelerator("elsa"))[0] == 3 * 512 + 64 * 128


def test_a3_is_as_slow_as_its_slowest_stage() -> None:
    dense = AttentionTrace.dense(1, 320, 320, 64)
    assert simulate([dense], accelerator("a3")).cycles == 320 * 320 + 2 * 320 + 27
    trace = AttentionTrace.of(mask(1, 320, 320, 0.02), head_width=64, candidates=np.full((1, 320), 100))
    most = int(trace.rows.max())
    assert simulate([trace], accelerator("a3_aggressive")).cycles == 320 * 100 + 40 + 2 * most + 27


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.floats(0.05, 0.95))
def test_the_order_of_keys_serves_every_query_once(seed: int, keys: int, density: float) -> None:
    bits = mask(1, 4, keys, density, seed)
    order = dota.issued(bits, 4)
    assert order.fetched == bits.any(1).sum() <= order.apart == bits.sum()
    # A step gives each query one key: no fewer steps than the longest row, no more than keys.
    assert bits.sum(2).max() <= order.steps <= order.fetched


def test_keys_of_disjoint_queries_share_a_step() -> None:
    bits = np.array([[[1, 0, 1, 0], [1, 0, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0]]], bool)
    assert dota.issued(bits, 4) == dota.Issue(steps=2, fetched=3, apart=8)


def test_columns_that_most_keep_are_dense() -> None:
    bits = np.zeros((3, 8, 8), bool)
    bits[:, :, 1] = True
    bits[0, 3, 5] = True
    machine = accelerator("vitcod_released")
    assert vitcod.split(AttentionTrace.of(bits, head_width=16), machine) == [vitcod.Layer(1, 1, 8, 3, 16)]
    # The paper's machine looks at all heads.
    assert vitcod.split(AttentionTrace.of(bits, head_width=16), accelerator("vitcod"))[0].sparse == 0


def test_tiles_read_what_a_loop_over_them_reads() -> None:
    n, d, fits = 100, 8, 640
    keys = ceil(fits / (4 * d))
    moved = 2 * n * d  # keys and values, once
    for _ in range(0, n, keys):  # for each block of keys all queries, and sums, maxima and outputs in and out
        moved += n * d + 2 * n * d + 4 * n
    assert gpu.flash_numbers(n, d, fits) == moved


def test_two_of_four_help_products_but_not_bytes() -> None:
    machine = accelerator("a100_tensor_cores")
    large, small = (MatmulTrace(rows=rows, inner=4096, columns=4096) for rows in (65536, 1))
    gains = []
    for dense in (large, small):
        sparse = MatmulTrace(rows=dense.rows, inner=4096, columns=4096, two_four=True)
        gains.append(simulate([sparse], machine).speedup(simulate([dense], machine)))
    assert gains[0] == pytest.approx(2)
    assert gains[1] == pytest.approx(1 / 0.5625, rel=0.01)


def test_what_a_machine_does_not_do_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="outerspace does no attention"):
        simulate([AttentionTrace.dense(1, 4, 4, 4)], accelerator("outerspace"))
    with pytest.raises(UserError, match="nothing to simulate"):
        simulate([], accelerator("elsa"))
