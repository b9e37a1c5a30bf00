# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Measure this machine once: products by shape and dtype, attention, memory-bound operators, fresh pages, overhead.

Each figure is the best of a few repetitions, so that what else runs disturbs little. Results are kept by processor,
cores, threads and torch's version; another one of these is another machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from scrimp.calibration import USUAL, recipe_of
from scrimp.machines.machine import Machine
from scrimp.machines.rates import Rates
from scrimp.machines.store import identity, remember
from scrimp.planning import plan
from scrimp.products import fast_products

SIDES: Final = (16, 64, 256, 1024, 4096)
"""Sides of the products that are measured."""
LIMIT: Final = 0.5
"""Seconds that one product may take; a larger one gets the rate of the one before."""
SIZES: Final = tuple(4**n << 12 for n in range(8))
"""Bytes that memory-bound operators move, 4 KiB to 64 MiB."""
Say = Callable[[str], None]


def probe(say: Say = lambda text: None, kind: str = "") -> Rates:
    """Measure and remember. Takes about half a minute.

    Args:
        say: hears what is measured.
        kind: cpu or cuda; by default the GPU where there is one.
    """
    device = torch.device(kind or ("cuda" if torch.cuda.is_available() else "cpu"))
    with fast_products(), torch.no_grad():
        say("matrix products")
        products = list(_products(device))
        say("attention")
        with torch.enable_grad():
            attention = list(_attention(device))
        say("memory-bound operators")
        stream = list(_stream(device))
        fresh = list(_fresh()) if device.type == "cpu" else []
    say("small runs")
    runs = _small_runs(device)
    rates = Rates(identity(device.type), products, attention, stream, fresh, runs["overhead"], runs["step"],
                  int(runs["resident"]))  # fmt: skip
    rates = _calibrated(rates, device, runs["usual"])
    remember(rates)
    return rates


def best(work: Callable[[], Any], device: torch.device, least: float = 0.004, most: int = 200) -> float:
    """Seconds of the fastest repetition; repeats for `least` seconds, at least twice unless one takes `LIMIT`."""
    found, spent, count = float("inf"), 0.0, 0
    while count < 2 or (spent < least and count < most):
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took = time.perf_counter() - begin
        found, spent, count = min(found, took), spent + took, count + 1
        if took > LIMIT:
            break
    return found


def _products(device: torch.device) -> Iterator[tuple[str, str, int, int, int, float]]:
    for dtype in ("float32", "bfloat16", *(("float16",) if device.type == "cuda" else ("float64",))):
        kind = getattr(torch, dtype)
        for layout in ("nt", "nn", "tn") if dtype != "float64" else ("nn",):
            slow: float = 0.0
            for m, n, k in sorted(product(SIDES, repeat=3), key=lambda sides: sides[0] * sides[1] * sides[2]):
                flops = 2.0 * m * n * k
                if slow and flops / slow > LIMIT:
                    yield dtype, layout, m, n, k, slow
                    continue
                a = _matrix(m, k, layout[0], kind, device)
                b = _matrix(k, n, layout[1], kind, device)
                out = torch.empty(m, n, dtype=kind, device=device)
                rate = flops / best(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device)
                slow = rate if flops > 1e8 else 0.0
                yield dtype, layout, m, n, k, rate


