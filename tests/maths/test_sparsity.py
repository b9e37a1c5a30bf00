"""Masks and the methods that own them, against sums, Hessians and closed forms worked out beside them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scrimp.arrange import clash
from scrimp.errors import UserError
from scrimp.run import Run, exported
from scrimp.sparse.allocation import counts, densities
from scrimp.sparse.dynamic import FIRED, Calendar
from scrimp.sparse.exchange import cosine, exchanged, signed_key
from scrimp.sparse.masks import MASK, linear_weights, random_mask
from scrimp.sparse.patterns import Pattern, best
from scrimp.sparse.scores import grasp, snip
from scrimp.techniques.sparsity.lottery import REWIND, Lottery
from scrimp.training import train
from tiny import example, flat, recipe, run_of, step

MOVING = ["set", "rigl"]
ALL = ["static_sparse", "snip", "grasp", "set", "rigl", "lottery"]
# blocks.*: 4 blocks of qkv 96 x 32, proj 32 x 32, up 128 x 32, down 32 x 128.
PRUNABLE = 4 * (96 * 32 + 32 * 32 + 2 * 128 * 32)


def masks_of(run: Run, name: str) -> dict[str, Tensor]:
    return {n.removesuffix(MASK): m for n, m in run.memories[name].items() if n.endswith(MASK)}


def left(run: Run, name: str) -> int:
    return int(sum(m.sum() for m in masks_of(run, name).values()))


def assert_masked(run: Run, name: str) -> None:
    """Weights and moments are zero where the mask is."""
    assert run.optimizer is not None
    for path, mask in masks_of(run, name).items():
        p = run.model.get_parameter(path)
        assert not p[~mask].any()
        for value in run.optimizer.state[p].values():
            if value.shape == p.shape:
                assert value[mask].any()
                assert not value[~mask].any()


# ---- allocation


def test_erk_of_a_case_solved_by_hand() -> None:
    """Sizes 4 and 100, target 22 of 104: eps = 22 / (4 + 20) gives the small one 0.917; at 30 it is full."""
    shapes = {"small": (2, 2), "big": (10, 10)}
    found = densities(shapes, 22 / 104, "erk")
    assert found["small"] == pytest.approx(22 / 24)
    assert found["big"] == pytest.approx(22 / 24 * 0.2)
    assert densities(shapes, 30 / 104, "erk") == {"small": 1.0, "big": pytest.approx(26 / 100)}
    assert counts(shapes, 30 / 104, "erk") == {"small": 4, "big": 26}


@pytest.mark.parametrize("kind", ["erk", "uniform", "first_dense"])
@pytest.mark.parametrize("density", [0.03, 0.044, 0.1, 0.5, 0.97, 1.0])
def test_counts_sum_to_the_target(kind: str, density: float) -> None:
    shapes = {"a": (7, 3), "b": (64, 128), "c": (128, 10), "d": (33, 65)}
    found = counts(shapes, density, kind)
    assert sum(found.values()) == round(density * (21 + 8192 + 1280 + 2145))
    assert all(1 <= found[n] <= r * c for n, (r, c) in shapes.items())
    if kind == "first_dense":
        assert found["a"] == 21


def test_a_first_layer_that_is_too_large_is_refused() -> None:
    with pytest.raises(UserError, match="first layer alone"):
        counts({"a": (10, 10), "b": (10, 10)}, 0.3, "first_dense")


# ---- patterns


def test_the_best_weights_of_all_layers_together_and_one_of_each() -> None:
    scores = {"a": torch.tensor([[9.0, 8.0], [7.0, 6.0]]), "b": torch.tensor([[1.0, 2.0]])}
    found = best(scores, 3, Pattern.parse("weights"))
    assert found["a"].tolist() == [[True, True], [False, False]]
    assert found["b"].tolist() == [[False, True]]


def test_blocks_and_groups() -> None:
    score = torch.tensor([[1.0, 1, 0, 3], [1, 1, 0, 0], [0, 0, 5, 0], [0, 0, 0, 0]])
    block = best({"a": score}, 8, Pattern.parse("2x2"))["a"]
    assert block.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    chance = torch.rand(6, 8)
    groups = best({"a": chance}, 0, Pattern.parse("2:4"))["a"]
    assert (groups.view(-1, 4).sum(1) == 2).all()
    kept = torch.where(groups, chance, 9).view(-1, 4).amin(1)
    assert (kept > torch.where(groups, -1, chance).view(-1, 4).amax(1)).all()
    with pytest.raises(UserError, match="divide"):
        run_of(recipe(example("snip", pattern="5x5")))
    for text in ("2x3", "4:2", "half"):
        with pytest.raises(UserError, match="pattern"):
            Pattern.parse(text)


# ---- scores


def net(chance: torch.Generator) -> tuple[list[Tensor], Any]:
    """A net of 5, 4 and 3 in float64: its two matrices, and the loss of them."""
    x = torch.randn(6, 5, generator=chance, dtype=torch.float64)
    y = torch.randint(0, 3, (6,), generator=chance)
    weights = [torch.randn(4, 5, generator=chance, dtype=torch.float64, requires_grad=True),
               torch.randn(3, 4, generator=chance, dtype=torch.float64, requires_grad=True)]  # fmt: skip

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return nn.functional.cross_entropy((x @ a.T).tanh() @ b.T, y, reduction="sum")

    return weights, loss


def test_snip_is_the_derivative_by_a_factor_on_each_weight() -> None:
    weights, loss = net(torch.Generator().manual_seed(1))
    score = torch.cat([s.flatten() for s in snip(weights, torch.autograd.grad(loss(*weights), weights))])
    factors = [torch.ones_like(w, requires_grad=True) for w in weights]
    by_factor = torch.autograd.grad(loss(*[w.detach() * c for w, c in zip(weights, factors, strict=True)]), factors)
    torch.testing.assert_close(score, torch.cat([g.abs().flatten() for g in by_factor]), rtol=0, atol=1e-15)
    change = []
    for w in weights:
        for i in range(w.numel()):
            with torch.no_grad():
                before, kept = loss(*weights), w.flatten()[i].item()
                w.view(-1)[i] = 0
                change.append(float((loss(*weights) - before).abs()))
                w.view(-1)[i] = kept
    ranks = torch.stack([score.detach().argsort().argsort(), torch.tensor(change).argsort().argsort()]).double()
    assert torch.corrcoef(ranks)[0, 1] > 0.6


def test_grasp_is_minus_w_times_the_hessian_times_the_gradient() -> None:
    weights, loss = net(torch.Generator().manual_seed(2))
    leaves = [nn.Parameter(w.detach()) for w in weights]
    halves = [lambda: 0.25 * loss(*leaves), lambda: 0.75 * loss(*leaves)]
    found = torch.cat([s.flatten() for s in grasp(halves, leaves, lambda g: g)])

    def of_flat(flat_weights: Tensor) -> Tensor:
        return loss(flat_weights[:20].view(4, 5), flat_weights[20:].view(3, 4))

    w = torch.cat([p.detach().flatten() for p in weights])
    hessian = torch.autograd.functional.hessian(of_flat, w)
    gradient = torch.autograd.functional.jacobian(of_flat, w)
    torch.testing.assert_close(found, -w * (hessian @ gradient), rtol=0, atol=1e-12)


def test_grasp_is_half_of_how_much_the_squared_gradient_rises_without_a_weight() -> None:
    weights, loss = net(torch.Generator().manual_seed(3))
    leaves = [nn.Parameter(w.detach()) for w in weights]
    score, small = grasp([lambda: loss(*leaves)], leaves, lambda g: g)[0].flatten(), 1e-6

    def squared(first: Tensor) -> float:
        grads = torch.autograd.grad(loss(first, leaves[1]), [first, leaves[1]])
        return float(sum(g.square().sum() for g in grads))

    whole = leaves[0].detach()
    for i in range(whole.numel()):
        less = whole.clone().flatten()
        less[i] *= 1 - small
        rise = squared(less.view(4, 5).requires_grad_()) - squared(whole.clone().requires_grad_())
        assert rise / small == pytest.approx(2 * float(score[i]), rel=1e-3, abs=1e-6)


def test_removing_the_largest_of_grasp_keeps_more_of_the_gradient_than_removing_the_smallest() -> None:
    norms: dict[bool, float] = {True: 0.0, False: 0.0}
    for seed in range(8):
        weights, loss = net(torch.Generator().manual_seed(seed))
        leaves = [nn.Parameter(w.detach()) for w in weights]
        scores = {str(i): s for i, s in enumerate(grasp([lambda: loss(*leaves)], leaves, lambda g: g))}  # noqa: B023
        for largest in (True, False):
            keep = best({n: -s if largest else s for n, s in scores.items()}, 24, Pattern())
            pruned = [nn.Parameter(p.detach() * m) for p, m in zip(leaves, keep.values(), strict=True)]
            grads = torch.autograd.grad(loss(*pruned), pruned)
            masked = [g * m for g, m in zip(grads, keep.values(), strict=True)]
            norms[largest] += float(torch.stack([g.square().sum() for g in masked]).sum().sqrt())
    assert norms[True] > 1.5 * norms[False]


def dense_scores(run: Run) -> dict[str, Tensor]:
    """|w g| of the first batch without dropout, by plain differentiation."""
    run.model.eval()
    batch = run.batch(0)
    (run.task.loss(run.model, batch) / run.task.count(batch)).backward()
    return {n: (p * p.grad).detach().abs() for n in linear_weights(run.model) if "blocks" in n  # type: ignore[operator]
            for p in (run.model.get_parameter(n),)}  # fmt: skip


@pytest.mark.parametrize("also", [[], [example("accumulate")], [example("sam")]])
def test_snip_keeps_the_most_sensitive_weights_of_the_first_batch(also: list[Any]) -> None:
    run = run_of(recipe(example("snip", density=0.1), *also, dtype="float64"))
    scores = dense_scores(run_of(recipe(dtype="float64")))
    step(run)
    masks = masks_of(run, "snip")
    assert left(run, "snip") == round(0.1 * PRUNABLE)
    kept = torch.cat([scores[n][m] for n, m in masks.items()])
    gone = torch.cat([scores[n][~m] for n, m in masks.items()])
    assert kept.min() >= gone.max() * (1 - 1e-9)
    before = {n: m.clone() for n, m in masks.items()}
    step(run)
    assert all(torch.equal(before[n], m) for n, m in masks_of(run, "snip").items()), "scored once"


def test_grasp_does_not_notice_parts_of_a_batch_or_recomputation() -> None:
    masks = []
    for settings, also in (({}, []), ({"parts": 3}, []), ({}, [example("recompute")])):
        run = run_of(recipe(example("grasp", density=0.2, **settings), *also, dtype="float64"))
        step(run)
        masks.append(masks_of(run, "grasp"))
        assert left(run, "grasp") == round(0.2 * PRUNABLE)
    for other in masks[1:]:
        assert all(torch.equal(masks[0][n], m) for n, m in other.items())


def test_grasp_names_its_head() -> None:
    with pytest.raises(UserError, match="matches no module"):
        run_of(recipe(example("grasp", head="nothing")))
    run_of(recipe(example("grasp", head="nothing", temperature=1.0)))


# ---- drop and growth


def test_drop_and_growth_of_a_row_by_hand() -> None:
    key = torch.tensor([[5.0, 1.0, 3.0, 9.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, True, False, False, False]])
    score = torch.tensor([[99.0, 0.0, 0.0, 1.0, 3.0, 2.0]])
    assert exchanged(key, mask, 3, 1, score).int().tolist() == [[1, 0, 1, 0, 1, 0]]
    again = score.index_fill(1, torch.tensor([1]), 50.0)
    assert torch.equal(exchanged(key, mask, 3, 1, again), mask), "what is dropped may be grown at once"


def test_the_signed_drop_takes_the_same_share_of_both_signs() -> None:
    w = torch.tensor([[0.1, 5.0, 6.0, 7.0, -3.0, -4.0, 0.2, 0.0]])
    mask = torch.tensor([[True, True, True, True, True, True, False, True]])
    torch.testing.assert_close(
        signed_key(w, mask), torch.tensor([[0.25, 0.5, 0.75, 1.0, 0.5, 1.0, 0.0, 0.0]], dtype=torch.float64)
    )


def test_the_share_falls_from_alpha_to_zero() -> None:
    assert cosine(0.3, 0.0, 0.0) == 0.3
    assert cosine(0.3, 0.0, 0.5) == pytest.approx(0.15)
    assert cosine(0.3, 0.0, 1.0) == 0.0
    run: Any = run_of(recipe(example("rigl", explore=True), duration="100 step"))
    calendar = run.order.techniques[0]._calendar(run)
    assert (calendar.first, calendar.last, calendar.until) == (0.5, 0.005, 100)
    assert Calendar(2, 6, 0.3, 0.0).due(run) is False, "never at the first step"


@pytest.mark.parametrize("rule", ["adamw", "lion", "muon", "sgd"])
@pytest.mark.parametrize("name", MOVING)
def test_the_density_is_constant_and_moments_of_pruned_weights_are_zero(name: str, rule: str) -> None:
    settings = {"momentum": 0.9} if rule == "sgd" else {}
    run = run_of(recipe(example(name, density=0.1, until=1.0), example(rule, **settings), dtype="float64"))
    before = {n: m.clone() for n, m in masks_of(run, name).items()}
    for _ in range(7):
        step(run)
        assert left(run, name) == round(0.1 * PRUNABLE)
        assert_masked(run, name)
    after = masks_of(run, name)
    assert all(int(before[n].sum()) == int(after[n].sum()) for n in after)
    assert any(not torch.equal(before[n], after[n]) for n in after)
    fired = sum(int(v.sum()) for n, v in run.memories[name].items() if n.endswith(FIRED))
    assert run.gauges[f"{name}_exploration"] == fired / PRUNABLE > 0.1
    assert run.gauges[f"{name}_density"] == round(0.1 * PRUNABLE) / PRUNABLE


@pytest.mark.parametrize("name", MOVING)
def test_masks_that_will_never_move_are_remarked(name: str) -> None:
    said = [run_of(recipe(example(name, interval=f"{n} step", until=0.5))).remarks for n in (3, 4)]
    assert [any("never exchanges" in remark for remark in remarks) for remarks in said] == [False, True]


@pytest.mark.parametrize("name", MOVING)
def test_a_remembered_direction_revives_no_pruned_weight(name: str) -> None:
    """LookSAM keeps one of an exchange's dense gradients, and adds it after gradients are masked."""
    parts = example(name, density=0.1, until=1.0), example("looksam", k=2, rho=0.5), example("adamw")
    run = run_of(recipe(*parts, dtype="float64"))
    for _ in range(5):
        step(run)
        assert_masked(run, name)


