"""Signs of a projection: what they say of angles, which keys they keep, and where thresholds come from."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scrimp.cores import SparseCore, traced
from scrimp.draws import generator
from scrimp.techniques.attention.elsa import Angles, Elsa, by_modes, calibrated, dense, kronecker_factors
from tiny import example, recipe, run_of, step


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def angles(width: int = 16, heads: int = 2, **settings: float) -> Angles:
    """A selection whose buffers are filled."""
    return Angles(Elsa(**{"calibrate": 1, **settings}), torch.empty(heads, width), 0)  # type: ignore[arg-type]


def square(tokens: int, causal: bool = True) -> Tensor:
    every = torch.ones(1, 1, tokens, tokens, dtype=torch.bool)
    return every.tril() if causal else every


def test_the_projection_is_orthogonal_and_a_product_of_three() -> None:
    for width, sizes in ((64, [4, 4, 4]), (16, [2, 2, 4]), (7, [1, 1, 7])):
        factors = kronecker_factors(width, generator(0, "elsa"))
        assert sorted(len(f) for f in factors) == sizes
        whole = dense(factors)
        torch.testing.assert_close(whole @ whole.T, torch.eye(width, dtype=torch.float64))
        x = drawn(3, width).double()
        torch.testing.assert_close(by_modes(factors, x), x @ whole.T)


@pytest.mark.parametrize("width", [8, 16, 64])
def test_the_signs_estimate_angles(width: int) -> None:
    """Without bias the mean is right, and with it four of five estimates are at most the angle, at every width."""
    pairs = drawn(2, 20000, width)
    errors = {}
    for bias in (0.0, Elsa().bias):
        made = angles(width, 1, bias=bias)
        estimate = made.angle(*(x[:, None, None] for x in pairs)).flatten()
        errors[bias] = estimate - F.cosine_similarity(pairs[0], pairs[1]).acos()
    assert abs(float(errors[0.0].mean())) < 0.005
    assert abs(float(errors[0.0].quantile(0.8)) - Elsa().bias * (64 / width) ** 0.5) < 0.015
    assert float((errors[Elsa().bias] <= 0).float().mean()) == pytest.approx(0.8, abs=0.02)


def test_a_head_keeps_what_is_above_its_threshold() -> None:
    made, seen = angles(), square(6)
    q, k = drawn(2, 1, 2, 6, 16)
    made.count.fill_(1)
    made.threshold.copy_(torch.tensor([0.1, 9.0]))
    keep = made(q, k, seen) & seen
    size = k.norm(dim=-1)
    for i in range(6):
        for j in range(i + 1):
            angle = made.angle(q[:, :, i : i + 1], k[:, :, j : j + 1])[0, 0, 0, 0]
            promise = size[0, 0, j] * math.cos(angle)
            above = promise > 0.1 * size[0, 0, : i + 1].max()
            if above:
                assert keep[0, 0, i, j]
    assert torch.equal(keep[0, 1].sum(-1), torch.ones(6)), "the best key stands in where there is no candidate"


def test_thresholds_are_those_of_the_least_key_that_matters() -> None:
    q, k = drawn(2, 1, 1, 5, 16)
    found = float(calibrated(q, k, square(5, causal=False), p=1.0))
    wanted = []
    for x in q[0, 0]:
        weights = (k[0, 0] @ x / 4).softmax(0)
        least = min((float(w), j) for j, w in enumerate(weights) if w > 1 / 5)[1]
        wanted.append(float(k[0, 0, least] @ x / (x.norm() * k[0, 0].norm(dim=-1).max())))
    assert math.isclose(found, sum(wanted) / 5, rel_tol=1e-5)


def test_more_p_keeps_fewer_and_none_keeps_all() -> None:
    q, k, v = drawn(3, 2, 2, 32, 64)
    made, shares = angles(64), []
    for p in (0.5, 1.0, 2.0, 4.0):
        made.count.fill_(1)
        made.threshold.copy_(calibrated(q, k, square(32), p))
        shares.append(float((made(q, k, square(32)) & square(32)).float().mean()))
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[-1]
    made.count.zero_()
    torch.testing.assert_close(
        SparseCore("elsa", made).eval()(q, k, v, True), F.scaled_dot_product_attention(q, k, v, is_causal=True)
    )


def test_calibrates_on_the_first_batches_and_then_chooses() -> None:
    run = run_of(recipe(example("elsa", p=1.0, calibrate=2)))
    cores = [m for m in run.model.modules() if isinstance(m, Angles)]
    shares = []
    for _ in range(4):
        step(run)
        shares.append(run.gauges["elsa_kept"])
    assert shares[:2] == [1, 1]
    assert shares[3] < 1
    assert [c.count.tolist() for c in cores] == [[2, 2]] * 4
    before = cores[0].threshold.clone()
    step(run)
    assert torch.equal(before, cores[0].threshold), "what is calibrated stays"
    assert run.evaluate and run.loss
    with traced(run.model) as found:
        run.evaluate(lambda model: run.task.loss(model, run.batch(0)))
    trace = found["blocks.0.attention.core"].trace
    assert trace.predictor == "elsa"
    assert trace.mask.any(-1).all()
    assert trace.mask.float().mean() < 17 / 32