def _matrix(rows: int, columns: int, letter: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A random matrix, its columns in memory one after another if the letter is t."""
    shape = (rows, columns) if letter == "n" else (columns, rows)
    matrix = torch.rand(shape, device=device, dtype=torch.float32).to(dtype)
    return matrix if letter == "n" else matrix.t()


def _attention(device: torch.device) -> Iterator[tuple[str, str, int, int, float]]:
    """Causal, which is half of the products; the rate counts only what is computed."""
    for dtype, tokens, width in product(("float32", "bfloat16"), (16, 64, 256, 1024), (32, 64, 128)):
        kind, rows = getattr(torch, dtype), max(2, 8192 // tokens)
        # As a model hands them over: heads of one projection, side by side.
        x = torch.rand(rows // 2 or 1, tokens, 3 * 2 * width, device=device).to(kind).requires_grad_()
        q, k, v = x.view(*x.shape[:2], 6, width).transpose(1, 2).split(2, 1)
        flops = 4.0 * q.shape[0] * 2 * tokens * tokens * width / 2

        def forward(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        y = forward()
        grad = torch.ones_like(y)

        def backward(q: Tensor = q, k: Tensor = k, v: Tensor = v, y: Tensor = y, grad: Tensor = grad) -> Any:
            return torch.autograd.grad(y, (q, k, v), grad, retain_graph=True)

        yield dtype, "forward", tokens, width, flops / best(forward, device)
        yield dtype, "backward", tokens, width, 2.5 * flops / best(backward, device)


def _stream(device: torch.device) -> Iterator[tuple[str, int, float]]:
    for size in SIZES:
        width = min(512, size // 16)
        x = torch.rand(size // 4 // width, width, device=device) + 0.5
        y, out, ids = torch.rand_like(x), torch.empty_like(x), torch.arange(len(x), device=device)
        for family, moved, work in _families(x, y, out, ids):
            yield family, moved, moved / best(work, device)


def _families(x: Tensor, y: Tensor, out: Tensor, ids: Tensor) -> Iterator[tuple[str, int, Callable[[], Any]]]:
    """(family, bytes moved, one repetition). Outputs are there already, as fresh pages are counted apart; the norms and
    scatter make their own.
    """  # fmt: skip
    a: Any = torch.ops.aten
    size, width = x.numel() * 4, [x.shape[1]]
    weight, bias = torch.ones(width, device=x.device), torch.zeros(width, device=x.device)
    _, mean, scale = torch.native_layer_norm(x, width, weight, bias, 1e-5)
    steps = [torch.ones((), device=x.device)]
    moments = torch.zeros_like(x), torch.zeros_like(x)
    half = x.to(torch.bfloat16)
    yield "elementwise", 3 * size, lambda: torch.add(x, y, out=out)
    yield "copy", 2 * size, lambda: out.copy_(x)
    yield "cast", size + size // 2, lambda: half.copy_(x)
    yield "fill", size, lambda: out.zero_()
    yield "gelu", 2 * size, lambda: a.gelu.out(x, out=out)
    yield "gelu_backward", 3 * size, lambda: a.gelu_backward.grad_input(y, x, grad_input=out)
    yield "exp", 2 * size, lambda: torch.exp(x, out=out)
    yield "softmax", 2 * size, lambda: torch.softmax(x, 1, out=out)
    yield "norm", 2 * size, lambda: torch.native_layer_norm(x, width, weight, bias, 1e-5)
    yield (
        "norm_backward",
        3 * size,
        lambda: a.native_layer_norm_backward(y, x, width, mean, scale, weight, bias, [True, True, True]),
    )
    yield "gather", 2 * size, lambda: torch.index_select(x, 0, ids, out=out)
    yield "scatter", 2 * size, lambda: a.embedding_dense_backward(x, ids, len(x), -1, False)
    yield "reduce", size, lambda: x.sum(0)
    yield "update", 7 * size, lambda: a._fused_adamw_(
        [out], [y], [moments[0]], [moments[1]], [], steps, lr=1e-9, beta1=0.9, beta2=0.99, weight_decay=0.0, eps=1.0,
        amsgrad=False, maximize=False,
    )  # fmt: skip


def _fresh() -> Iterator[tuple[int, float]]:
    """(size of a block, bytes/s at which its pages are touched for the first time, above touching them again)."""
    device = torch.device("cpu")
    for size in (1 << 20, 1 << 21, 1 << 22, 1 << 24, 1 << 26, 1 << 28):
        held = torch.empty(size, dtype=torch.uint8)
        again = best(lambda held=held: held.fill_(1), device, 0.02)
        first = best(lambda size=size: torch.empty(size, dtype=torch.uint8).fill_(1), device, 0.05)
        yield size, size / max(first - again, 1e-9)


SMALL: Final = """
import json, sys, time
from scrimp.allocator import lean
lean()
from scrimp.calibration import small
print(json.dumps(small(sys.argv[1])))
"""


def _small_runs(device: torch.device) -> dict[str, float]:
    """What `small` finds, in a process of its own, as training runs in."""
    done = subprocess.run([sys.executable, "-c", SMALL, device.type], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _calibrated(rates: Rates, device: torch.device, measured: float) -> Rates:
    """With the factor by which steps of the usual run took longer than the sum of their operators."""
    bare = Machine(name="here", device=device.type, memory=1 << 62, flops=rates.flops(), bandwidth=rates.bandwidth(),
                   overhead=rates.overhead, rates=rates)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        planned = plan(recipe_of(USUAL, 256, 8, 6, device.type, folder), bare).stages[0].seconds
    return replace(rates, factor=(measured - rates.step) / (planned - rates.step))
