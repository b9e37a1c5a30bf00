"""Token masking: what is left out equals, exactly, what was masked out, and all else stays as it was."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scrimp.errors import UserError
from scrimp.models.encoder_decoder import EncoderDecoderConfig
from scrimp.models.layers import rotary
from scrimp.models.masked_autoencoder import MaskedAutoencoderConfig
from scrimp.models.subsets import drawn, gathered, scattered, some_mask, some_rope
from scrimp.models.two_towers import ImageTower, TwoTowersConfig
from scrimp.planning import plan
from scrimp.registry import technique_class
from scrimp.tasks.fragment import Fragment, FragmentTask, outputs
from scrimp.tasks.masked_image import MaskedImage
from scrimp.techniques.token_masking.flip import seen
from scrimp.techniques.token_masking.mass import shortened
from scrimp.weights import initialize
from tiny import MODEL, Letters, TinyData, assert_equal, example, flat, recipe, run_of, step
from tiny_tasks import Memory

DOUBLE: dict[str, Any] = {"rtol": 0, "atol": 1e-12}
MASKED = "masked-image, mask tokens"


def tokens_of(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# Subsets of tokens.


def test_subsets_are_ordered_fresh_and_alike_in_chance() -> None:
    sample = torch.arange(4000)
    places = drawn(sample, 7, 10, 4, 1)
    assert places.shape == (4000, 4)
    assert torch.equal(places, places.sort(1).values) and bool((places[:, 1:] > places[:, :-1]).all())
    assert bool((places[:, 0] == 0).all()), "the first token is never dropped"
    counts = torch.bincount(places[:, 1:].flatten(), minlength=10)[1:]
    assert bool(((counts - 4000 / 3).abs() < 120).all())  # four standard deviations
    assert torch.equal(places[5:9], drawn(sample[5:9], 7, 10, 4, 1)), "a function of the sample"
    assert float((places == drawn(sample, 8, 10, 4, 1)).all(1).double().mean()) < 0.05, "another layer, another subset"


def test_what_is_taken_out_comes_back_to_its_place() -> None:
    x, places = tokens_of(0, 2, 5, 3), torch.tensor([[0, 3], [2, 4]])
    taken = gathered(x, places)
    assert torch.equal(taken, torch.stack([x[0, [0, 3]], x[1, [2, 4]]]))
    assert torch.equal(scattered(x, places, taken), x)
    back = scattered(x, places, taken * 0)
    assert torch.equal(back[0, [1, 2, 4]], x[0, [1, 2, 4]]) and float(back[0, [0, 3]].abs().sum()) == 0


def test_masks_and_angles_of_some_tokens() -> None:
    places = torch.tensor([[0, 2], [1, 3]])
    square, row = torch.arange(16).view(1, 1, 4, 4), torch.arange(8).view(2, 1, 1, 4)
    mask, keys = some_mask(square, places), some_mask(row, places)
    assert mask is not None and mask[:, 0].tolist() == [[[0, 2], [8, 10]], [[5, 7], [13, 15]]]
    assert keys is not None and keys[:, 0].tolist() == [[[0, 2]], [[5, 7]]]
    table = torch.arange(8.0).view(4, 2)
    for angles in (table, table[None, None], table.expand(2, 1, 4, 2)):
        found = some_rope((angles, -angles), places)
        assert found is not None
        assert found[0].tolist() == [[[[0, 1], [4, 5]]], [[[2, 3], [6, 7]]]] and torch.equal(found[0], -found[1])
    assert some_mask(None, places) is None and some_rope(None, places) is None


# token_drop.


def dropping(share: float = 0.5, **model: Any) -> Any:
    technique = example("token_drop", keep=share, multiple=1)
    task: dict[str, Any] = {} if model.get("causal", True) else {"task": "masked-lm", "data": Memory("masked-lm")}
    run = run_of(recipe(technique, dtype="float64", model={**MODEL, "dropout": 0.0, **model}, **task))
    run.model.train()
    return run


@torch.no_grad()
@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("causal", [True, False])
def test_a_middle_layer_is_the_layer_among_the_kept_tokens(positions: str, causal: bool) -> None:
    run = dropping(positions=positions, causal=causal)
    x, sample = tokens_of(1, 3, 10, 32), torch.tensor([5, 6, 7])
    rope = rotary(torch.arange(10), run.model.config, x.dtype) if positions == "rotary" else None
    block = run.model.blocks[1]
    y = block(x, rope, None, sample)
    places = block.token_subset(x, sample)
    assert places.shape == (3, 5)
    kept = torch.zeros(3, 10, dtype=torch.bool).scatter(1, places, True)
    assert torch.equal(y[~kept], x[~kept]), "dropped tokens pass by unchanged"
    before = torch.ones(10, 10, dtype=torch.bool).tril() if causal else torch.ones(10, 10, dtype=torch.bool)
    # The whole layer, in which attention is restricted to kept tokens (and each to itself, lest a row be empty).
    mask = (kept[:, None, None, :] & before) | torch.eye(10, dtype=torch.bool)
    whole = block.eval()(x, rope, mask, sample)
    torch.testing.assert_close(y[kept], whole[kept], **DOUBLE)
    assert float((y[kept] - x[kept]).abs().max()) > 1e-3


@torch.no_grad()
def test_masks_of_padding_are_cut_as_well() -> None:
    run = dropping(causal=False)
    x, sample, block = tokens_of(1, 3, 10, 32), torch.tensor([5, 6, 7]), run.model.blocks[2]
    attended = (torch.arange(10) < torch.tensor([10, 7, 4])[:, None])[:, None, None, :]
    y, places = block(x, None, attended, sample), block.token_subset(x, sample)
    kept = torch.zeros(3, 10, dtype=torch.bool).scatter(1, places, True)
    whole = block.eval()(x, None, attended & kept[:, None, None, :], sample)
    torch.testing.assert_close(y[kept], whole[kept], **DOUBLE)


def test_first_and_last_layers_and_validation_see_all() -> None:
    run = dropping()
    parts = [hasattr(block, "token_subset") for block in run.model.blocks]
    assert parts == [False, True, True, False]
    plain = run_of(recipe(dtype="float64", model={**MODEL, "dropout": 0.0}))
    tokens = run.batch(0)["tokens"]
    assert torch.equal(run.model.eval()(tokens), plain.model.eval()(tokens))
    each = [block.token_subset(tokens_of(0, 4, 16, 32), torch.arange(4)) for block in list(run.model.blocks)[1:3]]
    assert not torch.equal(*each), "another subset in each layer"


def test_the_kept_length_grows_to_everything() -> None:
    technique = example("token_drop", keep=0.25, until=0.5, levels=3, multiple=2)
    assert technique.stages() == pytest.approx((0.5 / 3, 1 / 3, 0.5))
    made, found = recipe(technique, duration="12 step"), []
    for stage, cuts in enumerate([[], [2], [2, 4], [2, 4, 6]]):
        run = run_of(made)
        run.clock.cuts, run.clock.stage = cuts, stage
        from scrimp.run import build

        block: Any = build(made, run.data, run.clock).model.blocks[1]  # type: ignore[index]
        places = block.token_subset(torch.zeros(1, 16, 1), torch.zeros(1).long()) if stage < 3 else None
        found.append(16 if places is None else places.shape[1])
    assert found == [4, 8, 12, 16]


@torch.no_grad()
def test_both_passes_of_a_step_drop_the_same() -> None:
    run = dropping()
    batch = run.batch(0)
    first, second = (run.task.loss(run.model, batch) for _ in range(2))
    assert float(first) == float(second)
    assert float(first) != float(run.task.loss(run.model, run.batch(1)))


def test_a_model_without_middle_layers_is_refused() -> None:
    with pytest.raises(UserError, match="no middle layers"):
        run_of(recipe(example("token_drop"), model={**MODEL, "layers": 2}))


# token_drop by loss.


def ranked(*more: str, **settings: Any) -> Any:
    technique = example("token_drop", mode="loss", multiple=1, **settings)
    chosen = (technique, *(example(name) for name in more))
    run = run_of(recipe(*chosen, dtype="float64", model={**MODEL, "dropout": 0.0, "causal": False},
                        task="masked-lm", data=Memory("masked-lm")))  # fmt: skip
    run.model.train()
    return run


def subset_of(run: Any, block: int = 1) -> Any:
    return run.model.blocks[block].token_subset


def test_hard_tokens_are_kept_after_special_ones_and_before_padding() -> None:
    run = ranked()
    run.memories["token_drop"]["loss"].copy_(torch.arange(32.0))
    # 0 to 2 are special; the last two places of the second text are padding.
    ids = torch.tensor([[5, 9, 1, 30, 7, 8, 3, 4], [4, 3, 10, 9, 2, 6, 31, 30]])
    run.model.embed(ids)
    mask = torch.tensor([[True] * 8, [True] * 6 + [False] * 2])[:, None, None, :]
    x, sample = torch.zeros(2, 8, 32), torch.arange(2)
    assert subset_of(run)(x, sample, mask).tolist() == [[0, 1, 2, 3], [0, 2, 3, 4]]
    square = mask & mask.transpose(2, 3)
    assert torch.equal(subset_of(run)(x, sample, square), subset_of(run)(x, sample, mask))
    assert subset_of(run)(x, sample)[1].tolist() == [0, 4, 6, 7]


def test_losses_that_are_alike_leave_a_draw() -> None:
    run, sample = ranked(), torch.arange(50)
    run.model.embed(torch.full((50, 16), 7))
    first, second = (subset_of(run, block)(torch.zeros(50, 16, 1), sample) for block in (1, 2))
    assert torch.equal(first, second), "all middle layers see the same"
    assert torch.equal(first, drawn(sample, subset_of(run).key, 16, 8, 1))


def test_the_running_loss_of_an_id_is_that_of_its_hidden_tokens() -> None:
    run = ranked(smoothing=0.75)
    batch = run.batch(0)
    with torch.no_grad():
        logits = run.task.logits(run.model, batch)
    targets = batch["targets"]
    found = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    step(run)
    expected = torch.full((32,), float(np.log(32)), dtype=torch.float64)
    for number in set(targets[targets >= 0].tolist()):
        mean = float(found[targets.flatten() == number].mean())
        expected[number] = 0.75 * expected[number] + 0.25 * mean
    torch.testing.assert_close(run.memories["token_drop"]["loss"], expected, **DOUBLE)


@pytest.mark.parametrize("other", ["recompute", "accumulate", "fused_loss"])
def test_other_execution_ranks_alike(other: str) -> None:
    plain, changed = ranked(), ranked(other)
    for _ in range(2):
        step(plain), step(changed)
    losses = [run.memories["token_drop"]["loss"] for run in (plain, changed)]
    torch.testing.assert_close(*losses, **DOUBLE)
    weights = [run.model.get_parameter("blocks.1.mlp.up.weight") for run in (plain, changed)]
    torch.testing.assert_close(*weights, **DOUBLE)


def test_what_is_hard_is_remembered() -> None:
    run = ranked()
    step(run)
    from scrimp.run import build

    again = build(run.recipe, run.data, replace(run.clock), {kind: dict(table) for kind, table in run.state().items()})
    again.model.train()
    step(run), step(again)
    assert_equal(flat(run.state()), flat(again.state()))
    assert len(set(again.memories["token_drop"]["loss"].tolist())) > 3


def test_a_model_that_would_see_what_is_to_come_is_refused() -> None:
    with pytest.raises(UserError, match=r"token_drop\.mode.*hides none.*masked-lm"):
        run_of(recipe(example("token_drop", mode="loss")))


# flip.


@torch.no_grad()
def test_a_tower_of_kept_patches_is_the_tower_restricted_to_them() -> None:
    config = TwoTowersConfig(**MODEL | {"dropout": 0.0}, image=16, channels=3, patch=4, vocab=8, context=4)
    tower = ImageTower(config.image_trunk(), 16, 4, 3, first=0).double()
    initialize(tower, 0)
    images, kept = tokens_of(3, 2, 3, 16, 16), torch.tensor([[0, 5, 9, 15], [1, 2, 3, 12]])
    seen_, whole = [], tower.blocks
    read = torch.zeros(2, 17, dtype=torch.bool).scatter(1, kept + 1, True)
    read[:, 0] = True
    some = tower(images, kept=kept)
    forwards = [block.forward for block in whole]
    for block, forward in zip(whole, forwards, strict=True):
        block.forward = lambda x, sample=None, forward=forward: (  # type: ignore[method-assign]
            seen_.append(x.shape[1]), forward(x, mask=read[:, None, None, :], sample=sample))[1]  # fmt: skip
    torch.testing.assert_close(some, tower(images), **DOUBLE)
    assert set(seen_) == {17}
    changed = images.clone()
    changed[0, :, :4, 4:8] += 1  # patch 1 of the first image is left out
    for block, forward in zip(whole, forwards, strict=True):
        block.forward = forward  # type: ignore[method-assign]
    assert torch.equal(tower(changed, kept=kept), some)


def test_every_patch_has_the_same_chance_and_one_is_always_seen() -> None:
    counts = Counter(int(p) for s in range(4000) for p in seen(s, 8, 2))
    assert set(counts) == set(range(8)) and all(abs(n - 1000) < 120 for n in counts.values())
    run = run_of(recipe(example("flip", mask=0.99)))
    assert run.batch(0)["kept"].shape == (4, 1)
    assert torch.equal(run.batch(3)["kept"], run.batch(3)["kept"])
    assert not torch.equal(run.batch(3)["kept"], run.batch(4)["kept"])


def test_the_end_of_the_run_and_validation_see_whole_images() -> None:
    made = recipe(example("flip", mask=0.5, tune=0.25))
    assert made.techniques[0].stages() == (0.75,)
    from scrimp.run import build
    from scrimp.stages import validation_batches

    run = run_of(made)
    assert run.batch(0)["kept"].shape == (4, 2)
    assert all("kept" not in batch for batch in validation_batches(run))
    run.clock.cuts, run.clock.stage, run.clock.step = [6], 1, 6
    assert "kept" not in build(made, run.data, run.clock).batch(6)


# mae.


def masked_models() -> tuple[Any, Any, dict[str, Tensor]]:
    """An encoder with mask tokens, one of which hidden patches are left out, and a batch."""
    options: dict[str, Any] = {"image": 8, "patch": 2, "channels": 1, "layers": 2, "width": 16, "heads": 2,
               "decoder_layers": 1, "decoder_width": 8, "decoder_heads": 2}  # fmt: skip
    plain, dropped = (MaskedAutoencoderConfig(**options, drop=drop).build().double().eval() for drop in (False, True))
    for model in (plain, dropped):
        initialize(model, 0)
    images = np.random.default_rng(0).normal(size=(3, 1, 8, 8))
    return plain, dropped, MaskedImage(patch=2).batch({"images": images}, np.arange(3))


@torch.no_grad()
def test_leaving_patches_out_is_the_model_that_does_so() -> None:
    """The mask token enters with the states: the same as a token of the decoder's width, W m + b."""
    plain, dropped, batch = masked_models()
    with_tokens = plain(batch["images"], batch["kept"], batch["restore"])
    plain.drop = True
    dropped.decoder.mask_token.weight.copy_(plain.decoder.embed(plain.mask_token.weight))
    left, right = (model(batch["images"], batch["kept"], batch["restore"]) for model in (plain, dropped))
    torch.testing.assert_close(left, right, **DOUBLE)
    assert float((left - with_tokens).abs().max()) > 1e-4


