"""T-Fixup: scales against the formulas, no norms, and training without warm-up."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scrimp.errors import UserError
from scrimp.normless import fill
from scrimp.run import Run
from scrimp.techniques.initialization.t_fixup import TFixup, Times
from scrimp.techniques.tuning.lora import LoRA
from scrimp.training import train
from tiny import MODEL, example, recipe, run_of, step
from tiny_normless import KINDS, made

WIDE = {"layers": 4, "width": 128, "heads": 4}


def bound(weight: Tensor) -> float:
    """Largest entry over the largest of a Xavier uniform matrix of that shape; with many entries it is the scale."""
    return float(weight.detach().abs().max()) / math.sqrt(6 / sum(weight.shape))


@pytest.mark.parametrize(("constants", "scale"), [("decoder", (9 * 4) ** -0.25), ("encoder", 0.67 * 4**-0.25)])
def test_scales(constants: str, scale: float) -> None:
    run: Any = run_of(recipe(example("t_fixup", constants=constants), model=WIDE))
    for block in run.model.blocks:
        q, k, v = block.attention.qkv.weight.split(128)
        expected = [(q, 1.0), (k, 1.0)]
        expected += [(w, scale) for w in (v, block.attention.proj.weight, block.mlp.up.weight, block.mlp.down.weight)]
        for weight, factor in expected:
            assert 0.995 * factor < bound(weight) <= factor * (1 + 1e-6)
            assert float(weight.detach().std()) == pytest.approx(factor * math.sqrt(2 / sum(weight.shape)), rel=0.02)
        assert not any(p.any() for n, p in block.named_parameters() if n.endswith("bias"))
    assert not torch.equal(run.model.blocks[0].mlp.up.weight, run.model.blocks[1].mlp.up.weight)


def test_shared_heads_and_gates() -> None:
    """Keys and values of fewer heads have their own fans; the gate is one of the MLP's weights."""
    llama = {"kv_heads": 2, "activation": "swiglu", "norm": "rmsnorm", "positions": "rotary", "bias": False}
    run: Any = run_of(recipe(TFixup(), model=WIDE | llama))
    scale = (9 * 4) ** -0.25
    block = run.model.blocks[2]
    q, k, v = block.attention.qkv.weight.split((128, 64, 64))
    for weight, factor in (
        (q, 1.0),
        (k, 1.0),
        (v, scale),
        (block.mlp.gate.weight, scale),
        (block.mlp.up.weight, scale),
    ):
        assert 0.995 * factor < bound(weight) <= factor * (1 + 1e-6)


@pytest.mark.parametrize("constants", ["decoder", "encoder"])
def test_embeddings(constants: str) -> None:
    """The input embedding is scaled once, tied or not, and alike for both; positions are not scaled."""
    scale = (9 * 4) ** -0.25
    for tied in (True, False):
        settings = WIDE | {"tied": tied, "vocab": 512, "context": 256}
        run: Any = run_of(recipe(example("t_fixup", constants=constants), model=settings))
        std = {name: float(run.model.get_parameter(f"{name}.weight").detach().std()) for name in ("embed", "positions")}
        assert std["embed"] == pytest.approx(scale * 128**-0.5, rel=0.02)
        assert std["positions"] == pytest.approx(128**-0.5, rel=0.02)
        assert (run.model.head.weight is run.model.embed.weight) is tied
        if not tied:
            assert 0.995 < bound(run.model.head.weight) <= 1 + 1e-6


def test_what_is_looked_up_is_multiplied_by_the_root_of_the_width() -> None:
    run: Any = run_of(recipe(TFixup(), model=MODEL | {"positions": "none", "dropout": 0.0}, dtype="float64"))
    seen: list[Tensor] = []
    run.model.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    tokens = run.batch(0)["tokens"]
    run.model(tokens)
    torch.testing.assert_close(seen[0], math.sqrt(32) * run.model.embed.weight[tokens], rtol=0, atol=1e-15)


def drawn(run: Run, factors: list[tuple[str, float]]) -> None:
    """Whether each weight is the standard draw times the factor of the first pattern that its name matches."""
    first = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    fill(run.model, run.seed, "t_fixup")
    for name, p in run.model.named_parameters():
        factor = next((f for pattern, f in factors if re.fullmatch(pattern, name)), 1.0)
        standard = p.detach()
        if re.search(r"(qkv|kv)\.weight", name):
            # Only values are scaled; they are the last of the rows.
            kv = run.model.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
            rows = len(p) - kv.kv_heads * kv.width  # type: ignore[operator]
            assert torch.equal(first[name][:rows], standard[:rows]), name
            first[name], standard = first[name][rows:], standard[rows:]
        torch.testing.assert_close(first[name], factor * standard, rtol=1e-6, atol=0, msg=name)


INNER = r"(attention\.qkv|attention\.proj|cross\.kv|cross\.proj|mlp\.up|mlp\.down)\.weight"


