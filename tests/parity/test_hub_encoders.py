"""BERT, RoBERTa and XLM-RoBERTa folders: outputs equal those of transformers, read and written; heads begin anew."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from scrimp.data.tokenizer import framed, train_bpe
from scrimp.errors import UserError
from scrimp.models import hub
from scrimp.models.presets import expand
from scrimp.models.transformer import Transformer, TransformerConfig
from scrimp.weights import initialize

transformers: Any = import_module("transformers")
Recorder = Callable[[str, object], None]

SIZE = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 40, "type_vocab_size": 2}  # fmt: skip
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("bert", "Model", {}),
    "bert-mlm": ("bert", "ForMaskedLM", {"hidden_act": "relu", "layer_norm_eps": 1e-3}),
    "bert-mlm-untied": ("bert", "ForMaskedLM", {"tie_word_embeddings": False, "hidden_act": "gelu_new"}),
    "bert-classes": ("bert", "ForSequenceClassification", {"num_labels": 3}),
    "bert-score": ("bert", "ForSequenceClassification", {"num_labels": 1}),
    "roberta": ("roberta", "Model", {"type_vocab_size": 1}),
    "roberta-mlm": ("roberta", "ForMaskedLM", {"pad_token_id": 1}),
    "roberta-mlm-untied": ("roberta", "ForMaskedLM", {"tie_word_embeddings": False}),
    "roberta-classes": ("roberta", "ForSequenceClassification", {"num_labels": 5, "type_vocab_size": 1}),
    "xlm-roberta-classes": ("xlm-roberta", "ForSequenceClassification", {"num_labels": 2}),
}
ENCODER = {"vocab": 90, "context": 24, "layers": 2, "width": 32, "heads": 4, "hidden": 48, "causal": False,
           "norm_at": "post", "embed_norm": True, "segments": 2}  # fmt: skip


def theirs(case: str) -> Any:
    family, ending, options = CASES[case]
    # RoBERTa takes the padding's id out of the positions, so that no token may have it.
    config = transformers.AutoConfig.for_model(family, **{**SIZE, "pad_token_id": 1 if "roberta" in family else 0,
                                                          **options})  # fmt: skip
    torch.manual_seed(0)
    stem = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta"}[family]
    model = getattr(transformers, stem + ending)(config)
    for p in model.parameters():  # norms and biases too, so that a mix-up shows
        p.data.add_(0.1 * torch.randn_like(p))
    return model.eval()


def inputs(segments: int) -> dict[str, torch.Tensor]:
    """Two texts of 20 and 13 tokens, the second filled up with the id 1; two segments."""
    tokens = torch.arange(40).view(2, 20) * 7 % 80 + 5
    attended = torch.ones(2, 20, dtype=torch.bool)
    attended[1, 13:] = False
    kinds = (torch.arange(20) > 8).long().expand(2, 20) * (segments - 1)
    return {"tokens": tokens.where(attended, torch.tensor(1)), "attended": attended, "segments": kinds}


def outputs(model: Any, mine: Transformer) -> tuple[torch.Tensor, torch.Tensor]:
    """Theirs and ours, of the tokens that are attended where there is one for each."""
    given = inputs(mine.config.segments)
    with torch.no_grad():
        out = model(given["tokens"], attention_mask=given["attended"].long(), token_type_ids=given["segments"])
        if mine.config.head == "none" and not mine.config.pooler:
            return out.last_hidden_state[given["attended"]], mine.states(**given)[given["attended"]]
        found = mine(**given)
        if mine.config.head == "mlm":
            return out.logits[given["attended"]], found[given["attended"]]
        return (out.pooler_output if mine.config.head == "none" else out.logits), found


def difference(model: Any, mine: Transformer) -> float:
    a, b = outputs(model, mine)
    assert a.shape == b.shape
    assert float(a.std()) > 0.01 or a.shape[-1] == 1
    return float((a - b).abs().max())


def reopened(folder: Path) -> Any:
    """What transformers reads from our folder; it must find every tensor and no other."""
    stem = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, stem).from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def named(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


@pytest.mark.parametrize("case", CASES)
def test_outputs_equal_both_ways(case: str, tmp_path: Path, record_property: Recorder) -> None:
    model = theirs(case)
    model.save_pretrained(tmp_path / "in")
    read = hub.loaded(tmp_path / "in")
    into = difference(model, read)
    labels = hub.read_labels(tmp_path / "in")
    family = hub.write(tmp_path / "out", read.config, named(read), family=CASES[case][0], labels=labels)
    assert family == CASES[case][0]
    back = difference(reopened(tmp_path / "out"), read)
    record_property("case", case)
    record_property("read", into)
    record_property("written", back)
    assert max(into, back) < 1e-5
    a, b = load_file(tmp_path / "in/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    # Where nothing is tied, transformers keeps a bias that it never adds.
    idle = set() if read.config.tied else {"cls.predictions.bias", "lm_head.bias"}
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a if n not in idle)
    assert hub.read_config(tmp_path / "out") == hub.read_config(tmp_path / "in")
    assert hub.read_labels(tmp_path / "out") == labels


@pytest.mark.parametrize(
    "options",
    [
        {"head": "mlm"},
        {"head": "mlm", "tied": False, "activation": "quick_gelu"},
        {"head": "classes", "classes": 4, "pooler": True},
        {"head": "none", "pooler": True},
        {"head": "mlm", "position_offset": 2},
        {"head": "classes", "classes": 1, "pooler": True, "position_offset": 2, "segments": 1},
    ],
    ids=str,
)
def test_our_own_models_load_in_transformers(options: dict[str, Any], tmp_path: Path) -> None:
    model = TransformerConfig(**{**ENCODER, **options}).build().eval()
    initialize(model, 0)
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    hub.write(tmp_path / "out", model.config, named(model))
    assert difference(reopened(tmp_path / "out"), model) < 1e-5


def test_names_of_classes_are_kept(tmp_path: Path) -> None:
    model = TransformerConfig(**ENCODER, head="classes", classes=2, pooler=True).build()
    initialize(model, 0)
    hub.write(tmp_path / "out", model.config, named(model), labels=("bad", "good"))
    assert reopened(tmp_path / "out").config.id2label == {0: "bad", 1: "good"}
    assert hub.read_labels(tmp_path / "out") == ("bad", "good")
    with pytest.raises(UserError, match="3 names for 2 classes"):
        hub.write(tmp_path / "out", model.config, named(model), labels=("bad", "good", "so"))


def test_a_trained_tokenizer_comes_along(tmp_path: Path) -> None:
    tokenizer = framed(train_bpe(iter(["so good a film, so bad a plot"] * 9), 280))
    model = TransformerConfig(**{**ENCODER, "vocab": tokenizer.vocab}, head="classes", classes=2, pooler=True).build()
    initialize(model, 0)
    hub.write(tmp_path / "out", model.config, named(model), tokenizer)
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    given = read(["so good", "a bad plot"], return_tensors="pt", padding=True)
    assert given["input_ids"][0, 0] == tokenizer.end
    again = reopened(tmp_path / "out")
    assert again.config.pad_token_id is None  # or transformers would freeze that row of the embedding
    with torch.no_grad():
        mine = model.eval()(given["input_ids"], attended=given["attention_mask"].bool())
        torch.testing.assert_close(again(**given).logits, mine, rtol=0, atol=1e-5)
    other = replace(model.config, position_offset=2)
    with pytest.raises(UserError, match="whose padding has the id 1, not None"):
        hub.write(tmp_path / "other", other, dict(other.build().named_parameters()), tokenizer)


def test_names_of_the_first_berts_are_read(tmp_path: Path) -> None:
    model = theirs("bert-mlm")
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    old = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
           for n, t in held.items()}  # fmt: skip
    assert old.keys() != held.keys()
    # They also hold the head that is tied, the head of the other task, and a buffer.
    old |= {"cls.predictions.decoder.weight": old["bert.embeddings.word_embeddings.weight"].clone(),
            "cls.seq_relationship.weight": torch.zeros(2, 32), "bert.embeddings.position_ids": torch.arange(40),
            "bert.pooler.dense.weight": torch.zeros(32, 32), "bert.pooler.dense.bias": torch.zeros(32)}  # fmt: skip
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert difference(model, hub.loaded(tmp_path)) < 1e-5


def absent(folder: Path, **options: Any) -> set[str]:
    """Parameters of a model with a head that its folder does not give."""
    config = TransformerConfig(**{**hub.read_config(folder), **options})
    with torch.device("meta"):
        own = {n for n, _ in config.build().named_parameters()}
    weights = hub.read_weights(folder, config)
    assert weights.keys() <= own
    return own - weights.keys()


def test_a_head_that_the_folder_lacks_is_left_out(tmp_path: Path) -> None:
    for case in ("bert", "bert-mlm", "bert-classes", "roberta-mlm"):
        theirs(case).save_pretrained(tmp_path / case)
    head, pooler = {"head.weight", "head.bias"}, {"pooler.weight", "pooler.bias"}
    transform = {f"head_transform.{part}.{name}" for part in ("dense", "norm") for name in ("weight", "bias")}
    assert absent(tmp_path / "bert", head="classes", classes=2) == head
    assert absent(tmp_path / "bert", head="none", pooling="mean") == set()
    assert absent(tmp_path / "bert", head="mlm") == transform | {"head.bias"}
    assert absent(tmp_path / "bert-mlm", head="classes", classes=2) == head | pooler
    assert absent(tmp_path / "bert-classes", head="classes", classes=3) == set()
    assert absent(tmp_path / "bert-classes", head="classes", classes=2) == head
    assert absent(tmp_path / "roberta-mlm", head="classes", classes=2) == head | pooler


def test_all_but_the_head_must_be_there(tmp_path: Path) -> None:
    theirs("bert").save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    del held["encoder.layer.1.output.dense.bias"]
    held |= {"encoder.extra": torch.zeros(1), "embeddings.LayerNorm.weight": torch.zeros(3)}
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as error:
        hub.loaded(tmp_path)
    assert "missing: encoder.layer.1.output.dense.bias; unexpected: encoder.extra; misshapen: embeddings.L" in str(
        error.value
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "silu"}, "activation `silu`"),
        ({"position_embedding_type": "relative_key"}, "positions of type `relative_key`"),
        ({"is_decoder": True}, "a decoder's attention"),
        ({"hidden_size": None}, "does not say hidden_size"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
    ],
)
def test_what_the_transformer_does_not_do_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", **SIZE, **changes}))
    with pytest.raises(UserError, match=words):
        hub.read_config(tmp_path)


@pytest.mark.parametrize(
    ("options", "family", "option"),
    [
        ({"head": "classes", "classes": 2}, "", "pooler"),
        ({"head": "classes", "classes": 2, "pooler": True, "pooling": "mean"}, "", "pooling"),
        ({"head": "lm"}, "", "head"),
        ({"head": "mlm", "segments": 0}, "", "segments"),
        ({"head": "mlm", "embed_norm": False}, "", "embed_norm"),
        ({"head": "mlm", "position_offset": 2}, "bert", "position_offset"),
        ({"head": "mlm", "position_offset": 2, "activation": "relu"}, "", "activation"),
        ({"head": "mlm"}, "gpt2", "family"),
    ],
    ids=str,
)
def test_what_no_encoder_folder_can_hold_is_refused(
    options: dict[str, Any], family: str, option: str, tmp_path: Path
) -> None:
    model = TransformerConfig(**{**ENCODER, **options}).build()
    initialize(model, 0)
    with pytest.raises(UserError) as error:
        hub.write(tmp_path / "out", model.config, named(model), family=family)
    assert error.value.where.rpartition(".")[2] == option
    assert not list(tmp_path.iterdir())


def test_a_recipe_leaves_the_head_to_the_task(tmp_path: Path) -> None:
    theirs("bert-classes").save_pretrained(tmp_path)
    options = expand({"from": str(tmp_path), "dropout": 0.1})
    assert not {"head", "classes"} & set(options)
    assert (options["causal"], options["norm_at"], options["context"], options["pooler"]) == (False, "post", 40, True)
