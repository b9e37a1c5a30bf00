"""Classification, regression and retrieval: losses written out, metrics against scikit-learn and scipy."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scrimp.errors import RecipeError
from scrimp.recipe import Recipe
from scrimp.tasks.classify import Classify
from scrimp.tasks.embed import Embed
from scrimp.tasks.metrics import classified, correlated, ranks
from scrimp.tasks.regress import Regress


class Table(nn.Module):
    """Logits of each item: a row of a table, chosen by its first token or pixel."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(10, outputs, generator=torch.Generator().manual_seed(0)))
        self.seen: list[set[str]] = []

    def forward(self, **given: Tensor) -> Tensor:
        self.seen.append(set(given))
        return self.table[given.get("tokens", given.get("images")).flatten(1)[:, 0].long()]  # type: ignore[union-attr]


def test_classes_of_texts_and_of_images() -> None:
    model, task = Table(3).eval(), Classify()
    labels = np.array([2, 0, 1, 1])
    for items in (
        {"tokens": np.arange(8).reshape(4, 2), "attended": np.ones((4, 2), bool), "labels": labels},
        {"images": np.arange(8, dtype=np.float32).reshape(4, 1, 1, 2), "labels": labels},
    ):
        batch = task.batch(items, np.arange(4))
        wanted = F.cross_entropy(model.table[[0, 2, 4, 6]], torch.tensor(labels), reduction="sum")
        torch.testing.assert_close(task.loss(model, batch), wanted)
        assert model.seen[-1] == (set(items) | {"sample"}) - {"labels"}
        assert int(task.count(batch)) == 4
        assert int(task.tokens(batch)) == (8 if "tokens" in items else 4)
        found = task.evaluate(model, [batch, batch])
        assert found["loss"] == pytest.approx(wanted.item() / 4, rel=1e-6)
        right = model.table[[0, 2, 4, 6]].argmax(-1) == torch.tensor(labels)
        assert found["accuracy"] == pytest.approx(float(right.float().mean()))


def test_smoothing_is_of_training_only() -> None:
    model, task = Table(3), Classify(label_smoothing=0.3)
    batch = task.batch({"tokens": np.array([[1], [2]]), "labels": np.array([0, 2])}, np.arange(2))
    log = F.log_softmax(model.table[[1, 2]], -1)
    target = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.1, 0.8]])
    torch.testing.assert_close(task.loss(model.train(), batch), -(target * log).sum())
    torch.testing.assert_close(task.loss(model.eval(), batch), -(log[0, 0] + log[1, 2]))


def test_the_loss_of_scores_and_its_sum_over_parts() -> None:
    model, task = Table(1), Regress()
    scores = np.array([0.5, -1.0, 2.0], dtype=np.float32)
    batch = task.batch({"tokens": np.array([[1], [2], [3]]), "scores": scores}, np.arange(3))
    wanted = ((model.table[[1, 2, 3], 0] - torch.from_numpy(scores)) ** 2).sum()
    torch.testing.assert_close(task.loss(model, batch), wanted)
    parts = [task.loss(model, {name: t[i : i + 1] for name, t in batch.items()}) for i in range(3)]
    torch.testing.assert_close(torch.stack(parts).sum(), wanted)
    found = task.evaluate(model, [batch])
    assert found["loss"] == pytest.approx(wanted.item() / 3, rel=1e-6)
    assert found["pearson"] == pytest.approx(float(np.corrcoef(model.table.detach()[[1, 2, 3], 0], scores)[0, 1]))


def test_metrics_of_classes_by_hand_and_against_scikit_learn() -> None:
    # Of class 0: two right, one missed, one said wrongly; of class 1: one right, one missed, one said wrongly.
    found = classified(np.array([0, 0, 1, 0, 1]), np.array([0, 0, 0, 1, 1]))
    assert found == pytest.approx({"accuracy": 0.6, "macro_f1": (2 / 3 + 1 / 2) / 2, "matthews": 1 / 6})
    assert classified(np.array([1, 1]), np.array([1, 1])) == {"accuracy": 1.0, "macro_f1": 1.0, "matthews": 0.0}
    metrics: Any = import_module("sklearn.metrics")
    draw = np.random.default_rng(0)
    for classes in (2, 7):
        labels, predicted = draw.integers(0, classes, 50), draw.integers(0, classes, 50)
        assert classified(predicted, labels) == pytest.approx(
            {"accuracy": metrics.accuracy_score(labels, predicted),
             "macro_f1": metrics.f1_score(labels, predicted, average="macro"),
             "matthews": metrics.matthews_corrcoef(labels, predicted)}
        )  # fmt: skip


def test_metrics_of_scores_by_hand_and_against_scipy() -> None:
    assert ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [2.5, 0.0, 2.5, 1.0]
    assert correlated(np.array([1.0, 2.0, 9.0]), np.array([1.0, 2.0, 3.0]))["spearman"] == pytest.approx(1.0)
    assert correlated(np.array([1.0, 1.0]), np.array([1.0, 2.0])) == {"pearson": 0.0, "spearman": 0.0}
    stats: Any = import_module("scipy.stats")
    draw = np.random.default_rng(0)
    a = draw.integers(0, 9, 40).astype(float)
    b = a + draw.normal(0, 3, 40)
    assert correlated(a, b) == pytest.approx({"pearson": stats.pearsonr(a, b)[0], "spearman": stats.spearmanr(a, b)[0]})


def pairs(first: list[int], second: list[int]) -> dict[str, np.ndarray]:
    ones = np.ones((len(first), 1), bool)
    return {"tokens": np.array(first)[:, None], "attended": ones, "pair_tokens": np.array(second)[:, None],
            "pair_attended": ones}  # fmt: skip


def test_the_contrastive_loss_and_recall_by_hand() -> None:
    model, task = Table(2), Embed(temperature=0.5)
    # Vectors of unit length at 0, 90, 30 and 60 degrees, some of them longer, which changes nothing.
    angles = torch.tensor([0.0, 90.0, 30.0, 60.0]).deg2rad()
    model.table.data[:4] = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor([1.0, 3.0, 1.0, 2.0])[:, None]
    batch = task.batch(pairs([0, 1], [2, 3]), np.arange(2))
    near, far = 3**0.5 / 2 / 0.5, 0.5 / 0.5  # cosines of 30 and 60 degrees over the temperature
    wanted = 2 * -(near - np.log(np.exp(near) + np.exp(far)))
    assert task.loss(model, batch).item() == pytest.approx(wanted, rel=1e-5)
    assert task.evaluate(model, [batch]) == pytest.approx({"loss": wanted / 2, "recall_at_1": 1.0}, rel=1e-5)
    # Partners are looked for in the whole set, not in the batch alone: now one text's is further than another's.
    first, second = (task.batch(pairs([a], [b]), np.arange(1)) for a, b in ((0, 3), (1, 2)))
    assert task.evaluate(model, [first, second])["recall_at_1"] == 0.0
    assert int(task.tokens(batch)) == 4


def test_a_loss_of_pairs_refuses_parts_of_batches() -> None:
    base = {"model": {"layers": 1}, "data": {"name": "labelled"}, "techniques": {"sgd": {}, "accumulate": {}}}
    with pytest.raises(RecipeError) as error:
        Recipe.read({**base, "task": "embed"})
    assert "techniques.accumulate: it computes a batch in parts" in str(error.value)
    Recipe.read({**base, "task": "classify"})
    Recipe.read({**base, "task": "embed", "techniques": {"sgd": {}, "recompute": {}, "clip": {}}})
