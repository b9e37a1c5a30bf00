"""One pinned environment a peer, outside the project. torch is installed once, in that of the plain loop."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

TORCH: Final = "torch==2.13.0"
NAMES: Final = ("loop", "hf", "lightning", "litgpt")
HERE: Final = Path(__file__).parent
VERSIONS: Final = """
import importlib.metadata as m, json, platform, sys
found = {d.metadata["Name"].lower() for d in m.distributions()}
print(json.dumps({"python": platform.python_version()} | {n: m.version(n) for n in sys.argv[1:] if n in found}))
"""
SHOWN: Final = ("torch", "numpy", "transformers", "accelerate", "lightning", "litgpt", "scrimp")


def python(root: Path, name: str) -> Path:
    """The interpreter of an environment."""
    return root / name / "bin" / "python"


def ensure(root: Path, name: str) -> None:
    """Create an environment, or create it again if its requirements have changed.

    The others see the loop's packages through a .pth file, after their own: so no second torch is installed.
    """
    if name != "loop":
        ensure(root, "loop")
    requirements = HERE / f"requirements-{name}.txt"
    stamp = root / name / "installed"
    wanted = hashlib.sha256(requirements.read_bytes() + TORCH.encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print(f"Installing {requirements.name} into {root / name}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", root / name], check=True)
    if name != "loop":
        (site_packages(root, name) / "loop.pth").write_text(f"{site_packages(root, 'loop')}\n")
    install = [python(root, name), "-m", "pip", "install", "--quiet", "--no-deps", TORCH, "-r", requirements]
    subprocess.run(install, check=True)
    probe = [python(root, name), "-c", "import torch; print(torch.__file__)"]
    place = subprocess.run(probe, check=True, capture_output=True, text=True).stdout
    if not place.startswith(str(site_packages(root, "loop"))):
        raise SystemExit(f"{name} imports a torch of its own: {place}")
    stamp.write_text(wanted)


def site_packages(root: Path, name: str) -> Path:
    """Where an environment's packages lie."""
    return root / name / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def versions(interpreter: Path) -> dict[str, Any]:
    """Versions of the interpreter and of the packages that matter."""
    run = subprocess.run([interpreter, "-c", VERSIONS, *SHOWN], check=True, capture_output=True, text=True)
    return json.loads(run.stdout)
