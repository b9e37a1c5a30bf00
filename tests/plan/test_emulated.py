"""What a device emulates is said in the plan, in the run and in its report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scrimp.arrange import emulated
from scrimp.planning import plan
from scrimp.registry import technique_class
from scrimp.report import report
from scrimp.training import train
from tiny import example, recipe

SENTENCE = "fp8 is emulated on a CPU: the numbers are right, and its seconds say nothing of hardware that has it."


def test_a_plan_says_what_its_machine_emulates() -> None:
    made = recipe(example("fp8"))
    assert SENTENCE in plan(made, data=made.data.open()).notes
    assert not any("emulated" in note for note in plan(made, on="H100", data=made.data.open()).notes)


def test_a_run_and_its_report_say_so_once(tmp_path: Path) -> None:
    told: list[str] = []

    def see(event: str, fields: dict[str, Any]) -> None:
        if event == "note":
            told.append(fields["text"])

    made = recipe(example("fp8"), example("stack"), out=str(tmp_path), name="r", data="text", duration="4 step")
    train(made, data=recipe(example("fp8")).data.open(), observe=see, force=True)
    assert told.count(f"Note: {SENTENCE}") == 1
    page = report([tmp_path / "r"], tmp_path / "report.html").read_text()
    assert page.count(SENTENCE) == 1


def test_what_is_not_emulated_is_not_mentioned() -> None:
    assert emulated({"fp8": technique_class("fp8").card}, "cuda") == []
    assert emulated({"act": technique_class("act").card, "int8": technique_class("int8").card}, "cpu") == []
