"""The models of time and memory that plans rest on."""

from __future__ import annotations

import math
import platform
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scrimp.errors import UserError
from scrimp.machines.machine import PRODUCTS, STREAM, Machine, alike, machine
from scrimp.machines.memory import MIB, CachingAllocator, on_cuda, reserved, resident
from scrimp.machines.rates import Rates, interpolated
from scrimp.machines.timing import fuse, roofline, step_seconds
from scrimp.ops import Op
from scrimp.trace import Block

RATES = Rates(
    machine={}, overhead=1e-6, step=1e-3, resident=10**8,
    products=[("float32", lay, m, n, k, 1e9 * m * n * k) for lay in ("nn", "nt", "tn")
              for m in (1, 100) for n in (1, 100) for k in (1, 100)],
    attention=[("float32", way, t, d, 5e9) for way in ("forward", "backward") for t in (1, 100) for d in (1, 64)],
    stream=[("elementwise", 1, 1e9), ("elementwise", 10**9, 1e9), ("fill", 1, 2e9)],
    fresh=[(MIB, 1e9), (100 * MIB, 1e9)],
)  # fmt: skip
GPU = Machine(name="any", device="cuda", memory=1 << 34, flops={"float32": 1e12, "bfloat16": 4e12}, bandwidth=1e11)


def op(name: str = "aten.add", flops: float = 0.0, read: int = 0, written: int = 0, fresh: int = 0,
       shape: tuple[int, ...] = (1,), layout: str = "", dtype: torch.dtype = torch.float32,
       module: str = "blocks.0.mlp", phase: str = "forward", grouped: bool = False) -> Op:  # fmt: skip
    return Op(name, module, phase, flops, read, written, fresh, shape, layout, dtype, grouped)


def test_interpolation_goes_through_its_points_and_is_geometric_between() -> None:
    grid = {(1, 1): 1.0, (1, 100): 10.0, (100, 1): 100.0, (100, 100): 1000.0}
    assert all(interpolated(grid, point) == pytest.approx(value) for point, value in grid.items())
    assert interpolated(grid, (10, 10)) == pytest.approx(math.sqrt(1.0 * 1000.0))
    assert interpolated(grid, (10, 1)) == pytest.approx(10.0)
    assert interpolated(grid, (1e9, 1e9)) == pytest.approx(1000.0)
    assert interpolated({(7,): 3.0}, (1,)) == pytest.approx(3.0)


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_interpolation_stays_between_its_points(a: int, b: int) -> None:
    grid = {(1, 1): 1.0, (1, 1000): 4.0, (1000, 1): 2.0, (1000, 1000): 3.0}
    assert 0.999 <= interpolated(grid, (a, b)) <= 4.001


def test_seconds_of_a_product_of_attention_and_of_the_rest() -> None:
    product = op("aten.mm", 2000.0, 10, 10, 0, (1, 10, 10, 10), "nn")
    assert RATES.seconds(product) == pytest.approx(1e-6 + 2000 / 1e12)
    attention = op("aten._scaled_dot_product_flash_attention_for_cpu", 5000.0, shape=(2, 10, 10, 8))
    assert RATES.seconds(attention) == pytest.approx(1e-6 + 5000 / 5e9)
    assert RATES.seconds(op(read=1000, written=1000)) == pytest.approx(1e-6 + 2000 / 1e9)
    assert RATES.seconds(op("aten.zero", written=1000)) == pytest.approx(1e-6 + 1000 / 2e9)
    fresh = op(read=2 * MIB, written=2 * MIB, fresh=2 * MIB)
    assert RATES.seconds(fresh) == pytest.approx(1e-6 + 4 * MIB / 1e9 + 2 * MIB / 1e9)
    assert RATES.seconds(op("aten.view")) == pytest.approx(1e-6)
    assert RATES.seconds(replace(product, dtype=torch.float16)) > 0
    other = op("aten.convolution", 1e15, 10, 10)
    assert RATES.seconds(other) == pytest.approx(1e-6 + 1e15 / RATES.flops()["float32"])


def test_rates_round_trip(tmp_path: pytest.TempPathFactory) -> None:
    from pathlib import Path

    file = Path(str(tmp_path)) / "rates.json"
    file.write_text(RATES.text())
    assert Rates.read(file) == RATES
    file.write_text("{}")
    assert Rates.read(file) is None
    assert Rates.read(Path(str(tmp_path)) / "missing.json") is None


def test_the_roofline_takes_the_slower_of_computing_and_moving() -> None:
    assert roofline(op(flops=1e12, layout="nn"), GPU) == pytest.approx(1 / PRODUCTS)
    assert roofline(op(read=10**11), GPU) == pytest.approx(1 / STREAM)
    assert roofline(op(flops=1e12, dtype=torch.bfloat16), GPU) == pytest.approx(0.25 / PRODUCTS)
    assert roofline(op(flops=1e12, dtype=torch.float16), GPU) == pytest.approx(1 / PRODUCTS)


def test_a_gpu_is_never_faster_than_its_launches() -> None:
    many = [op()] * 1000
    assert step_seconds(many, GPU)[0] == pytest.approx(1000 * GPU.overhead)
    total, slowest = step_seconds([op("aten.mm", 1e12, layout="nn")] * 2 + many, GPU)
    assert total == pytest.approx(2 / PRODUCTS)
    assert slowest[0] == ("aten.mm", pytest.approx(2 / PRODUCTS))