@pytest.mark.parametrize("name", MOVING)
def test_growth_alone_leaves_the_outputs_as_they_are(name: str) -> None:
    """Without the drop: the weights that stay are bit-identical, and new ones are zero."""
    run = run_of(recipe(example(name, density=0.1, until=1.0), example("sgd", lr=0.0), dtype="float64"))
    step(run)
    step(run)
    weights = {n: run.model.get_parameter(n).detach().clone() for n in masks_of(run, name)}
    masks = {n: m.clone() for n, m in masks_of(run, name).items()}
    step(run)
    for n, new in masks_of(run, name).items():
        w = run.model.get_parameter(n)
        assert not w[new & ~masks[n]].any()
        assert torch.equal(w[new & masks[n]], weights[n][new & masks[n]])


def test_rigl_grows_where_the_dense_gradient_is_largest_and_does_not_update() -> None:
    run = run_of(recipe(example("rigl", density=0.1, until=1.0), example("sgd", lr=0.1), dtype="float64"))
    for _ in range(2):
        step(run)
    masks = {n: m.clone() for n, m in masks_of(run, "rigl").items()}
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    batch = run.batch(2)
    (run.task.loss(run.model, batch) / run.task.count(batch)).backward()
    grads = {n: run.model.get_parameter(n).grad.abs() for n in masks}  # type: ignore[union-attr]
    run.model.zero_grad()
    step(run)
    for n, new in masks_of(run, "rigl").items():
        active = int(masks[n].sum())
        count = round(0.3 * 0.5 * (1 + math.cos(math.pi * 2 / 8)) * active)
        ordered = torch.where(masks[n], before[n].abs(), 9e9).flatten().sort().indices
        dropped = torch.zeros(new.numel(), dtype=torch.bool).index_fill(0, ordered[:count], True).view(new.shape)
        inactive = ~masks[n] | dropped
        grown = new & inactive
        assert int(grown.sum()) == count
        assert grads[n][grown].min() >= grads[n][inactive & ~new].max()
    others = [n for n in before if n not in masks]
    assert all(torch.equal(before[n], run.model.get_parameter(n)) for n in others), "no update"


