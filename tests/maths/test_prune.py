"""Data pruning: which items are kept, the scores, and the file that holds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scrimp.errors import UserError
from scrimp.recipe import Recipe
from scrimp.run import Run
from scrimp.scoring import el2n, grand, perplexity, prototypes
from scrimp.scoring.prototypes import k_means
from scrimp.scoring.score import score
from scrimp.scoring.scores import Scores, read, write
from scrimp.techniques.importance_sampling.prune import chosen, ranked
from tiny import example, recipe, run_of
from tiny_tasks import TINY, Memory, recipe_for

VALUES = np.array([5.0, 1.0, 3.0, 2.0, 4.0, 0.0])


def test_which_items_are_kept() -> None:
    assert ranked(VALUES, "hard", 0.0)[:3].tolist() == [0, 4, 2]
    assert ranked(VALUES, "hard", 1 / 6)[:3].tolist() == [4, 2, 3]
    assert ranked(VALUES, "easy", 0.0)[:3].tolist() == [5, 1, 3]
    assert sorted(ranked(VALUES, "middle", 0.0)[:2]) == [2, 3]


def test_classes_keep_their_least_share() -> None:
    labels = np.array([0, 1, 0, 1, 0, 1])
    ranks = ranked(VALUES, "hard", 0.0)
    assert sorted(chosen(ranks, 3, None, 0.0)) == [0, 2, 4]
    assert sorted(chosen(ranks, 3, labels, 1.0)) == [0, 3, 4]


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.75, 1.0])
def test_so_many_are_trained_on_once_an_epoch(keep: float) -> None:
    run = run_of(recipe(example("prune", keep=keep)))
    assert len(run.index) == round(40 * keep) == len(set(run.index))


def made(tmp_path: Path, entry: str = "classify", **settings: Any) -> Recipe:
    tiny = TINY[entry]
    return recipe(model=dict(tiny.model) | {"dropout": 0.0}, data=Memory(entry), task=tiny.name or entry,
                  dtype="float64", **{"duration": "4 step", **settings})  # fmt: skip


def built(entry: str) -> Run:
    return run_of(recipe(model=dict(TINY[entry].model), data=Memory(entry), task=TINY[entry].name or entry,
                         dtype="float64"))  # fmt: skip


def test_el2n_is_the_length_of_the_gradient_of_the_logits() -> None:
    run = built("classify")
    found = el2n.score(run)
    batch = run.task.batch(run.data.train.read(np.arange(4)), np.arange(4))
    run.model.eval()
    logits = run.task.logits(run.model, batch)
    logits.retain_grad()
    torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="sum").backward()
    np.testing.assert_allclose(found[:4], logits.grad.norm(dim=1).numpy(), rtol=1e-10)


@pytest.mark.parametrize("entry", ["classify", "causal-lm"])
def test_grand_is_the_length_of_each_items_gradient(entry: str) -> None:
    run = built(entry)
    found = grand.score(run)
    run.model.eval()
    for place in (0, 7):
        item = run.task.batch(run.data.train.read(np.array([place])), np.array([place]))
        run.model.zero_grad()
        (run.task.loss(run.model, item) / run.task.count(item)).backward()
        squares = sum(float(p.grad.square().sum()) for p in run.model.parameters() if p.grad is not None)
        assert found[place] == pytest.approx(squares**0.5, rel=1e-10)


def test_perplexity_is_the_mean_loss() -> None:
    run = built("causal-lm")
    batches = [run.task.batch(run.data.train.read(np.arange(16)), np.arange(16))]
    run.model.eval()
    assert perplexity.score(run).mean() == pytest.approx(run.task.evaluate(run.model, batches)["loss"], rel=1e-10)


def test_clusters_are_found() -> None:
    centers = torch.tensor([[0.0, 9], [9, 0], [9, 9]], dtype=torch.float64)
    points = torch.cat([c + torch.randn(20, 2, generator=torch.Generator().manual_seed(0)) for c in centers])
    found = k_means(points, 3, seed=0)
    assert torch.cdist(centers, found).amin(1).max() < 1
    assert torch.cdist(points, found).amin(1).max() < 4


@pytest.mark.parametrize("entry", ["masked-image", "causal-lm", "contrastive"])
def test_prototypes_are_of_models_without_labels(entry: str) -> None:
    found = prototypes.score(built(entry), clusters=2)
    assert found.shape == (16,) and (found >= -1e-9).all() and (found <= 2).all() and found.std() > 0


@pytest.mark.parametrize("by", ["el2n", "grand", "forgetting", "prototypes", "perplexity"])
def test_scores_are_written_once_and_used(by: str, tmp_path: Path) -> None:
    one = made(tmp_path, duration="3 epoch")
    out = tmp_path / "scores.parquet"
    first = score(one, by, out, runs=1, say=lambda text: None)
    more = score(one, by, out, runs=2, say=lambda text: None)
    assert more.runs.shape == (2, 16) and np.array_equal(more.runs[0], first.runs[0])
    np.testing.assert_array_equal(read(out).runs, more.runs)
    pruned = recipe(example("prune", which="hard", keep=0.25, scores=str(out)), model=one.model, data=one.data,
                    task=one.task)  # fmt: skip
    kept = run_of(pruned).index
    assert sorted(kept) == sorted(np.argsort(-more.mean, kind="stable")[:4])


def test_scores_of_something_else_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "scores.parquet"
    score(made(tmp_path), "el2n", out, say=lambda text: None)
    with pytest.raises(UserError, match="another by"):
        score(made(tmp_path), "grand", out, say=lambda text: None)
    write(out, Scores(np.zeros((1, 9)), {"data": {"key": "other"}}))
    few = recipe(example("prune", which="hard", scores=str(out), keep=0.5))
    assert len(run_of(few).index) == 20, "data that say nothing of themselves are only counted"
    with pytest.raises(UserError, match="no file of scores at"):
        run_of(recipe(example("prune", which="hard", scores=str(tmp_path / "none"))))
    (tmp_path / "bad").write_text("no parquet")
    with pytest.raises(UserError, match="cannot be read"):
        run_of(recipe(example("prune", which="hard", scores=str(tmp_path / "bad"))))


def test_scores_need_classes_and_forgetting_epochs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="predicts no classes"):
        score(recipe_for("regress"), "el2n", tmp_path / "a", say=lambda text: None)
    with pytest.raises(UserError, match="nothing can be forgotten"):
        score(made(tmp_path), "forgetting", tmp_path / "b", say=lambda text: None)
