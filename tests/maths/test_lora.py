"""LoRA: its equation and gradients, what it trains and keeps, an exact merge, and any module."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import scrimp
from scrimp.errors import UserError
from scrimp.meter import LiveBytes
from scrimp.run import exported
from scrimp.techniques.tuning.lora import LoRA
from scrimp.training import train
from tiny import TinyData, assert_equal, example, flat, recipe, run_of, step
from tiny_tasks import TINY, Memory
from tiny_tuning import kept

ALL = "attention.*|mlp.*"
UNTIED = {"layers": 2, "width": 32, "heads": 2, "tied": False}


def random_b(model: nn.Module) -> None:
    """B as if trained: at first it is zero, and hides everything."""
    chance = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("lora.b"):
                p.copy_(torch.randn(p.shape, generator=chance))


def test_it_begins_as_the_base_bit_by_bit() -> None:
    base, tuned = run_of(recipe()), run_of(recipe(example("lora")))
    tokens = base.batch(0)["tokens"]
    base.model.eval()
    tuned.model.eval()
    assert torch.equal(base.model(tokens), tuned.model(tokens))


def test_first_values() -> None:
    run: Any = run_of(recipe(LoRA(rank=8, targets=ALL)))
    for name, layer in (("up", run.model.blocks[0].mlp.up), ("down", run.model.blocks[0].mlp.down)):
        a, bound = layer.lora.a.detach(), layer.weight.shape[1] ** -0.5
        assert 0.95 * bound < float(a.abs().max()) <= bound, name
        assert abs(float(a.mean())) < 0.1 * bound
        assert not layer.lora.b.any()
    first, second = (run.model.blocks[i].mlp.up.lora.a for i in (0, 1))
    assert not torch.equal(first, second)
    fewer: Any = run_of(recipe(LoRA(rank=8, targets="mlp.up")))
    assert torch.equal(fewer.model.blocks[1].mlp.up.lora.a, second)


@pytest.mark.parametrize(("stabilized", "scale"), [(False, 12 / 4), (True, 12 / 2)])
def test_outputs_and_gradients_by_the_equation(stabilized: bool, scale: float) -> None:
    torch.manual_seed(0)
    layer: Any = nn.Sequential(nn.Linear(6, 5)).double()
    weight, bias = layer[0].weight.detach(), layer[0].bias.detach()
    tuned: Any = scrimp.apply(layer, [LoRA(rank=4, alpha=12.0, rank_stabilized=stabilized, targets="*")])
    random_b(tuned)
    a, b = tuned[0].lora.a, tuned[0].lora.b
    assert (a.shape, b.shape) == ((4, 6), (5, 4))
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(7, 5, dtype=torch.float64)
    y = tuned(x)
    y.backward(upstream)
    with torch.no_grad():
        whole = weight + scale * b @ a
        torch.testing.assert_close(y, x @ whole.T + bias, rtol=0, atol=1e-13)
        torch.testing.assert_close(b.grad, scale * upstream.T @ (x @ a.T), rtol=0, atol=1e-13)
        torch.testing.assert_close(a.grad, scale * (upstream @ b).T @ x, rtol=0, atol=1e-13)
        torch.testing.assert_close(x.grad, upstream @ whole, rtol=0, atol=1e-13)
    assert tuned[0].weight.grad is None


def test_only_adapters_move_and_the_merge_is_exact() -> None:
    run: Any = run_of(recipe(example("lora", targets=ALL), dtype="float64"))
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    for _ in range(5):
        step(run)
    moved = {n for n, p in run.model.named_parameters() if not torch.equal(before[n], p)}
    assert moved == {n for n in before if ".lora." in n}
    assert moved == set(run.state()["optimizer.momentum_buffer"])
    plain = exported(run)
    assert set(plain) == set(run.base)
    merged = run_of(recipe(dtype="float64"), source={"model": plain})
    tokens = run.batch(0)["tokens"]
    run.model.eval()
    merged.model.eval()
    assert torch.allclose(run.model(tokens), merged.model(tokens), rtol=0, atol=1e-12)
    before_merge = before["blocks.0.mlp.up.weight"]
    assert not torch.allclose(plain["blocks.0.mlp.up.weight"], before_merge, rtol=0, atol=1e-6)


def test_bfloat16_weights_are_rounded_once() -> None:
    run: Any = run_of(recipe(LoRA(rank=8, targets="mlp.up"), dtype="bfloat16"))
    random_b(run.model)
    layer = run.model.blocks[0].mlp.up
    once = layer.weight.float() + 2 * layer.lora.b.float() @ layer.lora.a.float()
    found = exported(run)["blocks.0.mlp.up.weight"]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, once.to(torch.bfloat16))


def drops(**settings: Any) -> Any:
    """A run with LoRA that drops a quarter, B as if trained, and no other dropout."""
    run = run_of(recipe(LoRA(rank=2, targets=ALL, **settings), model=UNTIED | {"dropout": 0.0}, dtype="float64"))
    random_b(run.model)
    return run


def test_dropout_is_on_the_way_to_a_alone_and_right_on_average() -> None:
    run = drops(dropout=0.25)
    batch, block = run.batch(0), run.model.blocks[0]
    layer, seen = block.mlp.up, []
    layer.lora.drop.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    block.mlp.down.lora.drop.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    layer.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    run.model(batch["tokens"], None, batch["sample"])
    (x, dropped), (_, y), (_, other_dropped) = seen[:3]
    plain = x @ layer.weight.T + layer.bias
    torch.testing.assert_close(y, plain + 8 * dropped @ layer.lora.a.T @ layer.lora.b.T, rtol=0, atol=1e-12)
    mask, second = dropped != 0, (other_dropped != 0)[..., :32]
    torch.testing.assert_close(dropped, x * mask / 0.75, rtol=0, atol=1e-15)
    # Four standard deviations, of the share that is kept and of the covariance of two places.
    assert abs(float(mask.double().mean()) - 0.75) < 4 * (0.1875 / mask.numel()) ** 0.5
    for one, two in ((mask[:-1], mask[1:]), (mask[:, :-1], mask[:, 1:]), (mask[..., :-1], mask[..., 1:]),
                     (mask, second)):  # samples, positions, channels, layers  # fmt: skip
        together = (one.double() - 0.75) * (two.double() - 0.75)
        assert abs(float(together.mean())) < 4 * 0.1875 / together.numel() ** 0.5
    run.model.eval()
    seen.clear()
    run.model(batch["tokens"], None, batch["sample"])
    assert torch.equal(seen[0][0], seen[0][1])


def test_dropout_is_the_same_when_blocks_run_again_or_batches_are_divided() -> None:
    gradients = []
    lora = LoRA(rank=2, targets=ALL, dropout=0.25)
    for more in ((), (example("recompute"),), (example("accumulate", parts=2),)):
        run = run_of(recipe(lora, *more, dtype="float64"))
        random_b(run.model)
        batch = run.batch(3)
        assert run.backward
        run.backward(batch, run.task.count(batch))
        gradients.append(torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None]))
    assert torch.equal(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[0], gradients[2], rtol=0, atol=1e-12)
    assert gradients[0].any()


@pytest.mark.parametrize("task", ["seq2seq", "contrastive", "masked-image, mask tokens", "classify"])
def test_dropout_knows_the_samples_of_every_task(task: str) -> None:
    """What is planned is what is held, too."""
    tiny, peaks = TINY[task], []
    settings: dict[str, Any] = {"model": dict(tiny.model), "data": Memory(task), "task": tiny.name or task}
    made = recipe(LoRA(rank=2, targets="mlp.up", dropout=0.5), **settings)
    batch = run_of(made).batch(0)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = run_of(made)
    for run, given in ((run_of(made), batch), (fake, {k: mode.from_tensor(v) for k, v in batch.items()})):
        count = run.task.count(given)
        assert run.backward
        with mode if run is fake else nullcontext(), LiveBytes() as meter:
            run.backward(given, count)
        peaks.append(meter.peak)
    assert peaks[0] == peaks[1]


def test_dropout_is_the_same_in_a_resumed_run(tmp_path: Path) -> None:
    made = recipe(LoRA(rank=2, targets="mlp.up", dropout=0.25), data="text", duration="3 step", out=str(tmp_path),
                  name="r", checkpoint={"every": "1 step", "keep": 9})  # fmt: skip
    whole = flat(train(made, data=TinyData().open()).run.state())
    again = train(resume=tmp_path / "r/checkpoints/step-000000001", data=TinyData().open(), force=True)
    assert_equal(whole, flat(again.run.state()))


def test_dropout_that_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match="is in none of the model's blocks"):
        run_of(recipe(LoRA(targets="head", dropout=0.1), model=UNTIED))
    with pytest.raises(UserError, match="does not get the samples' numbers"):
        scrimp.apply(encoder(), [LoRA(targets="linear1", dropout=0.1)])
    with pytest.raises(UserError, match="one product"):
        LoRA(dropout=0.1, magnitude=True)


def test_two_ranks_on_disjoint_patterns() -> None:
    run: Any = run_of(recipe(LoRA(rank=2, targets="attention.qkv"), LoRA(rank=4, targets="mlp.up")))
    block = run.model.blocks[0]
    assert block.attention.qkv.lora.a.shape[0] == 2
    assert block.mlp.up.lora.a.shape[0] == 4
    assert set(exported(run)) == set(run.base)


def test_what_cannot_be_tuned_is_refused() -> None:
    with pytest.raises(UserError, match="already has a `lora`"):
        run_of(recipe(LoRA(rank=2, targets="attention.qkv"), LoRA(rank=4, targets="attention.*")))
    with pytest.raises(UserError, match="rank must be at least 1"):
        LoRA(rank=0)
    with pytest.raises(UserError, match="the weight of `head` is shared"):
        run_of(recipe(LoRA(targets="head")))
    assert "head.weight" in exported(run_of(recipe(LoRA(targets="head"), model=UNTIED)))


@pytest.mark.parametrize(
    ("targets", "rank", "more"),
    [
        ("attention.qkv", 8, 1 + 8 / 32),  # its input, and A x
        ("mlp.down", 4, 4 + 4 / 32),  # the MLP is four times as wide
        (ALL, 8, 6 + 4 * 8 / 32),  # the attention's output is kept by the attention as well
    ],
)
def test_frozen_layers_keep_nothing_and_tuned_ones_their_input(targets: str, rank: int, more: float) -> None:
    model = {"layers": 1, "width": 32, "heads": 2}
    x = torch.randn(2, 16, 32, dtype=torch.float64, requires_grad=True)
    plain: Any = run_of(recipe(dtype="float64", model=model))
    frozen = plain.model.blocks[0]
    full = kept(frozen, x)
    base = kept(frozen.requires_grad_(False), x)
    tuned: Any = run_of(recipe(LoRA(rank=rank, targets=targets), dtype="float64", model=model))
    assert full - base == 6
    assert kept(tuned.model.blocks[0], x) - base == more


def test_apply_works_on_any_module() -> None:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(3, 4)
    before = mlp(x)
    names = {n for n, _ in mlp.named_parameters()}
    tuned: Any = scrimp.apply(mlp, [LoRA(rank=2, targets="*")])
    assert torch.equal(tuned(x), before)
    trained = {n for n, p in tuned.named_parameters() if p.requires_grad}
    assert trained == {"0.lora.a", "0.lora.b", "2.lora.a", "2.lora.b"}
    assert {n for n, _ in tuned.named_parameters()} == names | trained
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.1)
    tuned(x).pow(2).sum().backward()
    optimizer.step()
    after = tuned(x)
    assert not torch.equal(after, before)
    given: Any = SimpleNamespace(model=tuned)
    plain = LoRA(rank=2, targets="*").export({n: p.detach() for n, p in tuned.named_parameters()}, given)
    fresh = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    fresh.load_state_dict(plain)
    torch.testing.assert_close(fresh(x), after)


def encoder() -> nn.Module:
    """torch's own encoder, which reads weights past its layers: always in attention, and in evaluation everywhere."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def test_adapters_inside_torchs_encoder_work_in_evaluation_too() -> None:
    tuned: Any = scrimp.apply(encoder(), [LoRA(rank=2, targets="linear1|linear2")])
    x = torch.randn(2, 5, 16)
    plain = tuned(x)
    random_b(tuned)
    trained = tuned(x)
    tuned.eval()
    with torch.no_grad():
        torch.testing.assert_close(tuned(x), trained)
    assert not torch.allclose(plain, trained, atol=0.1)