def test_random_growth_explores_as_the_closed_form_says() -> None:
    """Unseen after exchanges of shares z: (1 - D) times the product of 1 - z D / (1 - D + z D)."""
    size, density, share = 40_000, 0.1, 0.3
    active = round(size * density)
    mask = random_mask((200, 200), active, 0, "x", torch.device("cpu"))
    fired, chance = mask.clone(), torch.Generator().manual_seed(0)
    unseen = 1 - density
    for _ in range(20):
        key = torch.rand(200, 200, generator=chance)
        mask = exchanged(key, mask, active, round(share * active), torch.rand(200, 200, generator=chance))
        fired |= mask
        unseen *= 1 - share * density / (1 - density + share * density)
    assert int(mask.sum()) == active
    assert float(fired.float().mean()) == pytest.approx(1 - unseen, abs=0.01)


# ---- the lottery


def rounds_of(*more: Any, **settings: Any) -> list[tuple[Run, dict[str, Tensor]]]:
    """The run of every round, and its state as it began."""
    seen: list[tuple[Run, dict[str, Tensor]]] = []

    def see(event: str, fields: dict[str, Any]) -> None:
        if event == "stage":
            seen.append((fields["run"], flat(fields["run"].state())))

    made = recipe(Lottery(**settings), *(more or (example("adamw"),)), dtype="float64", duration="12 step")
    train(made, save=False, observe=see)
    return seen