def test_fused_operators_read_and_write_once() -> None:
    chain = [op(read=20, written=10), op("aten.mul", read=15, written=10), op("aten.mm", 5.0), op(read=4, written=4)]
    found = [(o.name, o.read, o.written) for o in fuse(chain)]
    assert found == [("aten.add", 25, 10), ("aten.mm", 0, 0), ("aten.add", 4, 4)]


def test_what_is_not_in_one_block_is_not_fused() -> None:
    update = [op(module="", phase="update")] * 3
    apart = [op(module="blocks.0.mlp"), op(module="blocks.1.mlp"), op(module="norm"), op(module="norm")]
    assert len(fuse(update)) == 3 and len(fuse(apart)) == 4


def test_the_caching_allocator_by_hand() -> None:
    cache = CachingAllocator()
    cache.take(0, 1000)
    assert cache.reserved == 2 * MIB
    cache.take(1, MIB)
    assert cache.reserved == 2 * MIB, "the rest of a small segment is used"
    cache.take(2, 3 * MIB)
    assert cache.reserved == 22 * MIB
    cache.take(3, 12 * MIB)
    assert cache.reserved == 22 * MIB, "and so is that of a large one"
    cache.take(4, 13 * MIB + 1)
    assert cache.reserved == 36 * MIB, "10 MiB and more get a segment of their own, in steps of 2 MiB"
    cache.give(4)
    cache.take(5, 13 * MIB)
    assert cache.reserved == 36 * MIB, "what is freed is used again"
    cache.give(2)
    cache.give(3)
    cache.take(6, 19 * MIB)
    assert cache.reserved == 36 * MIB, "neighbors that are free are one block"


@given(st.lists(st.tuples(st.integers(1, 30 * MIB), st.booleans()), max_size=40))
def test_the_caching_allocator_never_reserves_less_than_is_live(steps: list[tuple[int, bool]]) -> None:
    cache, held, live, most = CachingAllocator(), [], 0, 0
    for i, (size, give) in enumerate(steps):
        if give and held:
            key, old = held.pop(size % len(held))
            cache.give(key)
            live -= old
        cache.take(i, size)
        held.append((i, size))
        live += size
        most = max(most, live)
        assert cache.reserved >= live
    for key, _ in held:
        cache.give(key)
    free = sum(size for blocks in cache._free.values() for size, _ in blocks)
    assert free == cache.reserved and cache._used == 0
    assert most <= cache.most <= cache.reserved


def test_reserved_replays_births_and_deaths() -> None:
    blocks = [Block(12 * MIB, -1, "weights", 0, 1), Block(12 * MIB, -1, "weights", 2), Block(0, -1, "weights", 3)]
    assert reserved(blocks) == (12 * MIB, 12 * MIB)
    blocks[0].died = 5
    assert reserved(blocks) == (24 * MIB, 24 * MIB)
    grown = [Block(12 * MIB, -1, "weights", 0, 1), Block(14 * MIB, -1, "weights", 2)]
    assert reserved(grown) == (14 * MIB, 26 * MIB), "an empty segment is given back when memory runs out"


def test_what_cuda_kernels_keep_otherwise() -> None:
    norm = op("aten.native_layer_norm", dtype=torch.bfloat16)
    assert on_cuda(1024, norm, 0) == 1024
    assert on_cuda(1024, norm, 1) == 2048
    assert on_cuda(1, None, 0) == 512
    attention = op("aten._scaled_dot_product_flash_attention_for_cpu", shape=(2, 16, 16, 8), grouped=True)
    assert on_cuda(512, attention, 1) == 512 + 4 * 2 * 16 * (16 + 2 * 8)
    assert on_cuda(512, replace(attention, dtype=torch.bfloat16), 1) == 512


def test_resident_memory_is_live_and_what_was_there_before(monkeypatch: pytest.MonkeyPatch) -> None:
    if platform.libc_ver()[0] == "glibc":
        assert resident(10**9, 3 * 10**8) == pytest.approx(1.32e9)
    monkeypatch.setenv("SCRIMP_ALLOCATOR", "default")
    assert resident(10**9, 3 * 10**8) == pytest.approx(1.63e9)


def test_machines_by_name() -> None:
    assert machine("a100-80").name == "A100-80"
    assert machine("here").memory > 0
    with pytest.raises(UserError, match=r"there is no machine `A100`.*A100-"):
        machine("A100")


@pytest.mark.parametrize(("name", "memory", "found"), [
    ("NVIDIA A100-SXM4-80GB", 85 << 30, "A100-80"), ("NVIDIA A100-PCIE-40GB", 40 << 30, "A100-40"),
    ("NVIDIA L4", 23 << 30, "L4"), ("NVIDIA L40S", 45 << 30, "L40S"), ("NVIDIA GeForce RTX 4090", 24 << 30, "RTX4090"),
    ("NVIDIA H100 80GB HBM3", 79 << 30, "H100"), ("Tesla T4", 15 << 30, "T4"), ("NVIDIA L40", 45 << 30, None),
    ("NVIDIA T400", 4 << 30, None),
])  # fmt: skip
def test_a_driver_name_finds_its_data_sheet(name: str, memory: int, found: str | None) -> None:
    like = alike(name, memory)
    assert (like.name if like is not None else None) == found
