"""Descriptions of accelerators: ours are complete and sourced, faulty ones are refused by what is wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scrimp.errors import UserError
from scrimp.machines.accelerators.architecture import TAGS, accelerator, described, known
from scrimp.machines.accelerators.report import simulate
from scrimp.machines.accelerators.traces import AttentionTrace


@pytest.mark.parametrize("name", known())
def test_every_number_has_a_source(name: str) -> None:
    machine = accelerator(name)
    assert all(re.match(rf"[{''.join(TAGS)}]: \S", source) for source in machine.sources.values())
    tags = machine.tags()
    assert {"clock", "array.rows", "memory.bandwidth"} <= set(tags)
    assert not [path for path, tag in tags.items() if not tag]


def test_the_nearest_source_counts() -> None:
    tags = accelerator("outerspace").tags()
    assert (tags["memory.bandwidth"], tags["memory.latency"], tags["settings.merging"]) == ("V", "R", "S")
    assert described(GOOD, "mine", "mine.yaml").tags()["clock"] == ""


GOOD = """
dataflow: elsa
about: mine
clock: 1e9
array: {rows: 4, columns: 128, bits: 9}
memory: {bandwidth: 1e11}
settings: {copies: 1, banks: 4, hashing: 0}
"""


def test_a_description_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD)
    machine = accelerator(str(path))
    assert (machine.name, machine.clock) == ("mine", 1e9)
    assert simulate([AttentionTrace.dense(1, 64, 64, 64)], machine).cycles == 64 * 16
    path = tmp_path / "wide.yaml"
    path.write_text("like: elsa\nsettings: {copies: 1}\n")
    wide = accelerator(str(path))
    assert wide.setting("copies") == 1 and wide.setting("banks") == 4 and wide.name == "wide"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("clock: 1e9", "clock: -1"), "`clock`: input should be greater than 0, not -1"),
        (
            ("clock: 1e9", "clok: 1e9"),
            "`clock`: field required; `clok` is no key of a description (did you mean clock?). Co",
        ),
        (("clock: 1e9", ""), "`clock`: field required"),
        (("rows: 4", "rows: 0.5"), "`array.rows`"),
        (
            ("rows: 4", "row: 4"),
            "`array.rows`: field required; `array.row` is no key of a description (did you mean rows?).",
        ),
        (("dataflow: elsa", "dataflow: elza"), "there is no dataflow `elza`. Did you mean elsa"),
        (("about: mine", "like: vitcot"), "Did you mean vitcod"),
        (("about: mine", "about: [mine"), "is no YAML in line"),
        (("about: mine", "about: mine\nabout: two"), "given twice"),
    ],
)
def test_a_faulty_description_is_refused_by_name(change: tuple[str, str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        described(GOOD.replace(*change), "mine", "mine.yaml")
    assert str(caught.value).startswith("mine.yaml: ") and said in str(caught.value)


def test_all_faults_at_once() -> None:
    with pytest.raises(UserError, match=r"(?s)`clock`.*`array.rows`"):
        described(GOOD.replace("1e9", "0").replace("rows: 4", "rows: x"), "mine", "mine.yaml")
    with pytest.raises(UserError, match="is no mapping"):
        described("3", "mine", "mine.yaml")


def test_what_a_dataflow_lacks_is_named() -> None:
    machine = described(GOOD.replace("hashing: 0", "hashing: 1"), "mine", "mine.yaml")
    with pytest.raises(UserError, match=r"needs `settings.selectors`"):
        simulate([AttentionTrace.dense(1, 64, 64, 64)], machine)


def test_unknown_names_and_files() -> None:
    with pytest.raises(UserError, match="Did you mean sanger"):
        accelerator("sangr")
    with pytest.raises(UserError, match=r"no accelerator `els`. Did you mean elsa or elsa_base\? Or "):
        accelerator("els")
    with pytest.raises(UserError, match="cannot be read"):
        accelerator("/nowhere/mine.yaml")