@pytest.mark.parametrize("rewind", [0.0, 0.5])
def test_survivors_go_back_bit_for_bit_and_the_smallest_are_gone(rewind: float) -> None:
    seen = rounds_of(rounds=2, fraction=0.2, rewind=rewind)
    assert len(seen) == 3
    total = PRUNABLE
    for (before, _), (after, began) in itertools.pairwise(seen):
        total -= math.ceil(0.2 * total)
        assert left(after, "lottery") == total
        gone, kept = [], []
        for name, p in after.model.named_parameters():
            back = began[f"memory.lottery/{name}{REWIND}"]
            mask = masks_of(after, "lottery").get(name, torch.ones_like(p, dtype=torch.bool))
            assert torch.equal(began[f"model/{name}"], back * mask)
            if name in masks_of(after, "lottery"):
                trained, old = before.model.get_parameter(name).detach().abs(), masks_of(before, "lottery")[name]
                assert not (mask & ~old).any()
                gone.append(trained[old & ~mask])
                kept.append(trained[mask])
        assert torch.cat(gone).max() <= torch.cat(kept).min()
        assert not [n for n in began if n.startswith("optimizer.")], "moments begin anew"
    first = {n.removeprefix("model/"): t for n, t in seen[0][1].items() if n.startswith("model/")}
    same = [torch.equal(first[n], seen[1][1][f"memory.lottery/{n}{REWIND}"]) for n in first]
    assert all(same) if rewind == 0 else not all(same)
    assert_masked(seen[-1][0], "lottery")


