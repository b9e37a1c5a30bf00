"""Documents that share a window do not see each other, and everything else stays as it was."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pairs.grid import planned_and_measured
from scrimp.data import TextData
from scrimp.data.stream import numbered
from scrimp.models.transformer import TransformerConfig
from scrimp.recipe import Recipe
from scrimp.run import build
from scrimp.stages import new_clock
from scrimp.tasks.causal_lm import CausalLM
from scrimp.technique import Technique
from scrimp.training import train
from scrimp.weights import initialize
from tiny import MODEL, Letters, Stream, example, flat, recipe, run_of

END = 0
LENGTHS = (5, 1, 7, 3)


class Packed(Stream):
    """Windows in which some tokens end a document."""

    def read(self, ids: np.ndarray, sample: np.ndarray | None = None) -> dict[str, np.ndarray]:
        tokens = self.windows(ids)
        return {"tokens": tokens, "documents": numbered(tokens, END)}


@dataclass(frozen=True)
class PackedData:
    """As `TinyData`, with documents."""

    context: int = 16
    isolate: bool = True

    def open(self) -> Any:
        @dataclass
        class Opened:
            train: Stream
            validation: Stream
            tokenizer: Letters

        kind = Packed if self.isolate else Stream
        return Opened(kind(40, self.context, 32, 0), kind(8, self.context, 32, 1), Letters())


def model_of(**options: Any) -> torch.nn.Module:
    model = TransformerConfig(vocab=40, context=16, layers=2, width=32, heads=2, init_std=0.3, **options).build()
    initialize(model, 0)
    return model.double().eval()


@pytest.mark.parametrize("positions", ["learned", "rotary", "none"])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_packed_documents_are_computed_as_each_alone(positions: str, norm: str) -> None:
    model = model_of(positions=positions, norm=norm)
    chance = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 40, (2, sum(LENGTHS)), generator=chance)
    documents = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS)).expand(2, -1)
    packed = model(tokens, documents=documents)
    whole = model(tokens)
    for part, alone in zip(packed.split(LENGTHS, 1), tokens.split(LENGTHS, 1), strict=True):
        torch.testing.assert_close(part, model(alone), rtol=0, atol=1e-6)
    assert (packed[:, : LENGTHS[0]] - whole[:, : LENGTHS[0]]).abs().max() < 1e-6
    assert (packed - whole).abs().max() > 1e-2, "without documents, they see each other"


def test_rows_may_be_cut_at_different_places() -> None:
    model = model_of(positions="rotary", kv_heads=1)
    tokens = torch.arange(16).reshape(2, 8) + 1
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 2]])
    packed = model(tokens, documents=documents)
    torch.testing.assert_close(packed[0, 3:], model(tokens[:1, 3:])[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(packed[1, 2:7], model(tokens[1:, 2:7])[0], rtol=0, atol=1e-6)


def test_a_document_is_predicted_from_the_end_before_it_and_from_nothing_older() -> None:
    """The loss of a window is that of its documents, each with the end-of-text token before it."""
    tokens = np.array([[7, 8, 9, END, 5, 6, END, 3, 4]])
    items = {"tokens": tokens, "documents": numbered(tokens, END)}
    assert items["documents"].tolist() == [[0, 0, 0, 1, 1, 1, 2, 2, 2]]
    task, model = CausalLM(), model_of()
    batch = task.batch(items, np.zeros(1, dtype=np.int64))
    assert batch["documents"].shape == batch["tokens"].shape == batch["targets"].shape == (1, 8)
    alone = [[7, 8, 9, END], [END, 5, 6, END], [END, 3, 4]]
    parts = [task.loss(model, task.batch({"tokens": np.array([part])}, np.zeros(1, dtype=np.int64))) for part in alone]
    torch.testing.assert_close(task.loss(model, batch), torch.stack(parts).sum(), rtol=0, atol=1e-6)
    assert int(task.count(batch)) == 8


def test_text_says_where_documents_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRIMP_CACHE", str(tmp_path / "cache"))
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"text number {i} " * 3)
    plain = TextData(source=str(tmp_path / "*.txt"), tokenizer="bytes", context=64, holdout=0.3)
    isolated = replace(plain, isolate=True)
    data, other = isolated.open(), plain.open()
    assert data.train.path == other.train.path, "the same tokens on the disk"
    ids = np.arange(len(data.train))
    items = data.train.read(ids)
    assert set(other.train.read(ids)) == {"tokens"}
    assert items["tokens"].tolist() == other.train.read(ids)["tokens"].tolist()
    ends = items["tokens"] == data.tokenizer.end
    assert (np.diff(items["documents"], axis=1) == ends[:, 1:]).all() and ends.sum() > 5
    assert isolated.outline().train.read(ids[:1])["documents"].shape == (1, 65)


TRIED = [
    ["accumulate"], ["recompute"], ["fused_loss"], ["autocast"], ["accumulate", "recompute", "fused_loss"],
    pytest.param(["compile"], marks=pytest.mark.slow, id="compile"),
]  # fmt: skip


def losses(made: Recipe, steps: int = 3) -> list[float]:
    run = run_of(made)
    found: list[float] = []
    assert run.backward and run.step and run.optimizer
    for i in range(steps):
        batch = run.batch(i)
        run.set_lr()
        found.append(float(run.backward(batch, run.task.count(batch))))
        run.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.clock.tick(run.recipe.batch, 1)
    return found


@pytest.mark.parametrize("names", TRIED)
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_techniques_compute_the_same_with_documents(names: list[str], positions: str) -> None:
    if names == ["compile"] and positions == "rotary":
        pytest.skip("compiling takes long; once is enough")
    settings: dict[str, Any] = {"model": {**MODEL, "positions": positions}, "data": PackedData()}
    chosen: list[Technique] = [example(name) for name in names]
    plain, tried = losses(recipe(**settings)), losses(recipe(*chosen, **settings))
    near = 2e-2 if "autocast" in names else 1e-5
    np.testing.assert_allclose(tried, plain, rtol=near)
    whole = losses(recipe(**{**settings, "data": PackedData(isolate=False)}))
    assert abs(whole[-1] - plain[-1]) > 1e-4, "documents make a difference that would be seen"


def test_length_warmup_shortens_documents_too() -> None:
    made = recipe(example("length_warmup"), data=PackedData())
    data = made.data.open()
    run = build(made, data, new_clock(made, data))
    batch, whole = run.batch(0), run_of(recipe(data=PackedData())).batch(0)
    assert {name: t.shape[1] for name, t in batch.items() if t.ndim > 1} == dict.fromkeys(
        ("tokens", "targets", "documents"), 8
    )
    assert torch.equal(batch["documents"], whole["documents"][:, :8])
    result = train(made, save=False)
    assert np.isfinite(result.validation["loss"])
    assert flat(result.run.state())


def test_masks_are_planned_to_the_byte_and_do_not_grow_with_the_blocks() -> None:
    peaks: dict[tuple[int, bool], int] = {}
    for layers in (2, 6):
        for isolate in (False, True):
            made = recipe(model={**MODEL, "layers": layers}, data=PackedData(context=64, isolate=isolate))
            planned, peaks[layers, isolate] = planned_and_measured(made)
            assert planned == peaks[layers, isolate]
    more = [peaks[layers, True] - peaks[layers, False] for layers in (2, 6)]
    assert 0 < more[1] <= more[0] < 2 * 8 * 4 * 64 * 64, "one mask for all blocks"
