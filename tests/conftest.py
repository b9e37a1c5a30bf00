"""One thread a worker, a cache of its own, and no network."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings

settings.register_profile("scrimp", deadline=None, derandomize=True)
settings.load_profile("scrimp")
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first: at the end one of them would run while other workers have nothing left."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    """Let no later collection of garbage walk through all that was imported; trained runs make many of them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    base = tmp_path_factory.getbasetemp()
    # xdist's workers have a folder each in that of the session; what is built once serves all of them.
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    os.environ["SCRIMP_CACHE"] = str(shared / "scrimp-cache")
