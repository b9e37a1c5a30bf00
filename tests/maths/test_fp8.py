"""FP8 products, against the same codes multiplied in float32, and scales worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scrimp.technique import Technique
from scrimp.techniques.precision.fp8 import E4M3, E5M2, FP8, Product, power
from tiny import assert_equal, example, flat, recipe, run_of, step


def exact(x: Tensor, dtype: torch.dtype, dim: int | None = None) -> Tensor:
    """A tensor through the format: scaled by a power of two, cast, and back."""
    most = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = 2.0 ** torch.floor(torch.log2(torch.finfo(dtype).max / most))
    return (x * scale).to(dtype).float() / scale


@pytest.mark.parametrize("save", ["inputs", "fp8"])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_is_the_product_of_the_codes(granularity: str, save: str) -> None:
    g = torch.Generator().manual_seed(0)
    x, w, dy = (torch.randn(*s, generator=g) for s in ((3, 5, 16), (8, 16), (3, 5, 8)))
    x[0, 0] *= 100
    x, w, b = x.requires_grad_(), w.requires_grad_(), torch.randn(8, generator=g)
    y = Product(FP8(granularity=granularity, save=save), x.device)(x, w, b)  # type: ignore[arg-type]
    y.backward(dy)

    rows = granularity == "row"
    along, across = (1, 0) if rows else (None, None)
    flat_x, flat_g = x.detach().flatten(0, 1), dy.flatten(0, 1)
    torch.testing.assert_close(y, F.linear(exact(flat_x, E4M3, along), exact(w.detach(), E4M3, along), b).view_as(y))
    torch.testing.assert_close(x.grad, (exact(flat_g, E5M2, along) @ exact(w.detach(), E4M3, across)).view_as(x))
    kept = exact(flat_x, E4M3, along) if save == "fp8" else flat_x
    torch.testing.assert_close(w.grad, exact(flat_g, E5M2, across).t() @ exact(kept, E4M3, across))


def test_all_256_codes_survive() -> None:
    for dtype in (E4M3, E5M2):
        codes = torch.arange(256, dtype=torch.uint8).view(dtype).float()
        codes = codes[codes.isfinite()]
        product = Product(FP8(), codes.device)
        back, inverse = product.cast(codes[None], 2 if dtype == E5M2 else 0, 1)
        assert torch.equal(back.float() * inverse, codes[None])


def test_scales_are_powers_of_two() -> None:
    x = torch.tensor([448.0, 449.0, 1.0, 0.75, 2.0**-140, math.inf, math.nan])
    assert power(x).tolist() == [256, 256, 1, 0.5, 2.0**-140, 1, 1]


@pytest.mark.parametrize("scaling", ["current", "delayed"])
def test_zeros_stay_and_overflows_are_seen(scaling: str) -> None:
    product = Product(FP8(scaling=scaling), torch.device("cpu"))  # type: ignore[arg-type]
    w = torch.ones(4, 4)
    assert torch.equal(product(torch.zeros(2, 4), w, None), torch.zeros(2, 4))
    for broken in (math.inf, math.nan):
        x = torch.ones(2, 4)
        x[1, 2] = broken
        assert product(x, w, None).isnan().all(), "a saturating cast would have hidden it"


def test_delayed_scales_come_from_earlier_steps() -> None:
    product = Product(FP8(scaling="delayed", history=2, margin=1), torch.device("cpu"))
    w = torch.eye(4)
    seen = []
    for size in (1.0, 4.0, 2.0, 1.0, 1000.0):
        product.begin()
        y = product(torch.full((2, 4), size).requires_grad_(), w, None)
        seen.append(float(y.detach().max()))
        y.sum().backward()
    assert product.history[0].tolist() == [1000, 1, 2]
    assert product.history[2].tolist() == [1, 1, 1]
    # The first step looks at itself; the last one expects at most 2 x 2, and 256 x 2^-1 leaves room up to 448 / 128 .
    assert seen[:4] == [1, 3.5, 2, 1]
    assert seen[4] == 448 / 64


def test_recomputation_and_evaluation_leave_the_history_alone() -> None:
    runs = [run_of(recipe(example("fp8"), *extra)) for extra in ((), (example("recompute"),))]
    for run in runs:
        step(run)
        step(run)
    assert_equal(*(flat(run.state()) for run in runs))
    before = flat(runs[0].state())
    assert runs[0].evaluate is not None
    runs[0].evaluate(lambda model: runs[0].task.loss(model, runs[0].batch(0)))
    assert_equal(before, flat(runs[0].state()))


def kept_bytes(*techniques: Technique) -> int:
    """Bytes that one more block holds for its backward pass."""
    from scrimp.meter import LiveBytes

    found = []
    for layers in (1, 2):
        run = run_of(recipe(*techniques, model={"layers": layers, "width": 32, "heads": 2, "dropout": 0.0}))
        batch, meter = run.batch(0), LiveBytes()
        meter.register([*run.model.parameters(), *run.model.buffers(), *batch.values()])
        before = meter.live
        assert run.loss
        with meter:
            loss = run.loss(run.model, batch)
        found.append(meter.live - before)
        del loss
    return found[1] - found[0]


def test_what_a_block_keeps() -> None:
    """In float32: the inputs of qkv, up and down at 1 byte instead of 4, and proj's beside that of attention."""
    unit = 4 * 16 * 32
    plain = kept_bytes()
    assert kept_bytes(FP8()) == plain
    scales = 4 * 4
    assert kept_bytes(FP8(save="fp8")) == plain - (3 + 3 + 12 - 1) * unit + scales


def test_overflow_with_autocast_skips_the_step() -> None:
    run = run_of(recipe(example("fp8"), example("autocast", dtype="float16")))
    before = run.model.get_parameter("blocks.0.mlp.up.weight").detach().clone()
    with torch.no_grad():
        run.memories["autocast"]["scale"].fill_(2.0**100)
    step(run)
    assert torch.equal(before, run.model.get_parameter("blocks.0.mlp.up.weight"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_beyond_float16_are_no_infinities(dtype: torch.dtype) -> None:
    small = torch.tensor([[0.0, 2.0**-10, -(2.0**-12)]], dtype=dtype)
    codes, inverse = Product(FP8(), torch.device("cpu")).cast(small, 2, 1)
    torch.testing.assert_close(codes.float() * inverse, small.float(), rtol=0, atol=0)
