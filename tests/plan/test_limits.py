"""Free memory, from files as the system writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from scrimp.limits import address_limits, available, cgroup_limits, memory_free, resident

MIB = 1 << 20


def system(root: Path, cgroup: str, files: dict[str, str], free: int = 1000) -> Path:
    """A root with /proc and /sys."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:  {free * 1024} kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_cgroup_2(tmp_path: Path) -> None:
    root = system(tmp_path, "0::/user/job\n", {
        "user/job/memory.max": f"{300 * MIB}\n", "user/job/memory.current": str(200 * MIB),
        "user/job/memory.stat": f"anon 5\nfile {90 * MIB}\ninactive_file {50 * MIB}\nactive_file {30 * MIB}\n\n",
        "user/memory.max": "max", "user/memory.current": "1", "user/memory.stat": "",
    })  # fmt: skip
    assert cgroup_limits(root) == [180 * MIB]
    assert available(root) == 180 * MIB


def test_cgroup_1_with_a_limit_above(tmp_path: Path) -> None:
    root = system(tmp_path, "4:memory:/job\n2:cpu:/job\n", {
        "memory/job/memory.limit_in_bytes": str(1 << 62), "memory/job/memory.usage_in_bytes": "1",
        "memory/job/memory.stat": "cache 9", "memory/memory.limit_in_bytes": str(64 * MIB),
        "memory/memory.usage_in_bytes": str(60 * MIB), "memory/memory.stat": f"total_inactive_file {10 * MIB}\n",
    })  # fmt: skip
    assert cgroup_limits(root) == [14 * MIB]


def test_a_full_cgroup_leaves_nothing(tmp_path: Path) -> None:
    root = system(tmp_path, "0::/\n", {
        "memory.max": str(10 * MIB), "memory.current": str(12 * MIB), "memory.stat": "anon 1\n",
    })  # fmt: skip
    assert available(root) == 0


def test_memory_high_counts(tmp_path: Path) -> None:
    root = system(tmp_path, "0::/a\n", {
        "a/memory.max": "max", "a/memory.high": str(7 * MIB), "a/memory.current": str(MIB), "a/memory.stat": "",
    })  # fmt: skip
    assert cgroup_limits(root) == [6 * MIB]


def test_without_cgroups_the_system_counts(tmp_path: Path) -> None:
    root = system(tmp_path, "", {})
    assert memory_free(root) == [1000 * MIB]
    assert available(root) == min([1000 * MIB, *address_limits(root)])
    assert resident(root) == 0
    assert resident() > 10 * MIB


def test_ulimit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import resource

    root = system(tmp_path, "", {})
    (root / "proc/self/statm").write_text("100 50 0 0 0 40 0")
    limits = {resource.RLIMIT_AS: 1000 * 4096, resource.RLIMIT_DATA: 30 * 4096}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits[kind], limits[kind]))
    monkeypatch.setattr("os.sysconf", lambda name: 4096)
    assert address_limits(root) == [900 * 4096, 0]