@pytest.mark.parametrize("name", ["snip", "grasp", "lottery"])
def test_blocks_that_do_not_divide_are_refused_at_the_start(name: str) -> None:
    with pytest.raises(UserError, match=rf"techniques\.{name}\.pattern: .* does not divide into parts of 5"):
        run_of(recipe(example(name, pattern="5x5")))


def test_a_first_layer_with_too_many_weights_is_told_with_its_technique() -> None:
    with pytest.raises(UserError, match=r"techniques\.static_sparse: the first layer alone"):
        run_of(recipe(example("static_sparse", allocation="first_dense", density=0.01)))


def test_a_density_without_rounds_is_refused() -> None:
    with pytest.raises(UserError, match="0 rounds prune nothing"):
        Lottery(rounds=0, density=0.1)


def test_the_density_of_the_end_can_be_asked_for() -> None:
    assert left(rounds_of(rounds=2, density=0.044)[-1][0], "lottery") == round(0.044 * PRUNABLE)


@pytest.mark.parametrize("control", ["reinit", "shuffle"])
def test_controls_keep_the_counts_of_every_layer(control: str) -> None:
    ticket, other = rounds_of(rounds=1), rounds_of(rounds=1, control=control)
    moved = 0
    for name, mask in masks_of(ticket[1][0], "lottery").items():
        changed = masks_of(other[1][0], "lottery")[name]
        assert int(mask.sum()) == int(changed.sum())
        moved += int(not torch.equal(mask, changed))
        if control == "reinit":
            began = other[1][1][f"model/{name}"]
            assert not torch.equal(began, ticket[1][1][f"model/{name}"])
            assert set(began[mask].tolist()) <= set(ticket[1][1][f"memory.lottery/{name}{REWIND}"].flatten().tolist())
    assert (moved > 0) == (control == "shuffle")


def test_the_schedule_runs_once_a_round() -> None:
    """Two rounds of 8 of which the second skips 2: 14 steps, the second one begins at step 8."""
    run = run_of(recipe(Lottery(rounds=1, rewind=0.25), duration="14 step"))
    assert run.clock.at(run.order.techniques[0].stages()[0]) == 8
    factor = run.order.techniques[0].schedule(lambda share: share, run)
    found = [factor(i / 14) for i in range(14)]
    assert found == pytest.approx([i / 8 for i in (*range(8), *range(2, 8))])


