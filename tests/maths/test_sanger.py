"""Scores of a few bits, what they keep, and the pieces that hardware gets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from scrimp.cores import SparseCore, traced
from scrimp.techniques.attention.sanger import Predicted, Sanger, coded, fullness, pieces, predicted
from tiny import example, recipe, run_of


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_the_mask_is_the_threshold_on_scores_of_four_bits() -> None:
    q, k = drawn(2, 1, 2, 7, 8)
    seen = torch.ones(1, 1, 7, 7, dtype=torch.bool).tril()
    keep = Predicted(Sanger(threshold=0.1))(q, k, seen) & seen
    for h in range(2):
        for i in range(7):
            x = q[0, h, i]
            step = x.abs().max() / 7
            keys = k[0, h, : i + 1]
            steps = keys.abs().amax(1) / 7
            scores = ((keys / steps[:, None]).round() @ (x / step).round()) * step * steps / 8**0.5
            weights = scores.softmax(0)
            wanted = (weights > 0.1) | (weights == weights.max())
            assert torch.equal(keep[0, h, i, : i + 1], wanted)


def test_codes_hold_what_their_bits_say() -> None:
    x = torch.tensor([[7.0, -3.4, 0.6], [0.0, 0.0, 0.0]])
    whole, step = coded(x, 4, rows=True)
    assert whole.tolist() == [[7, -3, 1], [0, 0, 0]]
    assert float(step[0]) == 1
    assert coded(x, 2, rows=False)[0].abs().max() == 1


def test_a_scale_of_a_tensor_is_that_of_directions_as_released() -> None:
    """Rows of norm 1, 7 / max |x| of the tensor, and the norms again."""
    q, k = drawn(2, 2, 2, 6, 8)
    q[0] *= 5
    x, y = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    a, b = 7 / x.abs().max(), 7 / y.abs().max()
    scores = (x * a).round() @ (y * b).round().mT / (a * b)
    scores = scores * q.norm(dim=-1, keepdim=True) * k.norm(dim=-1)[:, :, None] / 8**0.5
    seen = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    torch.testing.assert_close(predicted(q, k, seen, 4, rows=False), scores.softmax(-1))


def test_the_mask_is_a_constant_to_the_gradient_and_grouped_heads_choose_for_themselves() -> None:
    q, k, v = (t.double().requires_grad_() for t in (drawn(1, 4, 5, 8), drawn(1, 2, 5, 8), drawn(2, 2, 5, 8)[1:]))
    core = SparseCore("sanger", Predicted(Sanger(threshold=0.15)))
    assert torch.autograd.gradcheck(lambda *t: core(*t, True), (q, k, v), fast_mode=True)
    core.tracing = True
    with torch.no_grad():
        core.eval()(q, k, v, True)
    assert core.trace is not None
    mask = core.trace.mask[0]
    assert mask.shape == (4, 5, 5)
    assert not torch.equal(mask[0], mask[1])
    scores = (q @ k.repeat_interleave(2, 1).transpose(-1, -2)) / 8**0.5
    y = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(core(q, k, v, True), y)


def test_rows_are_cut_packed_and_split() -> None:
    mask = drawn(3, 40, 150) > 0.4
    mask[0, 3] = mask[1, :, 64:128] = False
    wanted = [[[-(-int(row[s : s + 64].sum()) // 16) for s in (0, 64, 128)] for row in head] for head in mask]
    assert pieces(mask).tolist() == wanted
    places = sum(n for head in wanted for row in head for n in row) * 16
    assert fullness(mask) == pytest.approx(int(mask.sum()) / places)
    assert fullness(torch.ones(4, 128, dtype=torch.bool)) == 1


def test_validation_alone_may_choose_and_leaves_a_trace() -> None:
    run = run_of(recipe(example("sanger", when="evaluation")))
    plain = run_of(recipe())
    assert run.loss and plain.loss and run.evaluate
    batch = run.batch(0)
    assert torch.equal(run.loss(run.model, batch), plain.loss(plain.model, batch))
    with traced(run.model) as cores:
        run.evaluate(lambda model: run.task.loss(model, batch))
    trace = cores["blocks.1.attention.core"].trace
    assert trace.predictor == "sanger"
    assert trace.details["pieces"].shape == (4, 2, 16, 1)
    assert 0 < trace.mask.float().mean() < 17 / 32
