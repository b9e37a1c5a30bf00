"""Encoders trained from folders and runs: heads that begin anew, LoRA beside them, resume, plans, eval, export."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers, processors

import scrimp
from scrimp.cli import app
from scrimp.errors import RecipeError, UserError
from scrimp.inference import evaluate, export, open_run
from scrimp.models import hub
from scrimp.models.transformer import TransformerConfig
from scrimp.planning import plan
from scrimp.recipe import Recipe
from scrimp.restore import starting_weights
from scrimp.weights import initialize
from tiny import assert_equal, flat

GOOD, BAD = ["good", "fine", "great"], ["bad", "poor", "awful"]
REST = ["the", "film", "was", "very", "so", "a", "plot", "and", "it", "not"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ENCODER = {"vocab": 40, "context": 32, "layers": 2, "width": 32, "heads": 2, "causal": False, "norm_at": "post",
           "embed_norm": True, "segments": 2}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder `bert` as transformers writes BertModel, tables and a text."""
    root = tmp_path_factory.mktemp("encoders")
    model = TransformerConfig(**ENCODER, head="none", pooler=True).build()
    initialize(model, 1)
    hub.write(root / "bert", model.config, dict(model.named_parameters()))
    words = [*SPECIAL, *GOOD, *BAD, *REST, *map(str, range(19))]
    inner = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    inner.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    inner.add_special_tokens(SPECIAL)
    inner.save(str(root / "tokenizer.json"))
    draw = np.random.default_rng(0)
    lines = ["text,label,score"]
    for i in range(160):
        word = draw.choice((GOOD, BAD)[i % 2])
        rest = " ".join(draw.choice(words[11:], draw.integers(2, 14)))
        lines.append(f"{rest} {word} {draw.integers(19)},{('praise', 'blame')[i % 2]},{1 - i % 2}")
    (root / "rows.csv").write_text("\n".join(lines))
    (root / "more.csv").write_text("\n".join([lines[0], *lines[1:21]]))
    (root / "text.txt").write_text("\n\n".join(lines[1:] * 20))
    (root / "pairs.jsonl").write_text("".join(
        json.dumps({"a": f"the film {i} was {GOOD[i % 3]}", "b": f"{i} {BAD[i % 3]}"}) + "\n" for i in range(19)
    ))  # fmt: skip
    return root


def recipe(place: Path, task: Any = "classify", **more: Any) -> Recipe:
    data = {"name": "labelled", "source": str(place / "rows.csv"), "tokenizer": str(place / "tokenizer.json"),
            "context": 32, "holdout": 0.3}  # fmt: skip
    data |= {"classify": {"label": "label"}, "regress": {"score": "score"}}.get(task, {})
    data |= more.pop("data", {})
    given = {"model": {"from": str(place / "bert"), "dropout": 0.1}, "data": data, "task": task, "batch": 8,
             "duration": "6 step", "techniques": {"adamw": {"lr": 5e-3}}, "log": {"tensorboard": False},
             "validate": {"every": "6 step", "batches": 2}}  # fmt: skip
    return Recipe.read({**given, **more})


def trained(made: Recipe, out: Path, **more: Any) -> tuple[Any, list[str]]:
    notes: list[str] = []
    result = scrimp.train(replace(made, out=str(out)), **more,
                          observe=lambda e, f: notes.append(f["text"]) if e == "note" else None)  # fmt: skip
    return result, notes


def test_a_classifier_learns_and_says_what_begins_anew(place: Path, tmp_path: Path) -> None:
    made = recipe(place, duration="90 step", validate={"every": "90 step", "batches": 9})
    result, notes = trained(made, tmp_path)
    assert notes == ["Note: head begins anew: the weights have none that fit."]
    assert result.validation["accuracy"] > 0.9
    assert {"loss", "accuracy", "macro_f1", "matthews"} == set(result.validation)
    _, notes = trained(recipe(place), tmp_path, start=result.folder)
    assert notes == []
    whole = evaluate(result.folder)
    assert whole == pytest.approx(result.validation, rel=1e-5)
    # Other data is measured whole: training rows too, here the first twenty.
    other = evaluate(result.folder, data=[str(place / "more.csv")])
    assert other["accuracy"] * 20 == pytest.approx(round(other["accuracy"] * 20))
    assert evaluate(result.folder, data=["source=" + str(place / "more.csv"), "context=30"]) == pytest.approx(other)


