"""Integer products: exact sums, scales only along what is not summed, and rounding that is right on average."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from scrimp.numerics.rounding import noise, stochastic
from scrimp.techniques.precision.int8 import INT8, LONGEST, Product, integers, product, quantized
from tiny import example, recipe, run_of, step


def test_sums_are_exact() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-127, 128, s, generator=g, dtype=torch.int8) for s in ((5, 300), (300, 7)))
    assert torch.equal(integers(a, b).long(), a.long() @ b.long())


def test_long_sums_do_not_overflow() -> None:
    count = LONGEST + 5
    assert 127**2 * LONGEST < 2**31 < 127**2 * (LONGEST + LONGEST // 32)
    a, one = torch.full((1, count), 127, dtype=torch.int8), torch.ones(1, 1, dtype=torch.float64)
    assert float(product(a, a.t(), one, one, torch.float64)) == 127**2 * count


def test_each_row_or_column_has_a_scale() -> None:
    x = torch.tensor([[127.0, 1.0], [2.54, -1.27]])
    codes, scale = quantized(x, 1, None)
    assert codes.tolist() == [[127, 1], [127, -64]]  # 63.5 goes to the even neighbor
    torch.testing.assert_close(scale, torch.tensor([[1.0], [0.02]]))
    codes, scale = quantized(x, 0, None)
    assert codes.tolist() == [[127, 100], [3, -127]]
    torch.testing.assert_close(scale, torch.tensor([[1.0, 0.01]]))


@pytest.mark.parametrize("save", ["inputs", "int8"])
@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_products_are_near_the_exact_ones(granularity: str, save: str) -> None:
    how = INT8(granularity=granularity, save=save)  # type: ignore[arg-type]
    assert all(off < 0.05 for off in errors(how, torch.ones(64, 1), torch.ones(1, 16), torch.ones(64, 1)))


def test_a_large_row_leaves_the_others_their_codes() -> None:
    one, large = torch.ones(64, 1), torch.ones(64, 1)
    large[3] = 1000
    wide = torch.ones(1, 16)
    wide[:, 2] = 1000
    assert errors(INT8(), large, torch.ones(1, 16), one)[0] < 0.05
    assert errors(INT8(), one, torch.ones(1, 16), large)[1] < 0.05
    assert errors(INT8(), one, wide, one)[2] < 0.05
    assert errors(INT8(granularity="tensor"), large, torch.ones(1, 16), one)[0] > 0.5


def errors(how: INT8, rows: Tensor, columns: Tensor, tokens: Tensor) -> tuple[float, float, float]:
    """Largest relative error of a row of y, dx and dW; inputs and gradients are multiplied by the arguments."""
    g = torch.Generator().manual_seed(1)
    x, w, dy = (torch.randn(*s, generator=g) for s in ((64, 32), (16, 32), (64, 16)))
    x, dy = x * rows, dy * columns * tokens
    found = []
    for multiply in (Product(how, 7), torch.nn.functional.linear):
        leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        y = multiply(*leaves, None)  # type: ignore[operator]
        found.append((y.detach(), *torch.autograd.grad(y, leaves, dy)))
    return tuple(float(((a - b).norm(dim=1) / b.norm(dim=1)).max()) for a, b in zip(*found, strict=True))  # type: ignore[return-value]


def test_stochastic_rounding_is_right_on_average() -> None:
    count = 1 << 20
    for value in (0.25, -1.9, 3.0):
        q = stochastic(torch.full((count,), value), 11)
        assert set(q.unique().tolist()) <= {math.floor(value), math.floor(value) + 1}
        spread = math.sqrt((value % 1) * (1 - value % 1) / count)
        assert abs(float(q.double().mean()) - value) <= 4 * spread


def test_noise_is_a_function_of_key_and_place() -> None:
    device = torch.device("cpu")
    whole = noise(1000, 5, device)
    assert torch.equal(whole[300:], noise(700, 5, device, 300))
    other = noise(1000, 6, device)
    assert abs(float(torch.corrcoef(torch.stack([whole, other]))[0, 1])) < 0.15
    assert len(set(whole.tolist()) & set(other.tolist())) < 5
    assert float(whole.min()) >= 0
    assert float(whole.max()) < 1


def test_gradients_are_right_on_average() -> None:
    x = torch.eye(4)
    dy = torch.full((4, 4), 0.3)
    dy[:, 0] = 127.0  # scale 1 in each row, so that 0.3 is lost to the nearest
    total = torch.zeros(4, 4)
    for salt in range(400):
        leaf = x.clone().requires_grad_()
        Product(INT8(granularity="tensor"), salt)(leaf, torch.eye(4), None).backward(dy)
        assert leaf.grad is not None
        total += leaf.grad
    torch.testing.assert_close(total[:, 0] / 400, dy[:, 0])
    assert abs(float(total[:, 1:].mean()) / 400 - 0.3) < 4 * math.sqrt(0.21 / 400 / 12)


def test_what_is_not_finite_stays_so() -> None:
    for broken in (math.inf, math.nan):
        x = torch.ones(2, 4)
        x[1, 2] = broken
        y = Product(INT8(), 0)(x, torch.ones(3, 4), None)
        assert y[0].isfinite().all()
        assert y[1].isnan().all()


def test_weights_stay_on_their_grid() -> None:
    run = run_of(recipe(example("int8"), example("sgd", lr=1e-3, momentum=0.0)))
    for _ in range(2):
        step(run)
    weight = run.model.get_parameter("blocks.1.mlp.up.weight").detach().double()
    codes = weight / weight.abs().amax(1, keepdim=True) * 127
    assert (codes - codes.round()).abs().max() < 1e-3
    bias = run.model.get_parameter("blocks.1.mlp.up.bias")
    assert bias.unique().numel() == bias.numel()


def test_small_updates_survive_on_average() -> None:
    """An update of a twentieth of the grid is always lost to the nearest."""
    run = run_of(recipe(example("int8")))
    weight = run.model.get_parameter("blocks.0.mlp.up.weight")
    start = torch.linspace(-1, 1, 32).repeat(len(weight), 1)
    moved = 0.0
    for i in range(20):
        run.clock.step = i
        weight.data.copy_(start)
        weight.data[:, 1:-1] += 0.05 / 127
        example("int8").step(lambda: True, run)()
        moved += float((weight.data - start)[:, 1:-1].mean())
    assert abs(moved / 20 / (0.05 / 127) - 1) < 0.2


def test_rounded_weights_are_seen_by_who_keeps_a_copy() -> None:
    run = run_of(recipe(example("int8")))
    weight = run.model.get_parameter("blocks.0.mlp.up.weight")
    before = weight._version
    example("int8").step(lambda: True, run)()
    assert weight._version > before


def test_weights_on_their_grid_are_as_large_against_their_gradients_as_floats() -> None:
    """What quantization-aware scaling restores for codes q = w / s, whose ratio is s^-2 times as large."""
    ratios: list[list[Tensor]] = []
    for more in ((), (example("int8", weights="int8"),)):
        run = run_of(recipe(*more, example("sgd", lr=1e-3, momentum=0.0)))
        step(run)
        batch = run.batch(1)
        assert run.backward
        run.backward(batch, run.task.count(batch))
        weights = [run.model.get_parameter(f"blocks.{i}.{name}.weight") for i in range(4)
                   for name in ("attention.qkv", "attention.proj", "mlp.up", "mlp.down")]  # fmt: skip
        ratios.append([w.detach().norm() / w.grad.norm() for w in weights if w.grad is not None])
    assert len(ratios[0]) == 16
    torch.testing.assert_close(torch.stack(ratios[0]), torch.stack(ratios[1]), rtol=0.05, atol=0)
