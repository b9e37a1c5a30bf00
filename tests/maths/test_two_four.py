"""2:4 masks, the two rules that train under them, and packed storage."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from scrimp.errors import UserError
from scrimp.numerics.semi import Semi, linear
from scrimp.run import Run, exported
from scrimp.sparse.patterns import Pattern, both_ways, of_groups, transposable
from scrimp.techniques.sparsity.two_four import Mask, Product, TwoFour, fast, mask_of
from tiny import example, recipe, run_of, step

SMALL = {"layers": 1, "width": 32, "heads": 2, "dropout": 0.0}


def masks(run: Run) -> dict[str, torch.Tensor]:
    return {name: b.clone() for name, b in run.model.named_buffers() if name.endswith("two_four.mask")}


def scored(run: Run) -> float:
    """Loss on the first batch, evaluated as the run does."""
    assert run.evaluate is not None
    return run.evaluate(lambda model: run.task.evaluate(model, [run.batch(0)]))["loss"]


def a_run(*more: Any, **settings: Any) -> Run:
    return run_of(recipe(TwoFour(**settings), *more, model=SMALL))


def test_a_mask_by_hand() -> None:
    weight = torch.tensor([[1.0, -4, 2, 3, 0.5, 0, -0.25, 0.125]])
    mask = Mask(weight, both=False)
    assert int(mask.choose(weight)) == 4
    assert mask.mask.int().tolist() == [[0, 1, 0, 1, 1, 0, 1, 0]]
    assert mask(weight).tolist() == [[0, -4, 0, 3, 0.5, 0, -0.25, 0]]
    assert int(mask.choose(weight)) == 0
    weight[0, 2] = 3.5
    assert int(mask.choose(weight)) == 2, "one goes and one comes"


def test_there_are_90_ways_both_ways() -> None:
    ways = both_ways()
    every = torch.tensor(list(itertools.product([False, True], repeat=16)))
    blocks = every.view(-1, 4, 4)
    valid = every[(blocks.sum(1) == 2).all(1) & (blocks.sum(2) == 2).all(1)]
    assert len(valid) == 90
    assert {tuple(w.tolist()) for w in valid} == {tuple(w.tolist()) for w in ways}


def test_transposable_masks_are_valid_and_the_best() -> None:
    score = torch.rand(8, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = transposable(score)
    assert (mask.view(8, 3, 4).sum(2) == 2).all() and (mask.t().reshape(12, 2, 4).sum(2) == 2).all()
    pairs = list(itertools.combinations(range(4), 2))
    for top, left in itertools.product((0, 4), (0, 4, 8)):
        block = score[top : top + 4, left : left + 4]
        best = max(sum(float(block[r, c]) for r, two in enumerate(four) for c in two)
                   for four in itertools.product(pairs, repeat=4)
                   if sorted(c for two in four for c in two) == [0, 0, 1, 1, 2, 2, 3, 3])  # fmt: skip
        assert float((block * mask[top : top + 4, left : left + 4]).sum()) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_the_gradient_is_straight_and_decays_what_is_not_used(decay: float) -> None:
    """One step of SGD, against the rule written out on a copy whose weights are masked before."""
    run = a_run(example("sgd", lr=0.5, momentum=0.0), targets="mlp.*", decay=decay)
    plain = run_of(recipe(example("sgd", lr=0.5, momentum=0.0), model=SMALL))
    chosen = masks(run)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    with torch.no_grad():
        for name, p in plain.model.named_parameters():
            mask = chosen.get(name.replace(".weight", ".two_four.mask"))
            p.copy_(before[name] if mask is None else before[name] * mask)
    batch = plain.batch(0)
    assert plain.backward
    plain.backward(batch, plain.task.count(batch))
    grads = {name: p.grad for name, p in plain.model.named_parameters()}
    rate = run.set_lr()
    step(run)
    for name, p in run.model.named_parameters():
        grad, mask = grads[name], chosen.get(name.replace(".weight", ".two_four.mask"))
        assert grad is not None
        pull = 0 if mask is None else decay * before[name] * ~mask
        torch.testing.assert_close(p.detach(), before[name] - rate * (grad + pull))
    assert len(chosen) == 2 and all(mask.float().mean() == 0.5 for mask in chosen.values())


def test_masks_move_every_few_steps_and_say_how_much() -> None:
    run = a_run(example("sgd", lr=1.0), every=3)
    for at in range(1, 7):
        old = masks(run)
        step(run)
        new = masks(run)
        moved = sum(int((old[name] != new[name]).sum()) for name in old)
        assert run.gauges["two_four_changed"] == moved
        assert (moved > 0) == (at % 3 == 0)
        fresh = {name: of_groups(run.model.get_submodule(name.removesuffix(".two_four.mask")).weight.abs(),  # type: ignore[union-attr, operator]
                                 Pattern.parse("2:4")) for name in new}  # fmt: skip
        assert all(torch.equal(new[name], fresh[name]) for name in new) == (at % 3 == 0)


def test_decay_settles_masks() -> None:
    """SAD, the sum over steps of |m_t - m_{t-1}|, of the same run with and without the decay."""
    total = dict.fromkeys((0.0, 0.2), 0.0)
    for decay in total:
        run = a_run(example("sgd", lr=1.0), decay=decay, targets="mlp.*")
        for _ in range(25):
            step(run)
            total[decay] += run.gauges["two_four_changed"]
    assert 0 < total[0.2] < 0.7 * total[0.0]


@pytest.mark.parametrize("both", [False, True])
def test_export_is_masked_and_plain(both: bool) -> None:
    run = a_run(example("ema"), transposable=both)
    step(run)
    named, kept = exported(run), masks(run)
    assert set(named) == run.base
    for name, mask in kept.items():
        weight = named[name.replace(".two_four.mask", ".weight")]
        assert torch.equal(weight != 0, mask)
        assert not both or (mask.t().reshape(mask.shape[1], -1, 4).sum(2) == 2).all()
    plain = run_of(recipe(model=SMALL))
    plain.model.load_state_dict(named, strict=False)
    losses = [scored(one) for one in (run, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_odd_sizes_and_empty_patterns_are_refused_by_name() -> None:
    wide = {"layers": 1, "width": 30, "heads": 2, "dropout": 0.0}
    with pytest.raises(UserError, match=r"qkv\.weight` of 90 x 30 does not divide into parts of 4"):
        run_of(recipe(TwoFour(), model=wide))
    tall = {"layers": 1, "width": 32, "heads": 2, "dropout": 0.0, "hidden": 66}
    with pytest.raises(UserError, match=r"mlp\.up\.weight` of 66 x 32"):
        run_of(recipe(TwoFour(targets="mlp.up", transposable=True), model=tall))
    with pytest.raises(UserError, match="matches no linear layer"):
        a_run(targets="mpl.*")


@pytest.mark.parametrize(
    ("dtype", "share"), [(torch.float16, 36 / 64), (torch.int8, 20 / 32), (torch.float64, 0.515625)]
)
def test_packed_storage_is_exact(dtype: torch.dtype, share: float) -> None:
    torch.manual_seed(0)
    weight = torch.randint(-99, 99, (5, 24)).to(dtype)
    mask = of_groups(torch.rand(5, 24), Pattern.parse("2:4"))
    kept = Semi.pack(weight, mask)
    assert kept.nbytes == share * weight.nbytes
    assert torch.equal(kept.dense(), weight * mask)
    odd = Semi.pack(weight[:, :20], mask[:, :20])
    assert torch.equal(odd.dense(), (weight * mask)[:, :20])
    with pytest.raises(UserError, match="2 of every 4"):
        Semi.pack(weight, torch.ones_like(mask))


def test_the_packed_product_equals_the_masked_dense_one() -> None:
    """Bit for bit where both add the four of a group first; and where no sum rounds, whatever the order."""
    torch.manual_seed(0)
    x, weight = torch.randn(3, 7, 24, dtype=torch.float64), torch.randn(70, 24, dtype=torch.float64)
    mask = of_groups(weight.abs(), Pattern.parse("2:4"))
    dense = weight * mask
    four = (x[..., None, :] * dense).unflatten(-1, (-1, 4))
    want = ((four[..., 0] + four[..., 1]) + (four[..., 2] + four[..., 3])).sum(-1)
    got = linear(x, Semi.pack(weight, mask))
    assert torch.equal(got, want)
    torch.testing.assert_close(got, F.linear(x, dense), rtol=1e-13, atol=1e-13)
    whole = [(t * 8).round() for t in (x, weight)]
    assert torch.equal(linear(whole[0], Semi.pack(whole[1], mask)), F.linear(whole[0], whole[1] * mask))


def test_a_cpu_has_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The product for GPUs falls back to the dense one, and a run on a CPU says what it is."""
    weight = torch.randn(64, 64).half()
    assert not fast(weight)
    x, bias = torch.randn(2, 3, 64).half(), torch.randn(64).half()
    assert torch.equal(Product(False)(x, weight, bias), F.linear(x, weight, bias))
    run = a_run()
    assert any("emulated on a CPU" in said for said in run.remarks)
    assert all(mask_of(layer).mask.any() for layer in TwoFour()._layers(run).values())


def test_the_sparse_product_has_the_dense_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a dense stand-in for the kernel: what is saved, transposed and handed back."""
    from scrimp.techniques.sparsity import two_four

    monkeypatch.setattr(two_four, "fast", lambda weight: True)
    monkeypatch.setattr(two_four, "sparse_product", lambda x, weight: x @ weight.t())
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 8), (4, 8), (4,)))
    g = torch.randn(2, 3, 4, dtype=torch.float64)
    want = torch.autograd.grad(F.linear(x, weight, bias), (x, weight, bias), g)
    for both in (False, True):
        for ours, theirs in zip(
            torch.autograd.grad(Product(both)(x, weight, bias), (x, weight, bias), g), want, strict=True
        ):
            torch.testing.assert_close(ours, theirs)
