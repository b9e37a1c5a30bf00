"""Energy from counters that look like the system's."""

from __future__ import annotations

from pathlib import Path

from scrimp.energy import Energy


def counter(root: Path, name: str, used: int) -> None:
    place = root / name
    place.mkdir(exist_ok=True)
    (place / "name").write_text("psys" if name.endswith(":9") else "package-0")
    (place / "energy_uj").write_text(f"{used}\n")
    (place / "max_energy_range_uj").write_text("9999999\n")


def test_packages_are_summed_and_their_parts_are_not(tmp_path: Path) -> None:
    for name, used in (("intel-rapl:0", 1_000_000), ("intel-rapl:1", 2_000_000), ("intel-rapl:0:0", 0)):
        counter(tmp_path, name, used)
    counter(tmp_path, "intel-rapl:9", 7_000_000)
    energy = Energy(tmp_path)
    assert len(energy.packages) == 2
    counter(tmp_path, "intel-rapl:0", 4_000_000)
    counter(tmp_path, "intel-rapl:0:0", 5_000_000)
    assert energy.joules() == 3.0
    assert energy.joules() == 0.0


def test_a_counter_that_begins_again(tmp_path: Path) -> None:
    counter(tmp_path, "intel-rapl:0", 9_500_000)
    energy = Energy(tmp_path)
    counter(tmp_path, "intel-rapl:0", 500_000)
    assert energy.joules() == 1.0


def test_no_counters(tmp_path: Path) -> None:
    assert Energy(tmp_path).joules() is None
    counter(tmp_path, "intel-rapl:0", 1)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("not allowed")
    assert Energy(tmp_path).joules() is None
