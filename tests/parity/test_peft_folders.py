"""Adapters go to peft and come from it, as folders: outputs are the same on GPT-2, Llama and BERT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from scrimp.errors import UserError
from scrimp.models import hub_peft
from scrimp.restore import starting_weights
from scrimp.run import Run
from scrimp.technique import Technique
from scrimp.techniques.tuning.ia3 import IA3
from scrimp.techniques.tuning.lora import LoRA
from tiny import keep, recipe, run_of
from tiny_tasks import Memory

transformers: Any = pytest.importorskip("transformers")
Recorder = Callable[[str, object], None]
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
"""Of peft, about transformers."""

SIZE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "vocab_size": 32, "max_position_embeddings": 16}  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "causal-lm", {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 4,
                                              "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}),
    "llama": ("LlamaForCausalLM", "causal-lm", {**SIZE, "num_key_value_heads": 2}),
    "bert": ("BertForMaskedLM", "masked-lm", SIZE),
}  # fmt: skip
MINE: dict[str, list[Technique]] = {
    "lora": [LoRA(rank=2, alpha=6.0, targets="attention.*|mlp.down")],
    "rslora": [LoRA(rank=4, alpha=6.0, rank_stabilized=True)],
    "two ranks": [LoRA(rank=2, targets="attention.qkv"), LoRA(rank=3, alpha=5.0, targets="mlp.up")],
    "dora": [LoRA(rank=2, alpha=6.0, magnitude=True)],
    "ia3": [IA3()],
    "ia3 of queries": [IA3(queries=True, hidden="")],
}


def saved(family: str, folder: Path) -> Any:
    """A model of transformers with random weights in every part, saved."""
    kind, _, options = MODELS[family]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(transformers.AutoConfig.for_model(family, **options))
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    return model.eval()


def run_from(family: str, folder: Path, techniques: list[Technique], start: Path | None = None) -> Run:
    entry = MODELS[family][1]
    made = recipe(*techniques, model={"from": str(folder)}, data=Memory(entry), task=entry)
    run = run_of(made, source=starting_weights(made, made.data.open(), str(start) if start else None))
    run.model.eval()
    return run


def shaken(model: nn.Module) -> None:
    """Adapters as if trained."""
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if ".lora" in name or ".ia3" in name:
            p.data.add_(0.2 * torch.randn_like(p))


def write(run: Run, family: str, base: Path, out: Path) -> None:
    hub_peft.write(out, str(base), family, run.model.config, run.order.techniques, run.model)


def difference(theirs: Any, ours: Any) -> float:
    tokens = torch.arange(32).view(2, 16) * 7 % 29 + 3
    with torch.no_grad():
        one, two = theirs(tokens).logits, ours(tokens)
    assert float(two.std()) > 0.1
    return float((one - two).abs().max())


@pytest.mark.parametrize("case", MINE)
@pytest.mark.parametrize("family", MODELS)
def test_ours_load_in_peft_and_come_back(family: str, case: str, tmp_path: Path, record_property: Recorder) -> None:
    model = saved(family, tmp_path / "base")
    run = run_from(family, tmp_path / "base", MINE[case])
    plain = difference(model, run.model)
    shaken(run.model)
    moved = difference(model, run.model)
    write(run, family, tmp_path / "base", tmp_path / "out")
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "out").eval()
    far = difference(loaded, run.model)
    keep(record_property, MINE[case][0].name, "peft", far)
    assert plain < 1e-5
    assert moved > 0.05
    assert far < 1e-5
    again = run_from(family, tmp_path / "base", MINE[case], tmp_path / "out")
    for name, p in run.model.named_parameters():
        assert torch.equal(p, again.model.get_parameter(name)), name


QKV = {"gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"], "bert": ["query", "value"]}
IN_MLP = {"gpt2": "mlp.c_proj", "llama": "down_proj", "bert": "intermediate.dense"}
OURS_IN_MLP = {"gpt2": "mlp.down", "llama": "mlp.down", "bert": "mlp.up"}


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
@pytest.mark.parametrize("family", MODELS)
def test_their_lora_loads_here(family: str, options: dict[str, Any], tmp_path: Path, record_property: Recorder) -> None:
    """Where q, k and v are apart there, only q and v are adapted: two factors A become one of twice the rank."""
    model = saved(family, tmp_path / "base")
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=[*QKV[family], IN_MLP[family]],
                             fan_in_fan_out=family == "gpt2", **options)  # fmt: skip
    theirs = peft.get_peft_model(model, config)
    shaken(theirs)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    times = 1 if family == "gpt2" else 2
    alpha = 3.0 * (times**0.5 if "use_rslora" in options else times)
    more: dict[str, Any] = {"rank_stabilized": "use_rslora" in options, "magnitude": "use_dora" in options}
    wanted: list[Technique] = [LoRA(rank=2 * times, alpha=alpha, targets="attention.qkv", **more),
                               LoRA(rank=2, alpha=3.0, targets=OURS_IN_MLP[family], **more)]  # fmt: skip
    if times == 1:
        wanted = [LoRA(rank=2, alpha=3.0, targets=f"attention.qkv|{OURS_IN_MLP[family]}", **more)]
    run = run_from(family, tmp_path / "base", wanted, tmp_path / "adapter")
    far = difference(theirs.eval(), run.model)
    keep(record_property, "lora", "peft", far)
    assert far < 1e-5
    with pytest.raises(UserError, match=rf"rank: {2 * times}, alpha: \d.*targets: attention\.qkv"):
        run_from(family, tmp_path / "base", [LoRA(rank=5)], tmp_path / "adapter")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_their_ia3_loads_here(family: str, tmp_path: Path, record_property: Recorder) -> None:
    model = saved(family, tmp_path / "base")
    theirs = peft.get_peft_model(model, peft.IA3Config(fan_in_fan_out=family == "gpt2"))
    shaken(theirs)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    run = run_from(family, tmp_path / "base", [IA3(queries=family == "gpt2")], tmp_path / "adapter")
    far = difference(theirs.eval(), run.model)
    keep(record_property, "ia3", "peft", far)
    assert far < 1e-5
    if family == "gpt2":
        with pytest.raises(UserError, match="scales the queries"):
            run_from(family, tmp_path / "base", [IA3()], tmp_path / "adapter")


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = saved("gpt2", tmp_path / "base")
    peft.get_peft_model(model, peft.IA3Config(fan_in_fan_out=True)).save_pretrained(str(tmp_path / "ia3"))
    with pytest.raises(UserError, match="holds `ia3`, which the recipe lacks"):
        run_from("gpt2", tmp_path / "base", [LoRA()], tmp_path / "ia3")
    with pytest.raises(UserError, match="has no place for"):
        run_from("gpt2", tmp_path / "base", [IA3(queries=True, hidden="")], tmp_path / "ia3")
    run = run_from("gpt2", tmp_path / "base", [LoRA(targets="attention.*"), IA3()])
    with pytest.raises(UserError, match="holds one of lora, ia3"):
        write(run, "gpt2", tmp_path / "base", tmp_path / "out")
    with pytest.raises(UserError, match="did not write"):
        write(run_from("gpt2", tmp_path / "base", [IA3()]), "gpt2", tmp_path / "base", tmp_path / "base")