@torch.no_grad()
def test_an_encoder_of_kept_patches_is_the_encoder_restricted_to_them() -> None:
    plain, _, batch = masked_models()
    kept = batch["kept"]
    read = torch.zeros(3, 17, dtype=torch.bool).scatter(1, kept + 1, True)
    read[:, 0] = True
    some = plain.states(batch["images"], None, kept)
    for block in plain.blocks:
        block.forward = lambda x, rope, mask, sample, forward=block.forward: forward(
            x, rope, read[:, None, None, :], sample)  # fmt: skip
    whole = plain.states(batch["images"])
    torch.testing.assert_close(some[:, 0], whole[:, 0], **DOUBLE)
    torch.testing.assert_close(some[:, 1:], gathered(whole[:, 1:], kept), **DOUBLE)


def test_hidden_pixels_do_not_enter_and_visible_predictions_do_not_count() -> None:
    run = run_of(recipe(example("mae"), dtype="float64"))
    batch = run.batch(0)
    pixels = batch["images"].double().requires_grad_()
    predicted = run.model(pixels, batch["kept"], batch["restore"], batch["sample"])
    predicted.sum().backward()
    assert pixels.grad is not None
    used = torch.nn.functional.unfold(pixels.grad.abs(), 4, stride=4).sum(1) > 0
    assert torch.equal(used, batch["restore"] < 4)
    values = torch.randn(4, 16, 48, dtype=torch.float64, requires_grad=True)
    given: Any = lambda *inputs: values  # noqa: E731
    run.task.loss(given, batch).backward()
    assert values.grad is not None and torch.equal(values.grad.abs().sum(2) > 0, batch["restore"] >= 4)


