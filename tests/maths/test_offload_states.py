"""States on disk against states in memory, to the last bit, and a file that is not what was written."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from scrimp import tiles
from scrimp.disk import PAGE, Extent, Scratch, aligned, extent_of, home
from scrimp.errors import UserError
from scrimp.run import Run
from scrimp.techniques.offloading.offload_states import offload
from scrimp.techniques.optimizers.lion import LionRule
from scrimp.tiles import States
from tiny import assert_equal, example, flat, recipe, run_of, step

WIDE = {"layers": 1, "width": 66, "heads": 2}
"""Matrices of several tiles, whose rows end inside of one."""


def built(rule: str, *more: str, **settings: Any) -> Run:
    return run_of(recipe(example(rule, **settings), *(example(name) for name in more), model=WIDE))


@pytest.mark.parametrize(
    ("rule", "settings"),
    [("sgd", {"momentum": 0.9}), ("adam", {}), ("adamw", {}), ("lion", {}), ("lamb", {}), ("lars", {}), ("muon", {})],
)
def test_twenty_steps_are_bitwise_those_in_memory(rule: str, settings: dict[str, Any]) -> None:
    memory, disk = built(rule, **settings), built(rule, "offload_states", **settings)
    for _ in range(20):
        step(memory)
        step(disk)
    assert_equal(flat(memory.state()), flat(disk.state()))


def test_buffers_are_much_smaller_than_states(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(tiles, "aligned", lambda size: made.append(size) or aligned(size))
    rule, p = LionRule([weights(20 * PAGE)], lr=0.1), None
    offload(rule, Scratch(Path("/tmp"), "test"), PAGE)
    for p in rule.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    rule.step()
    assert made == [PAGE * 4] * 3
    assert p is not None
    assert rule.state[p]["exp_avg"].nbytes == 20 * PAGE * 4


def weights(count: int) -> nn.Parameter:
    return nn.Parameter(torch.linspace(-1, 1, count))


def offloaded(tile: int = PAGE) -> tuple[torch.optim.Optimizer, nn.Parameter, Scratch]:
    p, file = weights(3 * PAGE), Scratch(Path("/tmp"), "techniques.offload_states.folder")
    rule = torch.optim.AdamW([p], lr=0.1, fused=True)
    offload(rule, file, tile)
    p.grad = torch.ones_like(p)
    rule.step()
    return rule, p, file


def test_states_lie_on_disk_and_can_be_written_in_place() -> None:
    rule, p, _ = offloaded()
    assert extent_of(rule.state[p]["exp_avg"]) is not None
    assert float(rule.state[p]["step"]) == 1
    torch.testing.assert_close(rule.state[p]["exp_avg"], torch.full_like(p, 0.1))
    # Momentum and gradient cancel out: 0.9 (-1/9) + 0.1 = 0.
    rule.state[p]["exp_avg"].fill_(-1 / 9)
    rule.step()
    torch.testing.assert_close(rule.state[p]["exp_avg"], torch.zeros_like(p), atol=1e-7, rtol=0)


def test_a_weight_without_gradient_keeps_its_state() -> None:
    rule, p, _ = offloaded()
    p.grad = None
    before = p.detach().clone()
    rule.step()
    assert torch.equal(before, p)
    assert float(rule.state[p]["step"]) == 1


def test_a_truncated_file_is_refused() -> None:
    rule, _, file = offloaded()
    os.ftruncate(file.fd, PAGE)
    with pytest.raises(UserError, match=r"truncated.*\n?.*folder"):
        rule.step()


def test_an_altered_file_is_refused() -> None:
    rule, _, file = offloaded()
    os.pwrite(file.fd, b"\x01", 2 * PAGE + 5)
    with pytest.raises(UserError, match="checksum"):
        rule.step()


def test_a_full_disk_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="the disk has no room"):
        Scratch(Path("/tmp"), "test").extent(torch.Size([4]), torch.float32)


def test_the_file_has_no_name(tmp_path: Path) -> None:
    file = Scratch(home("", tmp_path / "not/there/yet"), "test")
    file.extent(torch.Size([4]), torch.float32)
    assert file.folder == tmp_path
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("direct", [True, False])
def test_mapped_and_direct_access_see_the_same(tmp_path: Path, direct: bool) -> None:
    file = Scratch(tmp_path, "test")
    file.direct = file.direct if direct else file.fd
    extent = file.extent(torch.Size([3000]), torch.float32)
    assert isinstance(extent, Extent)
    tensor, buffer = extent.mapped(), aligned(3000 * 4)
    assert not tensor.any(), "a new extent holds zeros"
    tensor.copy_(torch.arange(3000))
    extent.read(buffer, 0)
    assert torch.equal(buffer[:12000].view(torch.float32), tensor)
    buffer[:12000].view(torch.float32).mul_(2)
    extent.write(buffer, 0)
    assert torch.equal(tensor, 2.0 * torch.arange(3000))


def test_tensors_hold_no_descriptors_and_their_pages_go_with_them(tmp_path: Path) -> None:
    def held() -> tuple[int, int]:
        gc.collect()
        return len(os.listdir("/proc/self/fd")), Path("/proc/self/maps").read_text().count(str(tmp_path))

    file = Scratch(tmp_path, "test")
    before = held()
    mapped = [file.extent(torch.Size([4]), torch.float32).mapped() for _ in range(5)]
    # Neighbors are one line of the table.
    assert held()[0] == before[0]
    assert held()[1] > before[1]
    mapped.clear()
    assert held() == before


def test_a_file_system_may_refuse_direct_access_late(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file, write = Scratch(tmp_path, "test"), os.pwritev

    def refusing(fd: int, views: list[memoryview], place: int) -> int:
        if fd != file.fd:
            raise OSError(22, "Invalid argument")
        return write(fd, views, place)

    monkeypatch.setattr(os, "pwritev", refusing)
    extent, buffer = file.extent(torch.Size([4]), torch.float32), aligned(16).fill_(7)
    extent.write(buffer, 0)
    extent.read(buffer.zero_(), 0)
    assert (buffer == 7).all()


@pytest.mark.parametrize("name", ["offload_states", "layer_to_layer", "offload_activations"])
def test_a_folder_in_memory_or_none_is_told(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = type(example(name)).__module__
    monkeypatch.setattr(f"{module}.in_memory", lambda folder: folder == tmp_path)
    run = run_of(recipe(example(name, folder=str(tmp_path))))
    assert any(f"{name} saves nothing" in remark for remark in run.remarks)
    with pytest.raises(UserError, match="there is no folder .*missing"):
        step(run_of(recipe(example(name, folder=str(tmp_path / "missing")))))


def test_a_rule_that_clips_all_gradients_together_is_refused() -> None:
    with pytest.raises(UserError, match="clips all gradients together"):
        run_of(recipe(example("lamb", clip=1.0), example("offload_states")))


def test_no_state_is_made_by_looking() -> None:
    states = States(None)
    assert not states[weights(4)]
    assert dict(states[weights(4)]) == {}
