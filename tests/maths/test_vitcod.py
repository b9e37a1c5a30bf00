"""Fixed masks from averages, mixed heads, and the order of the columns."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scrimp.cores import SparseCore, attended_some, sparse_cores, traced
from scrimp.errors import UserError
from scrimp.models.generate import generate
from scrimp.run import exported
from scrimp.techniques.attention.vitcod import Averages, Fixed, Mixed, ViTCoD, drawn_mask, reordered
from scrimp.training import train
from scrimp.weights import load_weights
from tiny import example, recipe, run_of, step
from tiny_tasks import recipe_for


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def mixed(heads: int = 4, groups: int = 1) -> Mixed:
    attention = SimpleNamespace(heads=heads, kv_heads=heads // groups, width=8)
    made = Mixed(ViTCoD(), attention, torch.empty(0))
    for name, p in made.named_parameters():
        made.initialize(name, p.data, torch.Generator().manual_seed(len(name)))
    return made


def test_averages_are_of_the_softmax_and_count_rows() -> None:
    q, k = drawn(2, 3, 2, 5, 8)
    made = Averages(2, 8, torch.empty(0))
    made.refill()
    made(q, k, torch.ones(1, 1, 5, 5, dtype=torch.bool))
    made(q[:1, :, :3], k[:1, :, :3], torch.ones(1, 1, 3, 3, dtype=torch.bool).tril())
    wanted = ((q @ k.transpose(-1, -2)) / 8**0.5).softmax(-1).sum(0)
    assert made.rows.tolist() == [4, 4, 4, 3, 3, 0, 0, 0]
    torch.testing.assert_close(made.average[:, 3:5, :5], wanted[:, 3:])
    assert made.average[0, 0, 0] == pytest.approx(float(wanted[0, 0, 0]) + 1)


@pytest.mark.parametrize("causal", [True, False])
def test_a_row_keeps_its_largest_until_theta_and_never_loses_the_first_token(causal: bool) -> None:
    share = torch.tensor([[0.1, 0.5, 0.25, 0.15]] * 4)[None]
    keep = drawn_mask(3 * share, torch.tensor([3.0, 3, 3, 0]), 0.7, causal)[0]
    row = [True, True, True, False]  # 0.5 + 0.25 reach 0.7, and the first column stays
    diagonal = [[i == j and causal for j in range(4)] for i in range(4)]
    for i, kept in enumerate(keep.tolist()):
        if i == 3 or (i == 0 and not causal):
            assert kept == [True] * 4, "a row that was never seen, or the first one"
        else:
            assert kept == [a or b for a, b in zip(row, diagonal[i], strict=True)]
    assert drawn_mask(share, torch.ones(4), 1.0, causal).all()


def test_masks_are_of_places_with_and_without_a_cache() -> None:
    q, k, v = drawn(3, 1, 2, 6, 8)
    fixed = Fixed(2, 8, True, torch.empty(0))
    fixed.mask.copy_((drawn(2, 8, 8) > 0.3) | torch.eye(8, dtype=torch.bool))
    core = SparseCore("vitcod", fixed)
    every = core(q, k, v, True)
    torch.testing.assert_close(core(q[:, :, 5:], k, v, False), every[:, :, 5:])
    fixed.refill()
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(core(q, k, v, True), wanted, atol=1e-6, rtol=1e-6)


def test_reordering_is_a_permutation_that_changes_nothing() -> None:
    mask = (drawn(2, 12, 12) > 0.5) | torch.eye(12, dtype=torch.bool)
    mask[:, :, 7] = True
    found = reordered(mask, 0.5)
    order, dense = found["order"], found["dense"]
    assert torch.equal(order.sort(-1).values, torch.arange(12).expand(2, -1))
    degrees = mask.sum(1).gather(1, order)
    assert all((degrees[h, : dense[h]] > 6).all() and (degrees[h, dense[h] :] <= 6).all() for h in range(2))
    q, k, v = drawn(3, 1, 2, 12, 8)
    move = order[None, :, :, None].expand(1, -1, -1, 8)
    moved = mask[None].gather(3, order[None, :, None, :].expand(1, -1, 12, -1))
    there = attended_some(q, k.gather(2, move), v.gather(2, move), moved, None)
    torch.testing.assert_close(there, attended_some(q, k, v, mask[None], None))


def test_mixed_heads_fold_into_the_layer_before() -> None:
    made, (q, k, v) = mixed(4, 2), (drawn(2, 4, 5, 8), drawn(2, 2, 5, 8), drawn(2, 2, 5, 8))
    new_q, new_k, _, lost = made(q, k, v)
    assert torch.linalg.matrix_rank(made.get_parameter("decode_q") @ made.get_parameter("encode_q")) == 2
    weight, x = drawn(4 * 8 + 2 * 2 * 8, 6), drawn(3, 6)
    apart, folded = (F.linear(x, w)[:, :48].unflatten(1, (6, 8)) for w in (weight, made.folded(weight)))
    torch.testing.assert_close(made.mixture("q", apart[:, None, :4].transpose(1, 2))[:, :, 0], folded[:, :4])
    torch.testing.assert_close(made.mixture("k", apart[:, None, 4:].transpose(1, 2))[:, :, 0], folded[:, 4:])
    each = [(a - b).flatten(1).norm(dim=1).mean() for a, b in ((q, new_q), (k, new_k))]
    torch.testing.assert_close(lost, each[0] + each[1])
    wide = [t.double().requires_grad_() for t in (q, k, v)]
    assert torch.autograd.gradcheck(made.double(), wide, fast_mode=True)


def test_a_run_averages_then_masks_and_its_weights_are_plain() -> None:
    seen: list[tuple[str, list[str]]] = []
    result = train(recipe(example("vitcod", until="2 step", theta=0.3), duration="4 step"), save=False,
                   observe=lambda e, f: seen.append((e, sorted(dict(f["run"].model.named_buffers()))))
                   if e == "stage" else None)  # fmt: skip
    run = result.run
    assert [names[0].rpartition("core.")[2] for _, names in seen] == ["watch.average", "select.mask"]
    cores = sparse_cores(run.model, "vitcod")
    masks = [core.get_buffer("select.mask") for core in cores.values()]
    assert all(0.1 < float(m.tril().float().sum() / 136 / 2) < 0.9 for m in masks)
    assert 0 < run.gauges["vitcod_kept"] < 0.9
    assert set(exported(run)) == set(run.base)
    assert run.evaluate
    with traced(run.model) as found:
        run.evaluate(lambda model: generate(model, torch.tensor([1, 2, 3]), 4, 0.0))
    assert {"order", "dense"} <= set(next(iter(found.values())).trace.details)


def test_exported_weights_give_the_same_as_mixed_heads() -> None:
    run = run_of(recipe(example("vitcod", theta=1.0)))
    step(run)
    plain = run_of(recipe())
    load_weights(plain.model, exported(run), lambda name: True)
    scores = []
    for each in (run, plain):
        assert each.evaluate
        scores.append(each.evaluate(lambda model: run.task.loss(model, run.batch(0))))
    torch.testing.assert_close(*scores)


def test_says_what_it_cannot_mask() -> None:
    with pytest.raises(UserError, match="no fixed places"):
        run_of(recipe_for("masked-image", "vitcod"))
    with pytest.raises(UserError, match="another sequence"):
        run_of(replace(recipe_for("seq2seq"), techniques=(example("vitcod", targets="cross"), example("sgd"))))
    said = run_of(recipe_for("seq2seq", "vitcod")).remarks
    assert any("decoder.blocks.0.cross" in remark for remark in said)