def test_an_exported_classifier_is_that_of_transformers(place: Path, tmp_path: Path) -> None:
    transformers: Any = import_module("transformers")
    result, _ = trained(recipe(place), tmp_path)
    export(result.folder, tmp_path / "out")
    assert hub.read_labels(tmp_path / "out") == ("blame", "praise")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = ["the film was good", "a very poor plot and it was so awful"]
    given = tokenizer(texts, return_tensors="pt", padding=True)
    assert set(given) == {"input_ids", "token_type_ids", "attention_mask"}
    assert given["input_ids"][0].tolist() == [2, 11, 12, 13, 5, 3, *[0] * (given["input_ids"].shape[1] - 6)]
    run = open_run(result.folder)
    with torch.no_grad():
        ours = run.model.eval()(given["input_ids"], attended=given["attention_mask"].bool())
        torch.testing.assert_close(theirs(**given).logits, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("task", ["classify", "masked-lm", "regress"])
def test_a_resumed_run_is_the_same(task: str, place: Path, tmp_path: Path) -> None:
    made = recipe(place, task, checkpoint={"every": "2 step", "keep": 9})
    result, _ = trained(made, tmp_path)
    again, _ = trained_on(result.folder / "checkpoints" / "step-000000002")
    assert_equal(flat(result.run.state()), flat(again.run.state()))


def trained_on(checkpoint: Path) -> tuple[Any, list[str]]:
    return scrimp.train(resume=checkpoint), []


@pytest.mark.parametrize("task", ["classify", "masked-lm", "regress"])
def test_parts_of_a_batch_have_the_gradient_of_the_whole(task: str, place: Path) -> None:
    made = recipe(place, task, techniques={"sgd": {"lr": 0.1}}, dtype="float64", duration="2 step")
    parts = replace(made, techniques=(*made.techniques, scrimp.Accumulate(parts=3)))
    a, b = (dict(scrimp.train(one, save=False).run.model.named_parameters()) for one in (made, parts))
    for name, p in a.items():
        torch.testing.assert_close(p, b[name], rtol=1e-9, atol=1e-11)


def test_lora_trains_the_head_that_begins_anew(place: Path, tmp_path: Path) -> None:
    made = recipe(place, techniques={"adamw": {}, "lora": {"rank": 2}}, checkpoint={"adapter_only": True})
    result, _ = trained(made, tmp_path)
    before = hub.loaded(place / "bert").state_dict()
    now = dict(result.run.model.named_parameters())
    moving = {name for name, p in now.items() if p.requires_grad and ".lora." not in name}
    assert moving == {"head.weight", "head.bias", "pooler.weight", "pooler.bias"}
    assert torch.equal(now["blocks.0.mlp.up.weight"], before["blocks.0.mlp.up.weight"])
    assert not torch.equal(now["pooler.weight"], before["pooler.weight"])
    assert evaluate(result.folder) == pytest.approx(evaluate(result.folder / "checkpoints" / "step-000000006"))


def test_adapters_go_on_with_the_head_that_fits(place: Path, tmp_path: Path) -> None:
    made = recipe(place, techniques={"adamw": {}, "lora": {"rank": 2, "targets": "mlp.up|head"}})
    first, _ = trained(made, tmp_path)
    source = starting_weights(made, made.data.open(), str(first.folder))
    assert source is not None
    assert {n for n in source["model"] if n.startswith("head")} == {
        "head.weight", "head.bias", "head.lora.a", "head.lora.b",
    }  # fmt: skip
    (tmp_path / "three.csv").write_text((place / "rows.csv").read_text() + "\nthe film,neither,0\n" * 4)
    other = recipe(place, techniques={"adamw": {}, "lora": {"rank": 2, "targets": "mlp.up|head"}},
                   data={"source": str(tmp_path / "three.csv")})  # fmt: skip
    source = starting_weights(other, other.data.open(), str(first.folder))
    assert source is not None
    assert {n for n in source["model"] if n.startswith(("head", "pooler"))} == {"pooler.weight", "pooler.bias"}


def test_the_head_of_a_language_model_does_not_begin_anew(tmp_path: Path, place: Path) -> None:
    data = {"source": str(place / "text.txt"), "tokenizer": "bytes", "context": 16}
    options = {"layers": 1, "width": 16, "heads": 2}
    made = replace(recipe(place, "causal-lm"), data=data, model={**options, "tied": False}, sample={"tokens": 0})
    first, _ = trained(made, tmp_path)
    with pytest.raises(UserError, match="unexpected: head.weight"):
        trained(replace(made, model=options), tmp_path, start=first.folder)


def test_the_command_line_measures_other_data(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result, _ = trained(recipe(place), tmp_path)
    words = ["eval", str(result.folder), "--data", str(place / "more.csv"), "--data", "context=30"]
    app(words, standalone_mode=False)
    said = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    wanted = evaluate(result.folder, data=[str(place / "more.csv")])
    assert {name: float(value) for name, value in said.items()} == pytest.approx(wanted, rel=1e-4)
    with pytest.raises(UserError, match="writes no text"):
        app(["generate", str(result.folder)], standalone_mode=False)


def test_masked_language_models_train_on_a_stream_too(place: Path, tmp_path: Path) -> None:
    data = {"name": "text", "source": str(place / "text.txt"), "tokenizer": "bytes", "context": 32, "mask": True}
    made = recipe(place, "masked-lm", model={**ENCODER, "vocab": 0}, validate={"every": "3 step", "batches": 1})
    made = replace(made, data=data)
    assert plan(made).live > 0  # before the corpus is built
    result, notes = trained(made, tmp_path)
    assert result.run.model.config.vocab == 258
    assert {"loss", "perplexity", "accuracy"} == set(result.validation)
    assert evaluate(result.folder, 2, [str(place / "text.txt"), "holdout=0.5", "context=16"])["loss"] > 0
    with pytest.raises(UserError, match=r"data\.mask: true"):
        scrimp.train(replace(made, data={**data, "mask": False}), save=False)
    # What was learned is the start of a classifier; its head of tokens is not.
    rows = {"name": "labelled", "source": str(place / "rows.csv"), "label": "label", "context": 32,
            "tokenizer": str(result.folder / "tokenizer.json")}  # fmt: skip
    tuned = replace(recipe(place, "classify"), data=rows, model={**ENCODER, "vocab": 0, "pooler": True})
    _, notes = trained(tuned, tmp_path, start=result.folder)
    assert notes == ["Note: pooler and head begin anew: the weights have none that fit."]


def test_embeddings_of_pairs_are_pooled_by_the_mean(place: Path, tmp_path: Path) -> None:
    data = {"source": str(place / "pairs.jsonl"), "text": "a", "text_pair": "b", "pairs": "apart", "holdout": 0.3}
    made = recipe(place, "embed", data=data, duration="40 step", validate={"every": "40 step", "batches": 9})
    result, notes = trained(made, tmp_path)
    assert notes == []
    config = result.run.model.config
    assert (config.head, config.pooling, config.pooled) == ("none", "mean", False)
    assert {"loss", "recall_at_1"} == set(result.validation)
    assert evaluate(result.folder, data=[str(place / "pairs.jsonl")])["recall_at_1"] > 0.5


@pytest.mark.parametrize("task", ["classify", "masked-lm", "regress"])
def test_runs_are_planned(task: str, place: Path) -> None:
    made = recipe(place, task)
    found = plan(made)
    assert found.live > 0
    assert "the longest" in " ".join(found.notes)


@pytest.mark.parametrize(
    ("task", "data", "words"),
    [
        ("classify", {"label": ""}, r"needs labels.*Set data\.label to the column"),
        ("regress", {"score": "", "label": "label"}, "needs scores"),
        ("embed", {}, "needs pair_tokens"),
        ("causal-lm", {}, "needs tokens"),
        ("classify", {"context": 64}, "the data's context is 64, the model's 32"),
    ],
)
def test_tasks_and_data_that_do_not_fit_are_refused(task: str, data: dict, words: str, place: Path) -> None:
    with pytest.raises(UserError, match=words):
        scrimp.train(recipe(place, task, data=data), save=False)


def test_other_data_must_fit_the_run(place: Path, tmp_path: Path) -> None:
    result, _ = trained(recipe(place), tmp_path)
    with pytest.raises(RecipeError, match="sorce"):
        evaluate(result.folder, data=["sorce=x"])
    (tmp_path / "odd.csv").write_text("text,label\nthe film,praise\nthe plot,nothing\n")
    with pytest.raises(UserError, match="classes that `labels` does not have: nothing"):
        evaluate(result.folder, data=[str(tmp_path / "odd.csv")])
    with pytest.raises(UserError, match="the data's vocab"):
        evaluate(result.folder, data=["tokenizer=bpe", "vocab=300"])