def test_the_encoder_has_a_quarter_of_the_tokens() -> None:
    lengths: dict[str, int] = {}
    for name, made in {"plain": recipe(**home_of_masks()), "mae": recipe(example("mae"))}.items():
        run = run_of(made)
        run.model.blocks[0].register_forward_pre_hook(  # type: ignore[index]
            lambda block, given, name=name: lengths.update({name: given[0].shape[1]}))  # fmt: skip
        step(run)
    assert lengths == {"plain": 17, "mae": 5}


def home_of_masks() -> dict[str, Any]:
    from tiny import home

    return home("mae")


# mass.


def fragment_task(**settings: Any) -> FragmentTask:
    return Fragment(**settings).prepared(replace_tokenizer())


def replace_tokenizer() -> Any:
    class Data:
        tokenizer = Letters()

    return Data()


def test_the_fragment_is_hidden_and_nothing_else() -> None:
    task = fragment_task()
    windows = np.random.default_rng(0).integers(1, 32, (400, 21))
    batch = task.batch({"tokens": windows}, np.arange(400))
    tokens, written = batch["tokens"].numpy(), batch["written"].numpy()
    window = windows[:, :-1]
    assert bool((written.sum(1) == 10).all())
    assert bool((np.diff(written.astype(int), axis=1) != 0).sum(1).max() <= 2), "one piece"
    assert np.array_equal(tokens[~written], window[~written]), "what is not predicted stays readable"
    assert np.array_equal(batch["targets"].numpy(), np.where(written, window, -100))
    # The first predicted token, too, is hidden from the encoder: no shift by one.
    first = written.argmax(1)
    ways = Counter("mask" if t == 32 else "same" if t == w else "other"
                   for t, w in ((tokens[i, f], window[i, f]) for i, f in enumerate(first)))  # fmt: skip
    assert 0.72 < ways["mask"] / 400 < 0.88 and ways["other"] > 15 and ways["same"] > 15
    # The decoder reads the tokens before those that it writes, and looks at no mask token.
    assert np.array_equal(batch["decoder_tokens"][:, 1:].numpy(), window[:, :-1])
    assert bool((batch["decoder_tokens"][:, 0] == 0).all())
    assert np.array_equal(batch["read"].numpy(), tokens != 32)
    assert int(task.count(batch)) == 4000
    again = task.batch({"tokens": windows[7:8]}, np.array([7]))
    assert torch.equal(again["tokens"], batch["tokens"][7:8])