@pytest.mark.parametrize("entry", KINDS)
def test_scales_of_every_model(entry: str) -> None:
    """Each stack has its own depth and kind; inputs are scaled, positions, heads, queries and keys are not."""
    run = made(entry, TFixup(), model={"layers": 3, "kv_heads": 1, "decoder_layers": 2} if entry == "seq2seq" else None)
    encoder, decoder = (lambda n: 0.67 * n**-0.25), (lambda n: (9 * n) ** -0.25)
    factors: dict[str, list[tuple[str, float]]] = {
        "causal-lm": [(rf"blocks.*{INNER}", decoder(4)), (r"embed\.weight", decoder(4))],
        "masked-lm": [(rf"blocks.*{INNER}", encoder(4)), (r"embed\.weight", decoder(4))],
        "classify, images": [(rf"blocks.*{INNER}", encoder(4)), (r"patches\.weight", decoder(4)),
                             (r"class_token\.weight", decoder(4) * 32**0.5)],
        "seq2seq": [(rf"encoder\.blocks.*{INNER}", encoder(3)), (rf"decoder\.blocks.*{INNER}", decoder(2)),
                    (r"embed\.weight", decoder(3))],
        "masked-image": [(rf"blocks.*{INNER}", encoder(4)), (rf"decoder\.blocks.*{INNER}", encoder(1)),
                         (r"patches\.weight", decoder(4)), (r"class_token\.weight", decoder(4) * 32**0.5),
                         (r"decoder\.embed\.weight", decoder(1)), (r"decoder\.mask_token\.weight", decoder(1) * 4)],
        "contrastive": [(rf"text\.blocks.*{INNER}", decoder(4)), (rf"image\.blocks.*{INNER}", encoder(4)),
                        (r"text\.embed\.weight", decoder(4)), (r"image\.patches\.weight", decoder(4)),
                        (r"image\.class_token", decoder(4) * 32**0.5)],
    }  # fmt: skip
    drawn(run, factors[entry])


@pytest.mark.parametrize(("entry", "stems"), [("seq2seq", [""]), ("contrastive", ["text."]), ("masked-lm", [""])])
def test_every_table_of_tokens_is_multiplied_by_the_root_of_the_width(entry: str, stems: list[str]) -> None:
    run = made(entry, TFixup())
    found = {name: m.factor for name, m in run.model.named_modules() if isinstance(m, Times)}
    assert found == {f"{stem}embed_scale": math.sqrt(32) for stem in stems}


def test_both_sides_of_an_encoder_decoder_read_the_scaled_embedding() -> None:
    run: Any = made("seq2seq", TFixup(), model={"positions": "none", "dropout": 0.0})
    seen: list[Tensor] = []
    for side in (run.model.encoder, run.model.decoder):
        side.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    read, written = torch.tensor([[3, 4]]), torch.tensor([[5]])
    run.model(read, written)
    for x, ids in zip(seen, (read, written), strict=True):
        torch.testing.assert_close(x, math.sqrt(32) * run.model.embed.weight[ids], rtol=0, atol=1e-15)


@pytest.mark.parametrize("norm_at", ["pre", "post"])
def test_no_norm_is_left(norm_at: str) -> None:
    run: Any = run_of(recipe(TFixup(), model=MODEL | {"norm_at": norm_at, "dropout": 0.0}, dtype="float64"))
    assert not [n for n, _ in run.model.named_parameters() if "norm" in n]
    # Without norms a block is x + attention(x), then x + mlp(x), wherever its norms were.
    block = run.model.blocks[0]
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    middle = x + block.attention(x, None, None, None)
    torch.testing.assert_close(block(x), middle + block.mlp(middle), rtol=0, atol=1e-13)


def test_draws_depend_on_seed_and_name_only() -> None:
    def weights(*techniques: Any, **settings: Any) -> dict[str, Tensor]:
        return dict(run_of(recipe(TFixup(), *techniques, **settings)).model.named_parameters())

    plain, tuned, other = weights(), weights(LoRA(rank=2)), weights(seed=1)
    assert all(torch.equal(plain[n], tuned[n]) for n in plain)
    assert not torch.equal(plain["embed.weight"], other["embed.weight"])
    # More blocks change the scale, not the draw.
    deeper = weights(model=MODEL | {"layers": 8})
    name = "blocks.1.mlp.up.weight"
    torch.testing.assert_close(deeper[name] * 2**0.25, plain[name])


def test_weights_to_start_from_are_kept() -> None:
    first = train(recipe(TFixup()), save=False).run.model
    source = {"model": {n: p.detach().clone() for n, p in first.named_parameters()}}
    again = run_of(recipe(TFixup()), source=source).model
    assert all(torch.equal(p, again.get_parameter(n)) for n, p in first.named_parameters())


def change_of_one_step(run: Run) -> float:
    """Root mean square of what one update changes in the logits."""
    tokens = run.batch(0)["tokens"]
    before = run.model(tokens).detach()
    step(run)
    return float((run.model(tokens).detach() - before).pow(2).mean().sqrt())


def test_deep_models_train_without_warmup() -> None:
    """The first step moves the output less than with norms, and far less than without both norms and scales."""
    deep = {"layers": 16, "width": 32, "heads": 2}
    rule = example("adam", lr=1e-3)
    run: Any = run_of(recipe(rule, TFixup(), model=deep))
    unscaled = run_of(recipe(rule, TFixup(), model=deep))
    with torch.no_grad():
        for name, p in unscaled.model.named_parameters():
            rows = slice(64, None) if "qkv" in name else slice(None)
            if p.ndim == 2 and name != "positions.weight":
                p[rows] *= (9 * 16) ** 0.25
    change = change_of_one_step(run)
    assert change < change_of_one_step(run_of(recipe(rule, model=deep))) / 2
    assert change < change_of_one_step(unscaled) / 100
    batch = run.batch(0)
    losses = []
    for _ in range(10):
        step(run)
        losses.append(float(run.task.loss(run.model, batch).detach()) / 64)
    assert all(math.isfinite(x) and x < 4 for x in losses)


def test_models_without_the_seams_are_refused_by_name() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))

    given: Any = SimpleNamespace(where=lambda technique: "techniques.t_fixup")
    with pytest.raises(UserError, match=r"techniques\.t_fixup: `layers\.0` has no `attention_norm` to remove"):
        TFixup().model(Plain(), given)
