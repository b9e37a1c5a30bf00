"""(IA)^3: its equation by hand, first values, an exact merge, and what a block keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from scrimp.errors import UserError
from scrimp.techniques.tuning.ia3 import IA3
from scrimp.techniques.tuning.lora import LoRA
from scrimp.techniques.tuning.ssf import SSF
from tiny import step
from tiny_tuning import SMALL, kept_more, made, merge_error, outputs, shaken

GROUPED = {**SMALL, "heads": 4, "kv_heads": 2}


def test_keys_values_and_hidden_activations_are_scaled() -> None:
    run = made(IA3(), model=GROUPED)
    shaken(run.model)
    block = run.model.blocks[0]
    qkv, x = block.attention.qkv, torch.randn(3, 16, dtype=torch.float64)
    plain = x @ qkv.weight.T + qkv.bias
    q, k, v = plain.split((16, 8, 8), dim=1)
    wanted = torch.cat((q, k * qkv.ia3.k, v * qkv.ia3.v), 1)
    torch.testing.assert_close(qkv(x), wanted, rtol=0, atol=1e-13)
    hidden = F.gelu(block.mlp.up(x)) * block.mlp.down.ia3.hidden
    wanted = hidden @ block.mlp.down.weight.T + block.mlp.down.bias
    torch.testing.assert_close(block.mlp(x), wanted, rtol=0, atol=1e-13)


def test_it_begins_as_the_base_and_only_its_vectors_move() -> None:
    run = made(IA3(), model=GROUPED)
    assert torch.equal(outputs(run), outputs(made(model=GROUPED)))
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    for _ in range(2):
        step(run)
    moved = {n for n, p in run.model.named_parameters() if not torch.equal(before[n], p)}
    assert moved == {n for n in before if ".ia3." in n}
    assert sum(before[n].numel() for n in moved) == 2 * (8 + 8 + 64)


@pytest.mark.parametrize(("dtype", "far"), [("float64", 1e-12), ("float32", 1e-5)])
@pytest.mark.parametrize("model", [GROUPED, {**SMALL, "bias": False, "activation": "swiglu"}], ids=["gelu", "swiglu"])
def test_the_merge_is_exact(dtype: str, far: float, model: dict[str, Any]) -> None:
    run = made(IA3(queries=True), dtype=dtype, model=model)
    shaken(run.model)
    assert merge_error(run, dtype=dtype, model=model) < far


def test_it_merges_with_lora_and_ssf() -> None:
    run = made(IA3(), LoRA(rank=2), SSF())
    shaken(run.model)
    assert merge_error(run) < 1e-12


@pytest.mark.parametrize(
    ("technique", "more"),
    [
        (IA3(hidden=""), 3),  # q, k and v before they are scaled
        (IA3(keys_values=""), 4),  # the activations before they are scaled
    ],
)
def test_what_a_block_keeps(technique: IA3, more: float) -> None:
    vectors = 3 * 32 / (64 * 32)  # the factors as one vector
    assert more <= kept_more(technique) <= more + vectors


def test_nothing_to_scale_is_refused() -> None:
    with pytest.raises(UserError, match="both patterns are empty"):
        IA3(keys_values="", hidden="")
    with pytest.raises(UserError, match="matches no linear layer"):
        made(IA3(hidden="mlp.dawn"))
