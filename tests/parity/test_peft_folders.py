"""Adapters go to peft and come from it, as folders: outputs are the same on GPT-2, Llama and BERT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
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
from scrimp.techniques.tuning.prefix import Prefix
from scrimp.techniques.tuning.prompt import Prompt
from tiny import keep, recipe, run_of
from tiny_tasks import Memory

transformers: Any = import_module("transformers")
Recorder = Callable[[str, object], None]
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
"""Of peft, about transformers."""

SIZE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "vocab_size": 32, "max_position_embeddings": 20}  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "causal-lm", {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 4,
                                              "n_positions": 20, "bos_token_id": 0, "eos_token_id": 0}),
    "llama": ("LlamaForCausalLM", "causal-lm", {**SIZE, "num_key_value_heads": 2}),
    "bert": ("BertForMaskedLM", "masked-lm", SIZE),
    "bert of classes": ("BertForSequenceClassification", "classify", {**SIZE, "num_labels": 3}),
}  # fmt: skip
MINE: dict[str, list[Technique]] = {
    "lora": [LoRA(rank=2, alpha=6.0, targets="attention.*|mlp.down")],
    "rslora": [LoRA(rank=4, alpha=6.0, rank_stabilized=True)],
    "two ranks": [LoRA(rank=2, targets="attention.qkv"), LoRA(rank=3, alpha=5.0, targets="mlp.up")],
    "lora with dropout": [LoRA(rank=2, dropout=0.1)],
    "dora": [LoRA(rank=2, alpha=6.0, magnitude=True)],
    "ia3": [IA3()],
    "ia3 of queries": [IA3(queries=True, hidden="")],
    "prompt": [Prompt(length=3, shift=True)],
    "prefix": [Prefix(length=3, shift=True)],
}
DECODERS, LAYERS = ("gpt2", "llama"), ("gpt2", "llama", "bert")
PAIRS = [(family, case) for case in MINE for family in (DECODERS if case.startswith("pr") else LAYERS)]


def saved(family: str, folder: Path) -> Any:
    """A model of transformers with random weights in every part, saved."""
    kind, _, options = MODELS[family]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(transformers.AutoConfig.for_model(family.split()[0], **options))
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
        if any(part in name for part in (".lora", ".ia3", ".prefix.", "prompts.", "prompt_encoder.")):
            p.data.add_(0.2 * torch.randn_like(p))


def write(run: Run, family: str, base: Path, out: Path) -> None:
    hub_peft.write(out, str(base), family.split()[0], run.model.config, run.order.techniques, run.model)


def difference(theirs: Any, ours: Any) -> float:
    tokens = torch.arange(32).view(2, 16) * 7 % 29 + 3
    with torch.no_grad():
        two = ours(tokens)
        one = theirs(input_ids=tokens).logits[:, -two.shape[1] :]  # peft gives logits of prompts too
    assert float(two.std()) > 0.1
    return float((one - two).abs().max())


@pytest.mark.parametrize(("family", "case"), [*PAIRS, ("bert of classes", "prefix")])
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
    assert plain < 1e-5 or case in VECTORS  # which begin as something new
    assert moved > 0.02
    assert far < 1e-5
    again = run_from(family, tmp_path / "base", MINE[case], tmp_path / "out")
    for name, p in run.model.named_parameters():
        assert torch.equal(p, again.model.get_parameter(name)), name
    if case == "lora with dropout":
        assert loaded.peft_config["default"].lora_dropout == 0.1
        with pytest.raises(UserError, match=r"rank: 2, .*, dropout: 0\.1"):
            run_from(family, tmp_path / "base", [LoRA(rank=2)], tmp_path / "out")


QKV = {"gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"], "bert": ["query", "value"]}
IN_MLP = {"gpt2": "mlp.c_proj", "llama": "down_proj", "bert": "intermediate.dense"}
OURS_IN_MLP = {"gpt2": "mlp.down", "llama": "mlp.down", "bert": "mlp.up"}


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
@pytest.mark.parametrize("family", LAYERS)
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


@pytest.mark.parametrize("family", DECODERS)
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


VECTORS: dict[str, tuple[Any, Technique]] = {
    "prompt": (peft.PromptTuningConfig(num_virtual_tokens=3), Prompt(length=3, shift=True)),
    "p-tuning": (peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8), Prompt(length=3, shift=True)),
    "prefix": (peft.PrefixTuningConfig(num_virtual_tokens=3), Prefix(length=3, shift=True)),
}


@pytest.mark.parametrize("case", VECTORS)
@pytest.mark.parametrize("family", DECODERS)
def test_their_prompts_and_prefixes_load_here(
    family: str, case: str, tmp_path: Path, record_property: Recorder
) -> None:
    model, (config, mine) = saved(family, tmp_path / "base"), VECTORS[case]
    theirs = peft.get_peft_model(model, replace(config, task_type="CAUSAL_LM")).eval()
    shaken(theirs)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    run = run_from(family, tmp_path / "base", [mine], tmp_path / "adapter")
    far = difference(theirs, run.model)
    keep(record_property, mine.name, "peft", far)
    assert far < 1e-5
    for other in (replace(mine, length=2), replace(mine, shift=False), replace(mine, encoder="mlp")):  # type: ignore[call-arg]
        with pytest.raises(UserError, match=rf"Write `{mine.name}: \{{length: 3, shift: true\}}`"):
            run_from(family, tmp_path / "base", [other], tmp_path / "adapter")


def test_a_prefix_comes_with_its_head(tmp_path: Path) -> None:
    model = saved("bert of classes", tmp_path / "base")
    theirs = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)).eval()
    shaken(theirs)
    theirs.base_model.classifier.modules_to_save["default"].weight.data.mul_(3.0)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    run = run_from("bert of classes", tmp_path / "base", [Prefix(length=3, shift=True)], tmp_path / "adapter")
    assert difference(theirs, run.model) < 1e-5
    with torch.no_grad():
        run.model.get_parameter("head.weight").mul_(-2.0)
    run.model.get_parameter("head.weight").requires_grad_(True)  # as of a head that began anew
    write(run, "bert of classes", tmp_path / "base", tmp_path / "out")
    loaded = peft.PeftModel.from_pretrained(saved("bert of classes", tmp_path / "base"), tmp_path / "out").eval()
    assert difference(loaded, run.model) < 1e-5


@pytest.mark.parametrize(
    ("written", "back"),
    [
        (Prompt(length=3, encoder="mlp", shift=True), Prompt(length=3, shift=True)),
        (Prefix(length=3, encoder="mlp", hidden=8, shift=True), Prefix(length=3, shift=True)),
        (Prompt(length=3), Prompt(length=3, shift=True)),
        (Prefix(length=3), Prefix(length=3, shift=True)),
    ],
    ids=["encoded prompt", "encoded prefix", "prompt without a shift", "prefix without a shift"],
)
def test_encoders_are_dropped_and_rotary_vectors_turned(written: Technique, back: Technique, tmp_path: Path) -> None:
    saved("llama", tmp_path / "base")
    run = run_from("llama", tmp_path / "base", [written])
    shaken(run.model)
    write(run, "llama", tmp_path / "base", tmp_path / "out")
    again = run_from("llama", tmp_path / "base", [back], tmp_path / "out")
    tokens = torch.arange(32).view(2, 16) * 7 % 29 + 3
    torch.testing.assert_close(run.model(tokens), again.model(tokens), rtol=0, atol=1e-5)


def test_prompts_that_peft_does_not_know_are_refused(tmp_path: Path) -> None:
    saved("gpt2", tmp_path / "gpt2")
    saved("bert", tmp_path / "bert")
    for family, technique, why in (
        ("gpt2", Prompt(length=3), "stand further right"),
        ("gpt2", Prefix(length=3, shift=True, targets="blocks.0.attention"), "of all blocks"),
        ("bert", Prompt(length=3, shift=True), "whose head is `lm`"),
        ("bert", Prefix(length=3, shift=True), "whose head is `lm` or `classes`"),
    ):
        with pytest.raises(UserError, match=why):
            write(run_from(family, tmp_path / family, [technique]), family, tmp_path / family, tmp_path / "out")
    run = run_from("gpt2", tmp_path / "gpt2", [Prefix(length=3, shift=True)])
    write(run, "gpt2", tmp_path / "gpt2", tmp_path / "out")
    with pytest.raises(UserError, match="holds `prefix`, which the recipe lacks"):
        run_from("gpt2", tmp_path / "gpt2", [Prompt(length=3, shift=True)], tmp_path / "out")


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
