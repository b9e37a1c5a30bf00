"""How far results are from those of other libraries: `python benchmarks/parity.py` -> evidence/parity.json.

The tests of tests/parity compare a small model with random weights in every part, read from a folder that transformers
wrote, and written as a folder that transformers reads; and techniques with those of other libraries over many steps.
This runs them and keeps what they measured.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from scrimp.folder import environment

ROOT = Path(__file__).parents[1]
EVIDENCE = ROOT / "evidence" / "parity.json"


def main() -> None:
    """Run the tests and write the evidence; fails where they do."""
    with tempfile.TemporaryDirectory() as place:
        report = Path(place) / "report.xml"
        tests = sorted(str(path) for path in (ROOT / "tests" / "parity").glob("test_*.py"))
        options = [
            "-q",
            "-p",
            "no:xdist",
            "-o",
            "addopts=",
            "-o",
            "junit_family=xunit1",
            f"--junitxml={report}",
        ]
        subprocess.run([sys.executable, "-m", "pytest", *options, *tests], cwd=ROOT, check=True)
        cases = ElementTree.parse(report).iter("testcase")
        found = [{p.get("name"): p.get("value") for p in case.iter("property")} for case in cases]
    rows = {row["case"]: {key: float(row[key] or 0) for key in ("read", "written")} for row in found if "case" in row}
    techniques: dict[str, list[dict[str, Any]]] = {}
    for row in found:
        if "technique" in row:
            library = str(row["library"])
            seen = {"library": library, "version": version(library), "difference": float(row["difference"] or 0)}
            techniques.setdefault(str(row["technique"]), []).append(seen)
    about = {"transformers": version("transformers"), "environment": environment()}
    EVIDENCE.write_text(json.dumps({"rows": rows, "techniques": techniques, "about": about}, indent=1) + "\n")
    worst = max(max(row.values()) for row in rows.values())
    print(f"{len(rows)} cases, at most {worst:.1e}; {len(techniques)} techniques")


if __name__ == "__main__":
    main()