def test_adapters_that_would_never_be_called_are_refused() -> None:
    with pytest.raises(UserError, match=r"`layers\.0\.self_attn\.out_proj` is never called"):
        scrimp.apply(encoder(), [LoRA(rank=2, targets="*")])


def test_apply_refuses_what_needs_the_trainer() -> None:
    with pytest.raises(UserError, match="acts in `backward`"):
        scrimp.apply(nn.Linear(2, 2), [example("accumulate")])


def test_magnitudes_by_the_equation() -> None:
    torch.manual_seed(0)
    layer: Any = nn.Sequential(nn.Linear(6, 5)).double()
    weight, bias = layer[0].weight.detach().clone(), layer[0].bias.detach()
    x = torch.randn(7, 6, dtype=torch.float64)
    plain = layer(x)
    tuned: Any = scrimp.apply(layer, [LoRA(rank=4, alpha=12.0, magnitude=True, targets="*")])
    assert torch.equal(tuned(x), plain)
    lora = tuned[0].lora
    random_b(tuned)
    with torch.no_grad():
        lora.m.mul_(torch.arange(1, 6))
    upstream = torch.randn(7, 5, dtype=torch.float64)
    y = tuned(x)
    y.backward(upstream)
    with torch.no_grad():
        whole = weight + 3 * lora.b @ lora.a
        length = whole.norm(dim=1)
        torch.testing.assert_close(y, x @ (whole * (lora.m / length)[:, None]).T + bias, rtol=0, atol=1e-12)
        torch.testing.assert_close(lora.m.grad, (upstream * (x @ whole.T)).sum(0) / length, rtol=0, atol=1e-12)
        # The length is held constant, so that B's gradient is the product's alone.
        by_b = 3 * (upstream * lora.m / length).T @ (x @ lora.a.T)
        torch.testing.assert_close(lora.b.grad, by_b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("given", [False, True])
def test_magnitudes_are_of_the_weights_that_a_run_starts_from_and_merge(given: bool) -> None:
    base = run_of(recipe(dtype="float64", seed=5, model=UNTIED))
    source: Any = {"model": {n: p.detach() for n, p in base.model.named_parameters()}} if given else None
    made = recipe(LoRA(rank=2, magnitude=True), dtype="float64", model=UNTIED)
    run: Any = run_of(made, source=source)
    plain = run_of(recipe(dtype="float64", model=UNTIED), source=source)
    tokens = run.batch(0)["tokens"]
    run.model.eval()
    plain.model.eval()
    assert torch.equal(run.model(tokens), plain.model(tokens))
    random_b(run.model)
    merged = run_of(recipe(dtype="float64", model=UNTIED), source={"model": exported(run)})
    merged.model.eval()
    torch.testing.assert_close(run.model(tokens), merged.model(tokens), rtol=0, atol=1e-12)
