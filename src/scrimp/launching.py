# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Several ranks on one machine: torch's elastic agent, started with the command line of a single process.

The first rank shows what it prints; what others print is in their logs. When a rank fails, the agent ends the others.
Here is decided which of them failed first, whether to start all again, from the last checkpoint, and what to say. On
several machines `torchrun` runs an agent on each: see the guide on many devices.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from scrimp.errors import LostError, UserError

PREFIX: Final = "scrimp-launch-"
"""How the name of each launch begins; no two have one name, while a user of torchrun may give two the same."""
LINES: Final = 12
"""How much of a failed rank's log is shown."""
SAVING: Final = 3600
"""Seconds that ranks have to finish a step and save, after a signal; a second signal ends them at once."""
INTERRUPTED: Final = 130
PDEATHSIG: Final = 1
"""Of Linux's prctl: which signal a process gets when the one that started it has ended."""


def launch(ranks: int, arguments: Sequence[str], restarts: int = 0, logs: Path | None = None) -> bool:
    """Start `scrimp train ARGUMENTS` on so many ranks of this machine, and wait for them.

    Args:
        restarts: how often all ranks are started again when one fails.
        logs: folder for what ranks other than the first print; a temporary one by default.
    Returns:
        Whether they have ended by themselves; not if a signal, which all got, has ended the run in order.
    Raises:
        UserError: naming the rank that failed first, how it ended, and its log.
    """
    from torch.distributed.elastic.multiprocessing import SignalException

    _prepare(ranks)
    folder, name = logs or Path(tempfile.mkdtemp(prefix="scrimp-ranks-")), PREFIX + uuid.uuid4().hex[:12]
    ended = False
    try:
        for attempt in range(restarts + 1):
            try:
                ended = _attempt(ranks, arguments, name, folder / f"attempt-{attempt}")
                break
            except LostError as error:
                if attempt == restarts:
                    raise
                sys.stderr.write(f"scrimp launch: {error}\nAll ranks start again ({attempt + 1} of {restarts}).\n")
    except SignalException:
        pass
    if logs is None:
        shutil.rmtree(folder, ignore_errors=True)
    return ended


def _prepare(ranks: int) -> None:
    """No more threads than there are cores, and none of torch's notes on what is said here in other words."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logger = logging.getLogger("torch.distributed.elastic")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False


def _attempt(ranks: int, arguments: Sequence[str], name: str, folder: Path) -> bool:
    """Train once; see `launch`. The agent restarts nothing, as it would restart what a user must mend, too.

    Raises:
        UserError: for what a user must mend; a `LostError` where starting again may help.
        SignalException: if a signal has ended the run; the agent has passed it on.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    try:
        folder.mkdir(parents=True, exist_ok=True)
        specs = DefaultLogsSpecs(str(folder), redirects=dict.fromkeys(range(1, ranks), Std.ALL))
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}.", str(folder), "Set --logs.") from None
    # A terminal that is closed ends this process; ranks then save, see `end_with_parent`.
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=ranks, run_id=name, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        local_addr="localhost", max_restarts=0, monitor_interval=0.1, shutdown_timeout=SAVING, logs_specs=specs,
        signals_to_handle="SIGINT,SIGTERM",
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)("-m", "scrimp", "train", *arguments)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        if (first := culprit(codes)) is None:
            return False
        log = next(folder.glob(f"*/attempt_0/{first}/stderr.log"), None)
        raise _fault(first, codes[first], ranks, log) from None
    return True


def culprit(codes: Mapping[int, int]) -> int | None:
    """The rank whose end is the likeliest cause of the others'; None if a signal has ended the run in order.

    Args:
        codes: rank -> how it ended, of those that failed; negative for a signal. The agent ends what still runs by
            SIGTERM. It looks ten times a second, and of ranks that ended in between does not know which was first.
    """

    def likely(rank: int) -> tuple[int, int]:
        code = codes[rank]
        known = {-signal.SIGTERM: 2, LostError.code: 3, INTERRUPTED: 4}
        return known.get(code, 0 if code < 0 else 1), rank

    if INTERRUPTED in codes.values() and set(codes.values()) <= {INTERRUPTED, -signal.SIGTERM}:
        return None
    return min(codes, key=likely)


def _fault(rank: int, code: int, ranks: int, log: Path | None) -> UserError:
    """What is said of a rank that failed: what, where, and where to look."""
    how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with {code}"
    where = "What it printed is above."
    if log is not None:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES:]
        where = f"Its log is {log}." + "".join(f"\n  {line}" for line in lines)
    kind = UserError if code == UserError.code else LostError
    return kind(f"rank {rank} of {ranks} {how}, and all others were ended.", "", where)


def name_of_launch() -> str:
    """What identifies the launch that this process belongs to, the same when its ranks are started again; or empty."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "")


def restarted(out: Path) -> Path | None:
    """The run that this launch has begun or resumed, and saved, before its ranks were started again.

    Args:
        out: where runs have their folders.
    """
    from scrimp import checkpoint

    own, count = name_of_launch(), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if not own or (count == "0" and not own.startswith(PREFIX)):
        return None
    mine: list[Path] = []
    for found in filter(None, map(checkpoint.snapshots, out.glob("*/checkpoints"))):
        with suppress(UserError):  # Somebody else's may be damaged.
            mine += [found[-1].parent.parent] * (checkpoint.meta(found[-1]).get("launch") == own)
    return max(mine, key=lambda run: run.stat().st_mtime, default=None)


def end_with_parent() -> None:
    """Let this rank stop, and save, when the launch that started it is killed. Linux only; elsewhere nothing."""
    if name_of_launch().startswith(PREFIX) and sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PDEATHSIG, signal.SIGTERM)
