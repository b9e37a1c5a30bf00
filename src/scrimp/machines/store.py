# pyright: strict
"""Where the rates of this machine are kept: by processor, cores, threads, torch and what changes its kernels."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from pathlib import Path
from typing import Any

from scrimp.data.cache import cache_folder
from scrimp.machines.rates import Rates


def identity(device: str) -> dict[str, Any]:
    """What figures of a device belong to; another one of these is another machine.

    Args:
        device: cpu or cuda.
    """
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return {"device": device, "processor": name, "cores": cores, "threads": torch.get_num_threads(),
            "torch": torch.__version__, "products": os.environ.get("SCRIMP_PRODUCTS", ""),
            "allocator": os.environ.get("SCRIMP_ALLOCATOR", "")}  # fmt: skip


def remembered(device: str) -> Rates | None:
    """What an earlier probe of this device found."""
    return Rates.read(_place(identity(device)))


def remember(rates: Rates) -> None:
    """Keep the rates of a device."""
    _place(rates.machine).write_text(rates.text(), encoding="utf-8")


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _place(machine: dict[str, Any]) -> Path:
    key = hashlib.blake2b(json.dumps(machine, sort_keys=True).encode(), digest_size=8).hexdigest()
    return cache_folder("", "probe") / f"{key}.json"