def test_where_fragments_begin() -> None:
    task = fragment_task()
    begins = Counter(task.span(20, np.random.default_rng(s))[0] for s in range(5000))
    assert set(begins) == set(range(11))
    middle = 0.6 / 11
    assert abs(begins[0] / 5000 - 0.2 - middle) < 0.025 and abs(begins[10] / 5000 - 0.2 - middle) < 0.025
    assert abs(begins[5] / 5000 - middle) < 0.015
    assert task.span(2, np.random.default_rng(0))[1] - task.span(2, np.random.default_rng(0))[0] == 1


@pytest.mark.parametrize("norm_at", ["pre", "post"])
def test_a_decoder_of_the_fragment_is_the_whole_decoder(norm_at: Any) -> None:
    config = EncoderDecoderConfig(layers=2, width=32, heads=2, vocab=33, context=16, norm_at=norm_at)
    model = config.build().double()
    initialize(model, 0)
    windows = np.random.default_rng(1).integers(1, 32, (6, 17))
    whole = fragment_task().batch({"tokens": windows}, np.arange(6))
    some = shortened(whole)
    assert some["decoder_tokens"].shape == (6, 8) and "written" not in some
    assert torch.equal(some["places"], whole["written"].nonzero()[:, 1].view(6, 8)), "original positions"
    with torch.no_grad():
        torch.testing.assert_close(outputs(model, some), outputs(model, whole)[whole["written"]].view(6, 8, -1),
                                   **DOUBLE)  # fmt: skip
    task, gradients = fragment_task(), []
    for batch in (whole, some):
        model.zero_grad()
        task.loss(model, batch).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_fragments_that_were_cut_off_keep_their_loss() -> None:
    config = EncoderDecoderConfig(layers=1, width=16, heads=2, vocab=33, context=16)
    model = config.build().double()
    initialize(model, 0)
    task, windows = fragment_task(), np.random.default_rng(1).integers(1, 32, (6, 17))
    cut = {n: t[:, :9] if t.ndim > 1 else t for n, t in task.batch({"tokens": windows}, np.arange(6)).items()}
    assert len(set(cut["written"].sum(1).tolist())) > 1
    some = shortened(cut)
    assert int(task.count(some)) == int(task.count(cut))
    torch.testing.assert_close(task.loss(model, some), task.loss(model, cut), **DOUBLE)
    none = cut | {"written": torch.zeros(6, 9, dtype=torch.bool), "targets": torch.full((6, 9), -100)}
    assert float(task.loss(model, shortened(none))) == 0 and int(task.count(none)) == 1


