"""Runs that memory does not suffice for."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from scrimp import room
from scrimp.errors import UserError
from scrimp.machines.machine import free_here
from scrimp.machines.memory import RESIDENT
from scrimp.room import check_room, estimate, out_of_memory
from scrimp.technique import Card, Technique
from scrimp.training import train
from tiny import TinyData, example, recipe

BIG = {"layers": 2, "width": 256, "heads": 4}
DATA = TinyData(context=128)


def test_a_run_that_will_not_fit_is_refused_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(example("adamw"), model=BIG, data=TinyData(context=512), batch=4, out=str(tmp_path / "runs"))
    monkeypatch.setattr("scrimp.fitting.PLANS", 8)  # the search itself is tried in tests/plan
    monkeypatch.setattr(room, "available", lambda: 20_000_000)
    monkeypatch.setattr("scrimp.machines.machine.available", lambda: 20_000_000)
    monkeypatch.setattr("scrimp.machines.machine.resident", lambda: 10**10)
    monkeypatch.setattr("scrimp.machines.machine.remembered", lambda device: None)
    with pytest.raises(UserError, match=r"the run will need .* MB, and 376.5 MB are(?s:.)*--force(?s:.)*What fits"):
        train(made, data=DATA.open())
    assert not (tmp_path / "runs").exists()
    assert train(made, data=DATA.open(), save=False, force=True).reason == "finished"


def test_what_the_process_holds_beside_is_not_lent_to_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scrimp.machines.machine.available", lambda: 50_000_000)
    monkeypatch.setattr("scrimp.machines.machine.remembered", lambda device: None)
    for held in (10**8, 10**10):
        monkeypatch.setattr("scrimp.machines.machine.resident", lambda held=held: held)
        assert free_here("cpu").memory == 50_000_000 + min(held, RESIDENT)


def test_a_run_that_clearly_fits_is_not_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(example("adamw"))
    monkeypatch.setattr("scrimp.planning.plan", None)
    check_room(made, made.data.open())
    assert estimate(made, made.data.open()) < 100_000_000


@dataclass(frozen=True, kw_only=True)
class Hungry(Technique):
    """Asks for more than there is at the third step."""

    card: ClassVar[Card] = Card(paper="none", section="Data", saves="nothing", costs="memory")

    def step(self, step: Any, run: Any) -> Any:
        """An error as torch raises it."""

        def eats() -> bool:
            if run.clock.step == 2:
                raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")
            return step()

        return eats


def test_running_out_of_memory_is_explained(tmp_path: Path) -> None:
    made = recipe(Hungry(), out=str(tmp_path))
    with pytest.raises(UserError, match=r"memory ran out; .* were available.*The plan says that .* suffice"):
        train(made)


def test_other_errors_are_not() -> None:
    assert not out_of_memory(RuntimeError("shapes do not fit"))
    assert not out_of_memory(ValueError("out of memory"))
    assert out_of_memory(MemoryError())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ulimit -v")
@pytest.mark.parametrize("force", [False, True])
def test_under_a_real_ulimit(force: bool, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("words and more words of text\n\n" * 20_000)
    recipe_file = tmp_path / "r.yaml"
    recipe_file.write_text(yaml.safe_dump({
        "model": {"layers": 3, "width": 768, "heads": 8}, "batch": 96, "duration": "4 step",
        "techniques": {"adamw": {}, "fused_loss": {}}, "out": str(tmp_path / "runs"), "log": {"tensorboard": False},
        "data": {"source": str(tmp_path / "text.txt"), "tokenizer": "bytes", "context": 256, "cache": str(tmp_path)},
    }))  # fmt: skip
    command = f"ulimit -v 3000000; exec {sys.executable} -m scrimp train {recipe_file} {'--force' if force else ''}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=280)
    assert done.returncode == 2, done.stderr[-2000:]
    assert ("memory ran out" if force else "the run will need") in done.stderr
    assert "recompute" in done.stderr and "Traceback" not in done.stderr
