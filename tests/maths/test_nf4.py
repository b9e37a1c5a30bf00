"""NF4: the codebook by its definition, what packing keeps, sizes to the byte, and a base that is packed."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from scrimp.errors import UserError
from scrimp.groups import trainable
from scrimp.numerics import nf4
from scrimp.run import exported
from scrimp.techniques.precision.quantized_base import QuantizedBase
from scrimp.techniques.tuning.lora import LoRA
from tiny import example, recipe, run_of, step
from tiny_tasks import TINY, Memory

SMALL = {"layers": 2, "width": 32, "heads": 2}


def test_the_codes_are_quantiles_of_a_normal_distribution() -> None:
    offset, quantile = 0.9677083, NormalDist().inv_cdf
    above = [quantile(float(p)) for p in torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1]]
    below = [-quantile(float(p)) for p in torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1]]
    found = torch.tensor(sorted([*above, 0.0, *below]), dtype=torch.float64)
    torch.testing.assert_close(found / found.max(), torch.tensor(nf4.CODE, dtype=torch.float64), rtol=0, atol=2e-6)


def test_values_of_the_code_survive_and_others_go_to_the_nearest() -> None:
    code = torch.tensor(nf4.CODE)
    weight = torch.cat([code, code, code, code])[None] * torch.tensor([[3.0], [0.25]])
    codes, scales, factors = nf4.pack(weight, double=False)
    assert codes.shape == (2, 32)
    assert codes[0, 3] == 6 << 4 | 7  # the even one is in the upper half
    torch.testing.assert_close(nf4.unpack(codes, scales, factors, torch.float32), weight, rtol=1e-6, atol=0)
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    unit = nf4.unpack(*nf4.pack(weight, double=False), torch.float32) / weight.abs().amax(1, keepdim=True)
    nearest = code[(weight[..., None] / weight.abs().amax(1)[:, None, None] - code).abs().argmin(-1)]
    torch.testing.assert_close(unit, nearest, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(8, 64), (5, 30), (300, 128)])
@pytest.mark.parametrize("double", [True, False])
def test_sizes_and_errors(shape: tuple[int, int], double: bool) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02
    codes, scales, factors = nf4.pack(weight, double)
    assert (len(scales), len(factors)) == nf4.sizes(weight.numel(), double)
    assert codes.numel() * 2 == weight.numel()
    back = nf4.unpack(codes, scales, factors, torch.float32)
    assert 0.05 < float((back - weight).norm() / weight.norm()) < 0.12
    if double:
        exact = F.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64).abs().amax(1)
        assert float((nf4.scale_of(scales, factors) / exact - 1).abs().max()) < 0.04
    if shape == (300, 128):
        bits = 8 * (codes.nbytes + scales.nbytes + factors.nbytes) / weight.numel()
        assert abs(bits - (4.128 if double else 4.5)) < 0.005


def test_a_zero_weight_stays_zero() -> None:
    for double in (True, False):
        assert not nf4.unpack(*nf4.pack(torch.zeros(2, 64), double), torch.float32).any()


def packed(*more: Any, source: Any = None, **settings: Any) -> Any:
    return run_of(recipe(QuantizedBase(), *more, model=SMALL, **settings), source=source)


def test_it_computes_with_the_packed_weights_and_gradients_flow_through() -> None:
    run = packed(LoRA(rank=2, targets="mlp.up"), dtype="float64")
    plain: Any = run_of(recipe(LoRA(rank=2, targets="mlp.up"), model=SMALL, dtype="float64"))
    up = run.model.blocks[1].mlp.up
    assert up.weight.dtype == torch.uint8
    rebuilt = up.nf4(up.weight)
    first = plain.model.blocks[1].mlp.up.weight
    assert torch.equal(rebuilt, nf4.unpack(*nf4.pack(first, True), torch.float64)), (
        "packed what it would have begun with"
    )
    x = torch.randn(3, 5, 32, dtype=torch.float64, requires_grad=True)
    y = up.product(x, up.weight, up.bias)
    torch.testing.assert_close(y, x @ rebuilt.T + up.bias)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(grad, 2 * y.detach() @ rebuilt)


def test_only_the_adapters_move_and_the_export_is_what_was_run() -> None:
    run = packed(LoRA(rank=2, targets="mlp.up"), dtype="float64")
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    for _ in range(3):
        step(run)
    moved = {n for n, p in run.model.named_parameters() if not torch.equal(before[n], p)}
    assert moved == {n for n in before if ".lora." in n}
    plain = exported(run)
    assert set(plain) == set(run.base)
    whole = run_of(recipe(model=SMALL, dtype="float64"), source={"model": plain})
    tokens = run.batch(0)["tokens"]
    run.model.eval()
    whole.model.eval()
    torch.testing.assert_close(run.model(tokens), whole.model(tokens), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["lora", "magnitude", "ssf", "ia3", "bitfit"])
def test_every_method_that_merges_does_so_on_a_packed_checkpoint(name: str) -> None:
    tuned = example("lora", magnitude=True) if name == "magnitude" else example(name)
    source = run_of(recipe(model=SMALL, dtype="float64", seed=5)).state()
    run: Any = packed(tuned, dtype="float64", source=source)
    if name == "magnitude":
        qkv = run.model.blocks[0].attention.qkv
        torch.testing.assert_close(qkv.lora.m, torch.linalg.vector_norm(qkv.nf4(qkv.weight), dim=1))
    with torch.no_grad():
        for p in trainable(run.model).values():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    whole: Any = run_of(recipe(model=SMALL, dtype="float64"), source={"model": exported(run)})
    tokens = run.batch(0)["tokens"]
    torch.testing.assert_close(run.model.eval()(tokens), whole.model.eval()(tokens), rtol=0, atol=1e-12)


def test_weights_of_a_checkpoint_are_packed_and_memory_is_as_computed() -> None:
    source: Any = run_of(recipe(model=SMALL, seed=5))
    run: Any = run_of(recipe(QuantizedBase(), example("lora"), model=SMALL), source=source.state())
    given = source.model.blocks[0].attention.qkv.weight
    own = run.model.blocks[0].attention.qkv
    assert torch.equal(own.nf4(own.weight), nf4.unpack(*nf4.pack(given, True), torch.float32))
    layers = [m for n, m in run.model.named_modules() if hasattr(m, "nf4")]
    held = sum(p.nbytes for m in layers for p in (m.weight, m.nf4.scales, m.nf4.factors))
    counts = [m.nf4.shape[0] * m.nf4.shape[1] for m in layers]
    assert held == sum(n // 2 + n // 64 + 4 * (1 - (-n // 64 // 256)) for n in counts)
    assert sum(counts) == 2 * 12 * 32 * 32


def test_weights_that_are_trained_or_shared_are_refused() -> None:
    with pytest.raises(UserError, match="is shared with another layer"):
        run_of(recipe(QuantizedBase(targets="head"), example("lora")))
    classifier: Any = {"model": TINY["classify"].model, "data": Memory("classify"), "task": "classify"}
    with pytest.raises(UserError, match="the task trains the weight of `head`"):
        run_of(recipe(QuantizedBase(targets="head|mlp.up"), example("lora"), **classifier))
    with pytest.raises(UserError, match="no layer of the model's own"):
        run_of(recipe(example("prompt", encoder="mlp"), QuantizedBase(targets="prompts.*"), model=SMALL))
    with pytest.raises(UserError, match="does not go with"):
        run_of(recipe(QuantizedBase(), example("rigl")))