def test_mask_tokens_are_not_looked_at() -> None:
    config = EncoderDecoderConfig(layers=1, width=16, heads=2, vocab=33, context=16)
    model = config.build().double()
    initialize(model, 0)
    batch = fragment_task().batch({"tokens": np.random.default_rng(1).integers(1, 32, (2, 17))}, np.arange(2))
    states = model.encode(batch["tokens"]).detach().requires_grad_()
    model(None, batch["decoder_tokens"], states=states, read=batch["read"]).sum().backward()
    assert states.grad is not None
    assert torch.equal(states.grad.abs().sum(2) > 0, batch["tokens"] != 32)


# Where they have nothing to do.


@pytest.mark.parametrize(("name", "said"), [("flip", "contrastive"), ("mae", "masked-image"), ("mass", "fragment")])
def test_another_task_is_refused_with_the_one_it_belongs_to(name: str, said: str) -> None:
    with pytest.raises(UserError, match=f"techniques.{name}.*`{said}`"):
        run_of(recipe(example(name), model=MODEL, data=TinyData(), task="causal-lm"))


def test_a_model_that_drops_already_is_told() -> None:
    made = recipe(example("mae"))
    with pytest.raises(UserError, match="leaves hidden patches out already.*drop: false"):
        run_of(replace(made, model=replace(made.model, drop=True)))
    assert made.data == Memory(MASKED)


def test_a_share_of_the_tokens_that_rounds_to_all_is_refused() -> None:
    with pytest.raises(UserError, match="are all of them"):
        run_of(recipe(example("token_drop", keep=0.6)))
    run_of(recipe(example("token_drop", keep=0.6, multiple=2)))


def test_losses_of_the_last_stage_do_not_reach_the_first() -> None:
    stages = technique_class("pipeline")()
    made = recipe(example("token_drop", mode="loss"), stages, mesh={"pipeline": 2, "data": 1}, task="masked-lm",
                  model={"layers": 4, "width": 16, "heads": 2, "causal": False}, data=Memory("masked-lm"))  # fmt: skip
    with pytest.raises(UserError, match=r"token_drop\.mode.*first.*mode: random"):
        plan(made, "here", ranks=2)
