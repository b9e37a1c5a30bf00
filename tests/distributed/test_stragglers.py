"""A rank that is slower than the others is found, named in the log, and reported once it stays slow."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from distributed.ranks import together
from scrimp.report import report
from scrimp.stragglers import EVERY, RATIO, SHARE, TIMES, Lookout, Slowest, compared, stragglers

SLOW = Slowest(2, 2 * RATIO, 2 * SHARE, "node7")


def test_a_rank_that_sleeps_in_its_step_is_reported() -> None:
    found = together(2, "slow", "reported")
    assert found["pipeline"] == {"lines": [], "notes": []}
    for name in ("replicate", "zero, stage 3"):
        lines, notes = found[name]["lines"], found[name]["notes"]
        assert [line["step"] for line in lines] == [EVERY, 2 * EVERY, 3 * EVERY], name
        assert {(line["slowest_rank"], line["slowest_host"]) for line in lines} == {(1, socket.gethostname())}, name
        assert all(line["slowest_over_median"] > RATIO for line in lines), name
        assert len(notes) == 1 and notes[0].startswith("Warning: rank 1 on "), name


def test_a_rank_is_compared_with_the_median_of_the_others() -> None:
    assert compared([1.0, 3.0], 4.0) == Slowest(1, 3.0, 0.5)
    found = compared([2.0, 1.0, 5.0, 4.0], 10.0, ["a", "b", "c", "d"])
    assert found == Slowest(2, 2.5, 0.3, "c")
    assert not compared([0.0, 0.0], 0.0).slow


def test_only_what_stays_slow_and_costs_something_is_a_straggler() -> None:
    other, even = Slowest(0, 2 * RATIO, 2 * SHARE), Slowest(2, 1.0, 0.0)
    assert stragglers([SLOW] * (TIMES - 1)) == {}
    assert stragglers([even, *[SLOW] * TIMES]) == {2: SLOW}
    assert stragglers([SLOW, other] * TIMES) == {}, "not the same rank"
    assert stragglers([*[SLOW] * (TIMES - 1), even, *[SLOW] * (TIMES - 1)]) == {}, "not in a row"
    assert stragglers([Slowest(2, 2 * RATIO, SHARE / 2)] * TIMES) == {}, "costs nothing"
    assert stragglers([Slowest(2, (1 + RATIO) / 2, 2 * SHARE)] * TIMES) == {}, "not much slower"


def test_each_straggler_is_news_once() -> None:
    lookout = Lookout(recent=[SLOW] * TIMES)
    assert lookout.news() == [SLOW]
    assert lookout.news() == []


@pytest.mark.parametrize("times", [TIMES - 1, TIMES])
def test_the_report_of_a_run_names_it(tmp_path: Path, times: int) -> None:
    (tmp_path / "recipe.yaml").write_text("batch: 2\n")
    line = {"loss": 1.0, "tokens": 32, "seconds": 0.1, "peak_bytes": 1e6, **SLOW.fields()}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": i, **line}) + "\n" for i in range(times)))
    page = report([tmp_path], tmp_path / "page.html").read_text()
    assert ("rank 2 on node7 is slower" in page) == (times == TIMES)
