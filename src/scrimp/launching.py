# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Several ranks on one machine: torch's elastic agent, started with the command line of a single process.

On several machines `torchrun` does the same, with an agent on each: see the guide on parallelism.
"""

from __future__ import annotations

import os
import sys
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from scrimp.errors import UserError
from scrimp.world import SAMPLES, sizes

if TYPE_CHECKING:
    from scrimp.recipe import Recipe

LAUNCH: Final = "launch"
"""File of a run's folder that says which launch began it."""
LINES: Final = 12
"""How much of a failed rank's log is shown."""


def launch(ranks: int, arguments: Sequence[str], restarts: int = 0, logs: Path | None = None) -> None:
    """Start `scrimp train ARGUMENTS` on so many ranks of this machine, and wait for them.

    When a rank fails all others are stopped. Then all are started again, and go on from the last checkpoint.

    Args:
        restarts: how often.
        logs: folder for what ranks other than the first print; a temporary one by default.
    Raises:
        UserError: naming the rank that failed first, how it ended, and its log.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    folder = logs or Path(tempfile.mkdtemp(prefix="scrimp-ranks-"))
    quiet = dict.fromkeys(range(1, ranks), Std.ALL)
    _silence()
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=ranks, run_id=uuid.uuid4().hex[:12], rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=restarts, monitor_interval=0.2, shutdown_timeout=10,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder), redirects=quiet, tee={0: Std.ERR}),
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)("-m", "scrimp", "train", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        how = f"was killed ({failure.signal_name()})" if failure.exitcode < 0 else f"ended with {failure.exitcode}"
        found = sorted(folder.glob(f"*/attempt_*/{rank}/stderr.log"), key=lambda p: p.stat().st_mtime)
        log = found[-1] if found else folder
        tail = "\n".join(f"  {line}" for line in log.read_text().splitlines()[-LINES:]) if found else ""
        what = f"rank {rank} of {ranks} {how}, and all others were stopped."
        raise UserError(what, "scrimp launch", f"Its log is {log}.\n{tail}".rstrip()) from None


def _silence() -> None:
    """Torch's notes on what users of this command cannot change."""
    import logging

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)


def restarted(out: str) -> Path | None:
    """The run that this launch began before it was started again, if it has saved a checkpoint.

    Args:
        out: where runs have their folders.
    """
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) == 0:
        return None
    own = os.environ["TORCHELASTIC_RUN_ID"]
    mine = [path.parent for path in Path(out).glob(f"*/{LAUNCH}") if path.read_text(encoding="utf-8").strip() == own]
    saved = [run for run in mine if any((run / "checkpoints").glob("step-*"))]
    return max(saved, key=lambda run: run.stat().st_mtime, default=None)


def spread(recipe: Recipe, ranks: int) -> Recipe:
    """A recipe for several ranks: where it does not say how they share samples, each holds the whole model.

    Raises:
        UserError: if the mesh has another number of ranks.
    """
    shape = sizes(recipe.mesh, ranks)
    served = {axis for t in recipe.techniques for axis in t.card.axes}
    if all(shape[axis] == 1 or axis in served for axis in SAMPLES):
        return recipe
    from scrimp.registry import technique_class

    return replace(recipe, techniques=(*recipe.techniques, technique_class("replicate")()))
