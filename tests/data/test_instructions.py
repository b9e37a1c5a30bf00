"""Conversations become tokens of which the answers are learned; what is wrong with a table is told."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scrimp.data.chat import CannotRenderError, Chat, open_tokenizer
from scrimp.data.conversations import marked
from scrimp.data.instructions import Data, InstructionData
from scrimp.data.packing import Packed
from scrimp.errors import UserError
from scrimp.tasks.causal_lm import CausalLM

END = "<|endoftext|>"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Eins."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "Zwei."},
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRIMP_CACHE", str(tmp_path / "cache"))


def pairs(count: int = 40) -> list[dict[str, Any]]:
    return [{"prompt": f"What is {i} + {i}?", "response": f"It is {2 * i}, für sure."} for i in range(count)]


def jsonl(path: Path, records: list[Any]) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def settings(source: Path | str, **changes: Any) -> InstructionData:
    return replace(InstructionData(source=str(source), context=128, holdout=0.2), **changes)


def learned(data: Data, part: Packed) -> list[str]:
    """The texts that are targets, one by one."""
    items = part.read(np.arange(len(part)))
    found: list[str] = []
    for targets in items["targets"]:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], targets != -100, [0]])))
        found += [data.tokenizer.decode(targets[a:b].tolist()) for a, b in edges.reshape(-1, 2)]
    return found


def test_only_answers_are_learned_and_nothing_is_lost(tmp_path: Path) -> None:
    data = settings(jsonl(tmp_path / "t.jsonl", pairs())).open()
    train, held = learned(data, data.train), learned(data, data.validation)
    assert sorted(train + held) == sorted(f" {row['response']}{END}" for row in pairs())
    assert len(held) >= 1 and not set(train) & set(held)
    assert data.meta["documents"] == {"train": len(train), "validation": len(held)}


def test_a_window_holds_each_conversation_as_a_document(tmp_path: Path) -> None:
    data = settings(jsonl(tmp_path / "t.jsonl", pairs())).open()
    items = data.train.read(np.arange(len(data.train)))
    assert {name: (value.shape, value.dtype) for name, value in items.items()} == dict.fromkeys(
        ("tokens", "targets", "documents"), ((len(data.train), 128), np.dtype(np.int64))
    )
    texts = []
    for tokens, documents in zip(items["tokens"], items["documents"], strict=True):
        assert (np.diff(documents) >= 0).all() and documents[0] == 0
        texts += [data.tokenizer.decode(tokens[documents == n].tolist()) for n in np.unique(documents)]
    whole = [text for text in texts if text.startswith(f"{END}User: What")]
    assert len(whole) == data.meta["documents"]["train"]
    assert all(text.endswith("sure.") for text in whole), "the end is a target only"
    assert data.train.filled > 0.6
    batch = CausalLM().batch(items, np.arange(len(data.train)))
    assert batch["tokens"].shape == batch["targets"].shape == batch["documents"].shape == (len(data.train), 128)


def test_targets_are_the_next_tokens(tmp_path: Path) -> None:
    data = settings(jsonl(tmp_path / "t.jsonl", pairs()), pack=False).open()
    assert len(data.train) == data.meta["documents"]["train"]
    items = data.train.read(np.arange(len(data.train)))
    inputs, targets, documents = (items[name] for name in ("tokens", "targets", "documents"))
    both = (targets[:, :-1] != -100) & (documents[:, 1:] == 0)
    assert both.any() and (targets[:, :-1][both] == inputs[:, 1:][both]).all()
    padding = documents == 1
    assert (targets[padding] == -100).all() and (inputs[padding] == data.tokenizer.end).all()


def test_plain_text_of_a_conversation() -> None:
    chat = Chat(END)
    text, answers = chat.answers(TALK)
    assert text == (f"{END}System: Be brief.\n\nUser: One?\n\nAssistant: Eins.{END}User: Two?\n\nAssistant: Zwei.{END}")
    assert [text[a:b] for a, b in answers] == [f" Eins.{END}", f" Zwei.{END}"]
    assert chat.text(TALK[:2], ask=True).endswith("User: One?\n\nAssistant:")


def folder(tmp_path: Path, template: str = CHATML, **said: Any) -> Path:
    place = tmp_path / "tokenizer"
    place.mkdir()
    plain = open_tokenizer("bytes")
    plain.inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    plain.inner.save(str(place / "tokenizer.json"))
    said = {"chat_template": template, "eos_token": {"content": "<|im_end|>"}, "bos_token": "<|im_start|>"} | said
    (place / "tokenizer_config.json").write_text(json.dumps(said))
    return place


def test_a_folders_own_template_is_used(tmp_path: Path) -> None:
    place = folder(tmp_path)
    data = settings(jsonl(tmp_path / "t.jsonl", [{"messages": TALK}, *pairs(9)]), tokenizer=str(place)).open()
    assert data.tokenizer.chat.end == "<|im_end|>"
    texts = learned(data, data.train) + learned(data, data.validation)
    assert "Eins.<|im_end|>\n" in texts and "Zwei.<|im_end|>\n" in texts and len(texts) == 11
    ids = data.tokenizer.prompted("Hi")
    assert data.tokenizer.decode(ids) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    (place / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert open_tokenizer(str(place)).chat.text(TALK[:2]) == "Be brief.One?"
    assert open_tokenizer(str(place), template="plain").chat.template == ""


def test_what_is_learned_is_what_transformers_marks(tmp_path: Path) -> None:
    transformers = import_module("transformers")
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + '<|im_end|>' + '\n' }}{% endgeneration %}"
        "{% else %}{{ m['content'] + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    place = folder(tmp_path, template, tokenizer_class="PreTrainedTokenizerFast", eos_token="<|im_end|>")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(place))
    wanted = theirs.apply_chat_template(TALK, return_assistant_tokens_mask=True, return_dict=True)
    ours = open_tokenizer(str(place))
    text, answers = ours.chat.answers(TALK)
    encoded = ours.inner.encode(text, add_special_tokens=False)
    assert encoded.ids == list(wanted["input_ids"])
    assert marked(encoded.offsets, answers).tolist() == list(wanted["assistant_masks"])


def test_templates_run_in_a_sandbox(tmp_path: Path) -> None:
    for hostile in (
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}{% endfor %}",
    ):
        with pytest.raises(CannotRenderError, match="refuses"):
            Chat(END, hostile).text(TALK)
    with pytest.raises(UserError, match=r"not one.*plain"):
        Chat(END, "{% if %}").text(TALK)
    with pytest.raises(CannotRenderError, match="alternate"):
        Chat(END, "{{ raise_exception('roles must alternate') }}").text(TALK)
    with pytest.raises(CannotRenderError, match="earlier turns"):
        Chat(END, "{{ messages[-1].content }}").answers(TALK)


@pytest.mark.parametrize("kind", ["csv", "parquet", "arrow", "saved", "splits"])
def test_kinds_of_tables_hold_the_same(tmp_path: Path, kind: str) -> None:
    wanted = settings(jsonl(tmp_path / "t.jsonl", pairs())).open()
    found = settings(table(tmp_path / "other", kind, pairs())).open()
    assert learned(found, found.train) == learned(wanted, wanted.train)
    assert learned(found, found.validation) == learned(wanted, wanted.validation)


def table(place: Path, kind: str, records: list[dict[str, Any]]) -> Path:
    place.mkdir()
    if kind == "csv":
        with (place / "t.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
        return place
    pyarrow = import_module("pyarrow")
    made = pyarrow.Table.from_pylist(records)
    if kind == "parquet":
        from pyarrow import parquet

        parquet.write_table(made, place / "t.parquet", row_group_size=7)
        return place / "t.parquet"
    part = place
    if kind == "splits":
        (place / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
        part = place / "train"
        part.mkdir()
    names = ["a.arrow", "b.arrow"]
    for name, rows in zip(names, (made.slice(0, 15), made.slice(15)), strict=True):
        with pyarrow.OSFile(str(part / name), "wb") as file:
            new = pyarrow.ipc.new_file if kind == "arrow" else pyarrow.ipc.new_stream
            with new(file, made.schema) as writer:
                writer.write_table(rows, max_chunksize=4)
    if kind != "arrow":
        (part / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return place


BAD: list[Any] = [
    "{not json",
    "[1]",
    {"prompt": "x"},
    {"prompt": "x", "response": 3},
    {"prompt": "x", "response": " "},
    {"messages": "x"},
    {"messages": [{"role": "user", "content": "no answer"}]},
    {"messages": [{"role": "user", "content": [1]}]},
    {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]},
]


def test_faulty_rows_are_left_out_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = jsonl(tmp_path / "t.jsonl", [BAD[0], BAD[2], *pairs()])
    data = settings(source, skip=0.1).open()
    told = capsys.readouterr().err
    assert "2 of 42 items were left out: " in told
    assert "t.jsonl, line 1: is not JSON" in told and "t.jsonl, line 2: has no column `response`" in told
    assert data.meta["skipped"] == 2 and sum(data.meta["documents"].values()) == 40
    settings(source, skip=0.1).open()
    assert "2 of 42 items" in capsys.readouterr().err, "also when it comes from the cache"


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_each_fault_is_found(tmp_path: Path, bad: Any) -> None:
    with pytest.raises(UserError, match=r"1 of 41 items are faulty, .*t.jsonl, line 41: .*Mend"):
        settings(jsonl(tmp_path / "t.jsonl", [*pairs(), bad])).open()


def test_a_wrong_column_is_named_at_once(tmp_path: Path) -> None:
    rows = [{"instruction": "a", "output": "b"}] * 200
    with pytest.raises(UserError, match=r"no item can be used.*no column `prompt`.*instruction"):
        settings(jsonl(tmp_path / "t.jsonl", rows)).open()


def test_columns_may_be_joined(tmp_path: Path) -> None:
    rows = [{"instruction": f"Add {i}.", "input": "" if i % 2 else "5", "output": str(i)} for i in range(20)]
    data = settings(jsonl(tmp_path / "t.jsonl", rows), prompt="instruction|input", response="output").open()
    items = data.train.read(np.arange(len(data.train)))
    text = "".join(data.tokenizer.decode(row.tolist()) for row in items["tokens"])
    found = [
        i for i in range(20) if f"User: Add {i}.\n\n{'' if i % 2 else f'5{chr(10)}{chr(10)}'}Assistant: {i}" in text
    ]
    assert len(found) == data.meta["documents"]["train"]


def test_a_validation_table_of_its_own(tmp_path: Path) -> None:
    one, two = jsonl(tmp_path / "a.jsonl", pairs(20)), jsonl(tmp_path / "b.jsonl", pairs()[20:25])
    data = settings(one, validation=str(two)).open()
    assert data.meta["documents"] == {"train": 20, "validation": 5}


def test_copies_of_a_prompt_are_held_out_together(tmp_path: Path) -> None:
    rows = [{"prompt": f"q {i // 4}", "response": f"answer {i}"} for i in range(80)]
    data = settings(jsonl(tmp_path / "t.jsonl", rows)).open()
    sides = [{int(t.split()[-1].removesuffix(END)) // 4 for t in learned(data, part)}
             for part in (data.train, data.validation)]  # fmt: skip
    assert sides[0] | sides[1] == set(range(20)) and not sides[0] & sides[1] and sides[1]
    same = [{"prompt": "q", "response": str(i)} for i in range(9)]
    with pytest.raises(UserError, match=r"begin alike.*validation"):
        settings(jsonl(tmp_path / "s.jsonl", same)).open()


def test_too_long_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = jsonl(tmp_path / "t.jsonl", [*pairs(), {"prompt": "x" * 500, "response": "y"}])
    data = settings(source, too_long="start").open()
    assert data.meta["too_long"] == 1
    assert "1 conversations exceed the context of 128: their starts were cut." in capsys.readouterr().err
    with pytest.raises(UserError, match="has an answer within the context"):
        settings(source, context=8).open()


def test_plans_before_it_is_built(tmp_path: Path) -> None:
    made = settings(jsonl(tmp_path / "t.jsonl", pairs()))
    outline = made.outline()
    assert "not built yet" in getattr(outline, "note", "")
    assert CausalLM().batch(outline.train.read(np.arange(1)), np.zeros(1))["documents"].shape == (1, 128)
    made.open()
    assert isinstance(made.outline(), Data)


def test_a_saved_tokenizer_is_read_back(tmp_path: Path) -> None:
    place = folder(tmp_path)
    for template in ("", "plain"):
        made = settings(jsonl(tmp_path / "t.jsonl", pairs()), tokenizer=str(place), template=template)
        out = tmp_path / f"out-{template}"
        out.mkdir()
        first = made.open().tokenizer
        first.save(out)
        again = made.used(out, {}).tokenizer
        assert again.end == first.end
        assert again.prompted("Hi") == first.prompted("Hi")  # type: ignore[union-attr]
