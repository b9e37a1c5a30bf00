"""Prompts and prefixes against peft, both ways, on a tiny GPT-2 and a tiny Llama with fewer key/value heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from scrimp.errors import UserError
from scrimp.models.hub import write
from scrimp.models.hub_files import write_json
from scrimp.models.hub_peft_prompts import from_peft, settings, to_peft
from scrimp.registry import technique_class
from scrimp.run import Run
from scrimp.techniques.tuning.prefix import Prefix
from scrimp.techniques.tuning.prompt import Prompt
from scrimp.weights import load_weights
from tiny import recipe, run_of

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

GPT2: dict[str, Any] = {"layers": 2, "width": 16, "heads": 2, "context": 24, "activation": "gelu_tanh"}
LLAMA: dict[str, Any] = {
    "layers": 2, "width": 16, "heads": 4, "kv_heads": 2, "positions": "rotary", "norm": "rmsnorm", "bias": False,
    "activation": "swiglu", "hidden": 24, "tied": False, "context": 24,
}  # fmt: skip
MODELS = pytest.mark.parametrize("model", [GPT2, LLAMA], ids=["gpt2", "llama"])


def base_of(run: Run, folder: Path) -> Any:
    """The model that a run tunes, as transformers has it."""
    config: Any = run.model.config
    plain = {n: p.detach() for n, p in run.model.named_parameters() if n in run.base}
    write(folder, config, plain)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def run_with(technique: Any, model: dict[str, Any]) -> Any:
    run = run_of(recipe(technique, model=model))
    run.model.eval()
    with torch.no_grad():
        for name, p in run.model.named_parameters():
            if "prefix" in name or "prompts" in name:
                p.normal_(0, 0.5, generator=torch.Generator().manual_seed(len(name)))
    return run


@MODELS
@pytest.mark.parametrize(
    "technique", [Prompt(length=3, shift=True), Prefix(length=3, shift=True)], ids=["prompt", "prefix"]
)
def test_what_we_trained_says_the_same_there(technique: Any, model: dict[str, Any], tmp_path: Path) -> None:
    run = run_with(technique, model)
    base = base_of(run, tmp_path / "base")
    raw, tensors = to_peft(run.model, str(tmp_path / "base"))
    (tmp_path / "adapter").mkdir()
    write_json(tmp_path / "adapter/adapter_config.json", raw)
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "adapter/adapter_model.safetensors")
    theirs: Any = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    tokens = run.batch(0)["tokens"]
    logits = theirs(input_ids=tokens).logits[:, -tokens.shape[1] :]
    torch.testing.assert_close(run.model(tokens), logits, rtol=0, atol=2e-6)


@MODELS
@pytest.mark.parametrize("kind", [peft.PromptTuningConfig, peft.PrefixTuningConfig], ids=["prompt", "prefix"])
def test_what_they_trained_says_the_same_here(kind: Any, model: dict[str, Any], tmp_path: Path) -> None:
    base = base_of(run_of(recipe(model=model)), tmp_path / "base")
    theirs: Any = peft.get_peft_model(base, kind(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight.normal_(0, 0.5)
    theirs.save_pretrained(tmp_path / "adapter")
    raw = theirs.peft_config["default"].to_dict() | {"peft_type": kind(task_type="CAUSAL_LM").peft_type.value}
    ((name, given),) = settings(raw).items()
    run: Any = run_with(technique_class(name)(**given), model)
    held = load_file(tmp_path / "adapter/adapter_model.safetensors")
    load_weights(run.model, from_peft(raw, held, run.model), lambda _: False)
    tokens = run.batch(0)["tokens"]
    logits = theirs(input_ids=tokens).logits[:, -tokens.shape[1] :]
    torch.testing.assert_close(run.model(tokens), logits, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", [Prompt, Prefix])
def test_rotary_vectors_without_a_shift_are_turned(kind: Any) -> None:
    run = run_with(kind(length=3), LLAMA)
    raw, tensors = to_peft(run.model)
    ((name, given),) = settings(raw).items()
    other: Any = run_with(technique_class(name)(**given), LLAMA)
    load_weights(other.model, from_peft(raw, tensors, other.model), lambda _: False)
    tokens = run.batch(0)["tokens"]
    torch.testing.assert_close(run.model(tokens), other.model(tokens), rtol=0, atol=2e-6)


def test_what_cannot_be_said_is_refused() -> None:
    with pytest.raises(UserError, match="stand further right"):
        to_peft(run_with(Prompt(length=3), GPT2).model)
    with pytest.raises(UserError, match="has no prompts"):
        to_peft(run_of(recipe(model=GPT2)).model)
    with pytest.raises(UserError, match="are no prompts"):
        settings({"peft_type": "LORA"})
