"""From a run's attention to cycles."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from scrimp.cli import app
from scrimp.errors import UserError
from scrimp.machines.accelerators.architecture import accelerator
from scrimp.machines.accelerators.collect import collect, held_out, traced
from scrimp.machines.accelerators.planned import attention
from scrimp.machines.accelerators.report import simulate
from scrimp.machines.machine import KNOWN
from scrimp.models.layers import AttentionCore
from scrimp.planning import Plan, plan
from tiny import example, recipe, run_of


class Half(nn.Module):
    """A core that keeps the keys of even places, and says so."""

    def __init__(self) -> None:
        super().__init__()
        self.tracing, self.trace = False, cast(Any, None)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None = None) -> Tensor:
        kept = (torch.arange(k.shape[2]) % 2 == 0).expand(1, q.shape[1], q.shape[2], -1)
        if self.tracing:
            self.trace = SimpleNamespace(mask=kept, predictor="elsa", details={"rank": 8})
        return nn.functional.scaled_dot_product_attention(q, k, v, kept)


def test_a_decoder_attends_causally() -> None:
    run = run_of(recipe(example("sgd")))
    traces = collect(run, list(held_out(run, 2)))
    assert len(traces) == 2 * 4  # sequences and layers
    assert {(t.heads, t.queries, t.keys, t.width, t.predictor.kind) for t in traces} == {(2, 16, 16, 16, "none")}
    assert traces[0].kept == 2 * 16 * 17 / 2
    assert not any(module._forward_hooks for module in run.model.modules())
    report = simulate(traces, accelerator("elsa"))
    assert "dense" in report.notes[0] and report.cycles > 0


def test_a_core_says_what_it_kept() -> None:
    run = run_of(recipe(example("sgd")))
    for block in run.model.blocks:  # pyright: ignore
        block.attention.core = Half()  # pyright: ignore
    traces = collect(run, list(held_out(run, 1)))
    assert {trace.density for trace in traces} == {0.5}
    assert (traces[0].predictor.kind, traces[0].predictor.rank) == ("elsa", 8)
    assert not any(getattr(module, "tracing", False) for module in run.model.modules())
    assert simulate(traces, accelerator("elsa")).notes == []
    assert "chosen by elsa" in simulate(traces, accelerator("dota")).notes[0]


@pytest.mark.parametrize("additive", [False, True])
def test_the_mask_of_a_call_is_the_trace(additive: bool) -> None:
    q = torch.zeros(2, 3, 4, 8)
    seen = torch.arange(4) < torch.tensor([4, 2])[:, None]
    mask = seen[:, None, None, :]
    given = torch.zeros(2, 1, 1, 4).masked_fill(~mask, float("-inf")) if additive else mask
    trace = traced(AttentionCore(), (q, q, q), {"causal": False, "mask": given})
    assert trace.heads == 6 and trace.rows.tolist() == [[4] * 4] * 3 + [[2] * 4] * 3 and trace.bits == 32
    assert trace.full()[3, 0].tolist() == [True, True, False, False]


@cache
def planned() -> Plan:
    """A plan with cores of a technique."""
    return plan(recipe(example("sgd"), example("elsa")), KNOWN["V100"])


def test_a_plan_has_the_attention_of_a_step() -> None:
    made = planned()
    found = attention(made, accelerator("elsa_base"), 1.0)
    # Four layers of two heads in each of four sequences: a head a copy, 16 queries of 4 cycles.
    assert [(each.shape, each.count) for each in found.layers] == [((8, 16, 16, 16), 4)]
    assert found.seconds == pytest.approx(4 * 64e-9)
    assert found.as_json()["accelerator"]["seconds"] == found.seconds and "on elsa_base, 100%" in found.text()
    assert attention(made, accelerator("dota"), 0.2).layers[0].report.work["array"] == 2 * 8 * 16 * 3 * 16
    for kept, machine, said in ((0.0, "elsa", "--kept"), (1.0, "outerspace", "does no attention")):
        with pytest.raises(UserError, match=said):
            attention(made, accelerator(machine), kept)


@pytest.mark.parametrize(
    ("technique", "kept", "said"),
    [
        ("dota", 0.25, "The share is `techniques.dota.keep`."),
        (
            "elsa",
            1.0,
            "How many keys elsa will keep shows in training: this plan keeps all. Give --kept 0.25, or train",
        ),
        ("accumulate", 1.0, "Nothing in the recipe leaves out keys, so that all are kept."),
    ],
)
def test_a_plan_keeps_what_the_recipe_says_or_says_that_it_keeps_all(technique: str, kept: float, said: str) -> None:
    made = replace(planned(), recipe=recipe(example("sgd"), example(technique)))
    found = attention(made, accelerator("elsa"))
    assert found.kept == kept
    assert said in found.text() and f"{kept:.0%} of the keys kept" in found.text()
    assert said in found.as_json()["accelerator"]["kept_from"]
    assert found.layers[0].report.work["array"] == 2 * 8 * 16 * 16 * kept * 16
    asked = attention(made, accelerator("elsa"), 0.5)
    assert asked.kept == 0.5 and "The share was asked for." in asked.text()


@pytest.mark.parametrize("name", ["a3", "elsa", "sanger", "dota", "vitcod"])
def test_a_run_without_cores_is_dense_on_every_machine_and_says_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scrimp.inference.open_run", lambda place: plain_run())
    done = CliRunner().invoke(app, ["simulate", "anywhere", "--machine", name, "--sequences", "2"])
    assert done.exit_code == 0, done.output
    assert "8 attention layers of 2 held-out sequences, 53.1% of the scores kept" in done.output
    assert f"Note: The attention is dense: nothing chose keys for {name} to skip." in done.output


@cache
def plain_run() -> Any:
    """A run that no core was given to."""
    return run_of(recipe(example("sgd")))


def test_torch_is_imported_only_to_collect() -> None:
    code = (
        "import sys, scrimp, scrimp.cli; assert not any('accelerators' in m for m in sys.modules)\n"
        "from scrimp.machines.accelerators import validation, traces, report, views\n"
        "validation.references(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