# ---- beside others


@pytest.mark.parametrize("name", ALL)
def test_exported_and_averaged_weights_are_masked(name: str) -> None:
    run = run_of(recipe(example(name), example("ema"), example("adamw"), dtype="float64"))
    for _ in range(3):
        step(run)
    masks, plain = masks_of(run, name), exported(run)
    seen: list[bool] = []
    assert run.evaluate
    run.evaluate(lambda model: seen.extend(bool(model.get_parameter(n)[~m].any()) for n, m in masks.items()))
    assert seen
    assert not any(seen)
    for n, mask in masks.items():
        assert not plain[n][~mask].any()
        assert plain[n].abs().sum() > 0


@pytest.mark.parametrize("name", ALL)
def test_refuses_what_it_cannot_stand_beside(name: str) -> None:
    assert "does not go with" in clash(example(name), example("lora"))
    with pytest.raises(UserError, match="matches no weight of a linear layer"):
        run_of(recipe(example(name, params="nothing")))
    for other in ALL:
        assert "sparsity" in clash(example(name, params="blocks.0.*"), example(other, params="blocks.1.*")) or (
            name == other
        )


@pytest.mark.parametrize("name", MOVING)
def test_an_overflow_of_float16_moves_no_mask(name: str) -> None:
    made = recipe(example(name, until=1.0), example("autocast", dtype="float16", scale=1e30), duration="30 step")
    run = run_of(made)
    before = {n: m.clone() for n, m in masks_of(run, name).items()}
    for _ in range(4):
        step(run)
    assert all(torch.equal(before[n], m) for n, m in masks_of(run, name).items())


@pytest.mark.parametrize("name", ["static_sparse", "set", "rigl"])
def test_masks_grow_with_the_blocks(name: str) -> None:
    made = recipe(example(name), example("stack", zero_new=True), example("adamw"), dtype="float64")
    run = train(made, save=False).run
    masks = masks_of(run, name)
    assert len(masks) == 16
    assert 2 * left(run, name) == PRUNABLE
    assert_masked(run, name)


def test_starting_weights_are_masked_from_the_first_step_on() -> None:
    source = {"model": {n: p.detach().clone() for n, p in run_of(recipe()).model.named_parameters()}}
    run = run_of(recipe(example("static_sparse")), source=source)
    for name, mask in masks_of(run, "static_sparse").items():
        w = run.model.get_parameter(name)
        assert not w[~mask].any()
        assert torch.equal(w[mask], source["model"][name][mask])


def test_grasp_removes_the_largest_scores_of_the_first_batch() -> None:
    run = run_of(recipe(example("grasp", density=0.3, temperature=1.0), dtype="float64"))
    other = run_of(recipe(dtype="float64"))
    other.model.eval()
    names = list(masks_of(run, "grasp"))
    weights = [other.model.get_parameter(n) for n in names]
    batch = other.batch(0)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = other.task.loss(other.model, batch) / other.task.count(batch)
        grads = torch.autograd.grad(loss, weights, create_graph=True)
        half = torch.stack([g.square().sum() for g in grads]).sum() / 2
        scores = {
            n: -w.detach() * h for n, w, h in zip(names, weights, torch.autograd.grad(half, weights), strict=True)
        }
    step(run)
    kept = torch.cat([scores[n][m] for n, m in masks_of(run, "grasp").items()])
    gone = torch.cat([scores[n][~m] for n, m in masks_of(run, "grasp").items()])
    assert kept.max() <= gone.min() + 1e-15


@pytest.mark.parametrize("name", ["rigl", "set"])
def test_masks_that_never_move_are_told(name: str) -> None:
    late, soon = (run_of(recipe(example(name, density=0.5, interval=i, until="3 step"))) for i in ("3 step", "2 step"))
    assert [remark for remark in late.remarks if f"{name} never exchanges weights" in remark]
    assert not soon.remarks
    with pytest.raises(UserError, match="interval must be more than 0"):
        example(name, interval=0)


@pytest.mark.parametrize("name", ["snip", "grasp"])
def test_scoring_more_batches_than_the_run_has_is_refused(name: str) -> None:
    run = run_of(recipe(example(name, batches=5), duration="4 step"))
    with pytest.raises(UserError, match="more than the 4 of the run"):
        step(run)
