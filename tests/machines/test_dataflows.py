"""Dataflows of single accelerators against counts by hand and by brute force."""

from __future__ import annotations

from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scrimp.errors import UserError
from scrimp.machines.accelerators.architecture import Accelerator, accelerator
from scrimp.machines.accelerators.dataflows import dota, elsa, gpu, outerspace, sanger, spatten, vitcod
from scrimp.machines.accelerators.report import simulate
from scrimp.machines.accelerators.traces import AttentionTrace, MatmulTrace, Predictor, ProductTrace

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
    trace = AttentionTrace.of(bits, head_width=16, predictor="vitcod")
    assert vitcod.split(trace, machine) == [vitcod.Layer(1, 1, 8, 3, 16, ratio=2 / 3)]
    # The paper's machine looks at all heads.
    assert vitcod.split(trace, accelerator("vitcod"))[0].sparse == 0


def test_tiles_read_what_a_loop_over_them_reads() -> None:
    n, d, fits = 100, 8, 640
    keys = ceil(fits / (4 * d))
    moved = 2 * n * d  # keys and values, once
    for _ in range(0, n, keys):  # for each block of keys all queries, and sums, maxima and outputs in and out
        moved += n * d + 2 * n * d + 4 * n
    assert gpu.flash_numbers(n, d, fits) == moved


def test_tiles_of_another_sequences_keys() -> None:
    n, keys, d, fits = 40, 100, 8, 640
    block = ceil(fits / (4 * d))
    moved = 2 * keys * d + sum(3 * n * d + 4 * n for _ in range(0, keys, block))
    assert gpu.flash_numbers(n, d, fits, keys=keys) == moved
    report = simulate([AttentionTrace.dense(1, n, keys, d)], resized("a100_flash", sram=2 * fits))
    assert report.bytes["memory"] == 2 * moved
    with pytest.raises(UserError, match="narrower heads"):
        simulate([AttentionTrace.dense(1, n, keys, 8)], resized("a100_flash", sram=60))


def resized(name: str, **sizes: int) -> Accelerator:
    """A machine with other buffers."""
    machine = accelerator(name)
    other = {key: machine.buffers[key].model_copy(update={"bytes": size}) for key, size in sizes.items()}
    return machine.model_copy(update={"buffers": {**machine.buffers, **other}})


@pytest.mark.parametrize(("name", "most"), [("a3", 320), ("a3_aggressive", 320), ("elsa", 512), ("elsa_base", 512),
                                            ("spatten", 2048)])  # fmt: skip
def test_a_design_that_holds_all_keys_refuses_more(name: str, most: int) -> None:
    simulate([AttentionTrace.dense(1, 2, most, 64)], accelerator(name))
    with pytest.raises(UserError, match=rf"holds {most:,} keys of 64 numbers .*not {most + 1:,}.*like: {name}"):
        simulate([AttentionTrace.dense(1, 2, most + 1, 16)], accelerator(name))
    with pytest.raises(UserError, match=r"heads of 64 numbers at most, not 65"):
        simulate([AttentionTrace.dense(1, 2, 8, 65)], accelerator(name))
    machine = accelerator(name)
    doubled = {key: 2 * machine.buffers[key].bytes for key in ("keys", "values")}
    simulate([AttentionTrace.dense(1, 2, most + 1, 64)], resized(name, **doubled))


def test_spatten_holds_what_pruning_leaves() -> None:
    bits = np.zeros((1, 2, 3000), bool)
    bits[..., :2048] = True
    assert simulate([AttentionTrace.of(bits, head_width=64)], accelerator("spatten")).parts["ranking"] > 0


def test_dota_fetches_again_what_does_not_stay() -> None:
    bits = mask(2, 8, 20, 0.3)
    trace = AttentionTrace.of(bits, head_width=16)
    d, item = 16, 2
    every = 2 * (2 * 8 + 2 * 20) * d * item
    assert simulate([trace], accelerator("dota")).bytes["memory"] == every
    # Half of the memory holds five of the twenty keys, with their values.
    small = resized("dota", sram=2 * 5 * 2 * d * item)
    unions = sum(int(bits[h, i : i + 4].any(0).sum()) for h in range(2) for i in (0, 4))
    moved = (2 * (2 * 8 + 2 * 5) + 2 * unions * 15 / 20) * d * item
    assert simulate([trace], small).bytes["memory"] == pytest.approx(moved)


