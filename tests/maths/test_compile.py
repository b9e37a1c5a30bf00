"""Compilation by blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from scrimp.applied import apply
from scrimp.errors import UserError
from scrimp.run import Run
from tiny import MODEL, assert_equal, example, recipe, run_of


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


def gradients(run: Run) -> dict[str, Tensor]:
    batch = run.batch(0)
    assert run.backward
    loss = run.backward(batch, run.task.count(batch))
    return {n: p.grad for n, p in run.model.named_parameters() if p.grad is not None} | {"loss": loss}


def near(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)


def test_traced_blocks_compute_the_same() -> None:
    plain = gradients(run_of(recipe(dtype="float64")))
    traced = gradients(run_of(recipe(example("compile", backend="aot_eager"), dtype="float64")))
    assert counters["stats"]["unique_graphs"] > 0
    assert plain.keys() == traced.keys()
    assert max(float((plain[n] - traced[n]).abs().max()) for n in plain) < 1e-12


@pytest.mark.parametrize("others", [(), ("recompute",)])
def test_blocks_share_graphs(others: tuple[str, ...]) -> None:
    """Ten blocks are more than torch would compile apart; dropout numbers its places."""
    ten = MODEL | {"layers": 10}
    gradients(run_of(recipe(example("compile", backend="eager"), *map(example, others), model=ten)))
    assert 1 <= counters["stats"]["unique_graphs"] <= 2
    assert not counters["graph_break"]


@pytest.mark.parametrize("mode", ["block", "selective"])
def test_recompute_inside_gives_the_same_gradients(mode: str) -> None:
    inner = example("recompute", mode=mode)
    plain = gradients(run_of(recipe(dtype="float64")))
    both = gradients(run_of(recipe(example("compile", backend="aot_eager"), inner, dtype="float64")))
    assert max(float((plain[n] - both[n]).abs().max()) for n in plain) < 1e-12


@pytest.mark.slow
def test_inductor_computes_the_same() -> None:
    small = MODEL | {"layers": 4}
    near(
        gradients(run_of(recipe(model=small))),
        gradients(run_of(recipe(example("compile", backend="inductor"), model=small))),
    )


def test_validation_is_not_compiled() -> None:
    run = run_of(recipe(example("compile", backend="eager")))
    assert run.evaluate
    scores = run.evaluate(lambda model: run.task.evaluate(model, [run.batch(0)]))
    assert counters["stats"]["unique_graphs"] == 0
    plain = run_of(recipe())
    assert plain.evaluate
    assert scores == plain.evaluate(lambda model: plain.task.evaluate(model, [plain.batch(0)]))


def test_a_model_without_blocks_is_compiled_whole() -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Bilinear(4, 4, 2)

    x = torch.ones(3, 4)
    wanted = model()(x, x)
    assert_equal({"y": wanted}, {"y": apply(model(), [example("compile", backend="eager")])(x, x)})
    assert counters["stats"]["unique_graphs"] == 1


def test_a_plan_does_not_compile() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        run = run_of(recipe(example("compile", backend="inductor")))
    assert not [n for n, m in run.model.named_modules() if "forward" in vars(m)]


def test_without_a_compiler_inductor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"techniques.compile.backend: inductor needs a C\+\+ compiler"):
        run_of(recipe(example("compile", backend="inductor")))
    run_of(recipe(example("compile", backend="eager")))
