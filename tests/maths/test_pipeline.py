"""Where a model is cut, what each rank computes when, and how long it idles."""

from __future__ import annotations

import pytest

from scrimp.errors import UserError
from scrimp.registry import technique_class
from scrimp.stagewise import balanced, empty, parts_of, placed, work
from scrimp.timetable import actions, drawn, idle, in_flight, timed
from tiny import recipe, run_of


def test_the_heaviest_stage_is_as_light_as_it_can_be():
    assert balanced([1.0] * 8, 0, 0, 4) == [2, 2, 2, 2]
    # A head as heavy as two blocks takes their place; so does a heavy block.
    assert balanced([1.0] * 6, 0, 2, 2) == [4, 2]
    assert balanced([1.0, 1.0, 5.0, 1.0], 0, 0, 2) in ([2, 2], [1, 3])
    assert balanced([1.0, 1.0, 5.0, 1.0], 0, 0, 3) == [2, 1, 1]
    # At least one block a stage, even before a very heavy head.
    assert balanced([1.0] * 3, 0, 100, 3) == [1, 1, 1]


def test_the_head_is_work_and_the_tables_are_none():
    model = run_of(recipe()).model
    blocks, before, behind = work(model)
    block = sum(p.numel() for p in model.blocks[0].parameters() if p.ndim > 1)
    assert blocks == [block + 2 * 16 * 32] * 4
    assert (before, behind) == (0, 32 * 32)


def test_stages_lie_around_and_around_or_there_and_back():
    assert placed(4, 2, folded=False) == (0, 1, 0, 1)
    assert placed(4, 2, folded=True) == (0, 1, 1, 0)


def test_names_stay_and_shared_parameters_are_held_by_all_who_use_them():
    names = set(dict(run_of(recipe()).model.named_parameters()))
    held: list[set[str]] = []
    for rank in (0, 1):
        model = run_of(recipe()).model
        elsewhere = empty(model, [parts_of(model, [3, 1])[rank]])
        held.append(set(dict(model.named_parameters())))
        assert held[rank] | elsewhere == names and not held[rank] & elsewhere
    assert held[0] & held[1] == {"embed.weight"}
    assert {"positions.weight", "blocks.2.mlp.up.weight"} < held[0] - held[1]
    assert {"norm.weight", "blocks.3.mlp.up.weight"} < held[1] - held[0]


@pytest.mark.parametrize(("order", "each"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 3)])
@pytest.mark.parametrize(("ranks", "parts"), [(2, 4), (4, 8)])
def test_the_idle_share_is_the_formula(order: str, each: int, ranks: int, parts: int):
    rows = timed(actions(order, ranks, parts, each))
    assert idle(rows) == pytest.approx((ranks - 1) / (each * parts + ranks - 1))
    done = sorted((a.kind, a.stage, a.part) for row in rows for a in row)
    assert done == sorted((k, s, m) for k in "FB" for s in range(ranks * each) for m in range(parts))


def test_split_backward_passes_idle_less():
    assert idle(timed(actions("zbv", 4, 8, 2))) < idle(timed(actions("zero_bubble", 4, 8))) < 3 / 11


def test_activations_in_flight():
    parts, ranks = 8, 4
    assert [in_flight(row) for row in actions("gpipe", ranks, parts)] == [parts] * ranks
    assert [in_flight(row) for row in actions("1f1b", ranks, parts)] == [min(parts, ranks - i) for i in range(ranks)]


def test_a_table_shows_every_slot():
    assert drawn(timed(actions("gpipe", 2, 2))).splitlines() == [
        "F0 F1  .  .  . B0 B0 B1 B1",
        " . F0 F1 B0 B0 B1 B1  .  .",
    ]


@pytest.mark.parametrize(
    "settings",
    [{"split": (2, 0)}, {"order": "1f1b", "stages_per_rank": 2}, {"order": "zbv", "stages_per_rank": 3},
     {"micro_batches": -1}],
)  # fmt: skip
def test_settings_that_make_no_pipeline_are_refused(settings: dict[str, object]):
    with pytest.raises(UserError):
        technique_class("pipeline")(**settings)