def test_dota_detects_as_its_core_did() -> None:
    wide = AttentionTrace.of(mask(1, 8, 8, 0.5), head_width=16, predictor=Predictor(kind="dota", bits=7, rank=8))
    assert simulate([wide], accelerator("dota")).work["array8"] == 8 * 16 * 8 + 16 * 64 + 64 * 8


def test_sanger_streams_keys_for_64_queries_at_a_time() -> None:
    trace = AttentionTrace.of(mask(2, 130, 70, 0.2), head_width=16)
    report = simulate([trace], accelerator("sanger"))
    moved = sum(2 * 70 for _ in range(0, 130, 64)) + 2 * 130
    assert report.bytes["memory"] == 2 * moved * 16 * 2
    assert report.parts["predict"] == 2 * 3 * 2 * 16 + 128
    assert any("how large sanger's buffers are" in note for note in report.notes)


def test_tiles_that_are_not_packed_wait_for_their_fullest_row() -> None:
    bits = mask(2, 70, 150, 0.3)
    count = sum(max(ceil(bits[h, i, s : s + 64].sum() / 16) for i in range(first, min(first + 64, 70)))
                for h in range(2) for first in (0, 64) for s in (0, 64, 128))  # fmt: skip
    assert sanger.unpacked(AttentionTrace.of(bits, head_width=8), 64, 16) == count


def test_vitcod_does_as_many_heads_at_once_as_its_buffers_hold() -> None:
    bits = np.ones((4, 8, 8), bool)
    trace = AttentionTrace.of(bits, head_width=16, predictor="vitcod")
    assert [layer.heads for layer in vitcod.split(trace, accelerator("vitcod"))] == [4]
    half = vitcod.split(trace, resized("vitcod", keys=2 * 8 * 16))
    assert [(layer.heads, layer.ratio, layer.parts) for layer in half] == [(2, 1.0, 1)] * 2
    whole = simulate([trace], accelerator("vitcod"))
    assert simulate([trace], resized("vitcod", keys=2 * 8 * 16)).bytes["memory"] > whole.bytes["memory"]
    # A third of a head's keys: queries are loaded three times.
    third = resized("vitcod", keys=3 * 16)
    assert [layer.parts for layer in vitcod.split(trace, third)] == [3] * 4
    report = simulate([trace], third)
    assert report.bytes["memory"] == 4 * 8 * 16 * (3 + 1 + 1)
    assert report.parts["loads"] == 4 * 8 * (3 + 1 + 1)  # a token's numbers take a cycle
    # The released simulator looks at no buffer.
    assert vitcod.split(trace, resized("vitcod_released", keys=1))[0].heads == 4


def test_vitcod_loads_all_heads_of_a_model_that_mixes_none() -> None:
    bits = np.ones((4, 8, 8), bool)
    loaded = {}
    for said in (Predictor(), Predictor(kind="vitcod"), Predictor(kind="vitcod", ratio=0.5)):
        report = simulate([AttentionTrace.of(bits, head_width=16, predictor=said)], accelerator("vitcod"))
        loaded[said] = report.bytes["memory"] / (4 * 8 * 16)
        assert (report.parts["decode"] > 0) == (said.kind == "vitcod")
    assert list(loaded.values()) == pytest.approx([3, 7 / 3, 2])


def test_rows_of_many_lists_are_merged_in_passes() -> None:
    few, many = (ProductTrace(left=np.array([1]), right=np.array([1]), ways=np.array([ways, 2]),
                              merged=np.array([500, 7]), nonzeros=1) for ways in (170, 171))  # fmt: skip
    machine = accelerator("outerspace_events")
    assert outerspace.merged_again(few, machine) == 0
    assert outerspace.merged_again(many, machine) == 500
    assert simulate([many], machine).bytes["memory"] - simulate([few], machine).bytes["memory"] == 24 * 500


@pytest.mark.parametrize(("count", "rank"), [(6, 2), (7, 7), (9, 5), (1, 1)])
def test_quickselect_on_average(count: int, rank: int) -> None:
    """Against every order of its pivots, by recursion."""

    def average(n: int, k: int) -> tuple[float, float]:
        parts = [average(p - 1, k) if k < p else average(n - p, k - p) if k > p else (0.0, 0.0)
                 for p in range(1, n + 1)]  # fmt: skip
        return 1 + sum(a for a, _ in parts) / n, n + sum(b for _, b in parts) / n

    assert spatten.selected(count, rank) == pytest.approx(average(count, rank))


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
