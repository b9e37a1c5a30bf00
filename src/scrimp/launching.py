# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Several ranks on one machine: processes with the command line of a single one, watched until all have ended.

The first rank shows what it prints; what others print is in their logs. When a rank fails, the others are ended, and
where restarts are left all start again, from the last checkpoint. On several machines `torchrun` does the same: see the
guide on many devices.
"""

from __future__ import annotations

import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from scrimp.errors import LostError, UserError

LAUNCH: Final = "SCRIMP_LAUNCH"
"""Environment variable: which launch a rank belongs to; the same when it is started again."""
LINES: Final = 12
"""How much of a failed rank's log is shown."""
GRACE: Final = 3.0
"""Seconds that the others have to end by themselves after a rank has failed."""
INTERRUPTED: Final = 130
PDEATHSIG: Final = 1
"""Of Linux's prctl: which signal a process gets when the one that started it has ended."""
STOPS: Final = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):  # noqa: N818
    """All ranks have left, as a signal asked them to."""


def launch(ranks: int, arguments: Sequence[str], restarts: int = 0, logs: Path | None = None) -> None:
    """Start `scrimp train ARGUMENTS` on so many ranks of this machine, and wait for them.

    Args:
        restarts: how often all ranks are started again when one fails.
        logs: folder for what ranks other than the first print; a temporary one by default.
    Raises:
        UserError: naming the rank that failed first, how it ended, and its log.
        Interrupted: if a signal has ended the run in order.
    """
    folder, name = logs or Path(tempfile.mkdtemp(prefix="scrimp-ranks-")), uuid.uuid4().hex[:12]
    for attempt in range(restarts + 1):
        error = _attempt(Crew(ranks, folder / f"attempt-{attempt}", name), arguments)
        if error is None:
            break
        if error.code != LostError.code or attempt == restarts:
            raise error
        sys.stderr.write(f"scrimp launch: {error}\nAll ranks start again ({attempt + 1} of {restarts}).\n")
    if logs is None:
        shutil.rmtree(folder, ignore_errors=True)


def _attempt(crew: Crew, arguments: Sequence[str]) -> UserError | None:
    """Train once.

    Returns:
        The error of the rank that failed first; a `LostError` where starting again may help.
    Raises:
        Interrupted: if a signal has ended the run.
    """
    with crew.forwarding():
        crew.start(arguments)
        failed = crew.wait()
    if failed is None and INTERRUPTED not in crew.codes.values():
        return None
    # A signal may have come before a rank listened.
    if failed is None or (crew.stopping and -crew.codes[failed] in STOPS):
        raise Interrupted
    kind = UserError if crew.codes[failed] == UserError.code or crew.stopping else LostError
    return kind(*crew.fault(failed))


@dataclass
class Crew:
    """The processes of one attempt.

    Attributes:
        folder: for their logs. launch: what identifies it.
        codes: rank -> how it ended, in the order in which they did; negative for a signal.
        stopping: whether a signal asked all to stop.
    """

    ranks: int
    folder: Path
    launch: str
    running: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict[int, "subprocess.Popen[bytes]"])
    codes: dict[int, int] = field(default_factory=dict[int, int])
    ended: queue.Queue[tuple[int, int]] = field(default_factory=queue.Queue[tuple[int, int]])
    stopping: bool = False

    def log(self, rank: int) -> Path:
        """What a rank prints; of the first only what it prints as errors."""
        return self.folder / f"rank-{rank}.log"

    def start(self, arguments: Sequence[str]) -> None:
        """Start all ranks.

        Raises:
            UserError: if their logs cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            logs = [self.log(rank).open("wb") for rank in range(self.ranks)]
        except OSError as error:
            raise UserError(f"cannot be written: {error.strerror}.", str(self.folder), "Set --logs.") from None
        shared = self._environment()
        for rank, log in enumerate(logs):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            # In a session of its own a rank hears a terminal's Ctrl-C once only: from here.
            process = subprocess.Popen(
                [sys.executable, "-m", "scrimp", "train", *arguments], env=os.environ | shared | own,
                stdout=log if rank else None, stderr=log if rank else subprocess.PIPE, start_new_session=True,
            )  # fmt: skip
            self.running[rank] = process
            threading.Thread(target=self._watch, args=(rank, process, log), daemon=True).start()

    def _environment(self) -> dict[str, str]:
        """What ranks need to find each other, and no more threads than there are cores."""
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = s.getsockname()[1]
        count, cores = str(self.ranks), os.cpu_count() or 1
        given = {"OMP_NUM_THREADS": str(max(1, cores // self.ranks)), "TORCH_CPP_LOG_LEVEL": "ERROR"}
        kept = {name: value for name, value in given.items() if name not in os.environ}
        return kept | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": count,
                       "LOCAL_WORLD_SIZE": count, LAUNCH: self.launch}  # fmt: skip

    def _watch(self, rank: int, process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
        """Show a rank's errors if they are not in its log already, and tell when it ends."""
        with log:
            for line in process.stderr or ():
                log.write(line)
                log.flush()
                with suppress(OSError, ValueError):
                    sys.stderr.write(line.decode(errors="replace"))
                    sys.stderr.flush()
        self.ended.put((rank, process.wait()))

    @contextmanager
    def forwarding(self) -> Generator[None]:
        """Ctrl-C and SIGTERM go to all ranks, which finish the step, save and leave; again, and they leave at once.

        Only the main thread can listen.
        """

        def forward(number: int, frame: Any) -> None:
            self.stopping = True
            for process in list(self.running.values()):
                process.send_signal(number)

        handlers: dict[int, Any] = {}
        with suppress(ValueError):
            handlers = {number: signal.signal(number, forward) for number in STOPS}
        try:
            yield
        finally:
            self._kill()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def wait(self) -> int | None:
        """Until all have ended: the rank that failed first, or None."""
        while self.running and not any(map(_failed, self.codes.values())):
            self._take(None)
        end = time.monotonic() + GRACE
        while self.running and time.monotonic() < end:
            self._take(end - time.monotonic())
        # Ranks that a failed one leaves behind fail as well, perhaps before its process has ended.
        causes = [rank for rank, code in self.codes.items() if _failed(code)]
        self._kill()
        return min(causes, key=self._likely, default=None)

    def _likely(self, rank: int) -> tuple[int, int]:
        """Lowest where a rank's end is the likeliest cause of the others': of those alike, the first to end counts."""
        code = self.codes[rank]
        # What a user must mend most ranks say at once, and the first has shown it.
        return 0 if code < 0 else 2 if code == LostError.code else 1, rank if code == UserError.code else 0

    def _take(self, seconds: float | None) -> None:
        with suppress(queue.Empty):
            rank, code = self.ended.get(timeout=seconds)
            self.codes[rank] = code
            del self.running[rank]

    def _kill(self) -> None:
        """End what still runs, and what it has started."""
        for process in self.running.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        while self.running:
            self._take(None)

    def fault(self, rank: int) -> tuple[str, str, str]:
        """What is said of a rank that failed: what, where, and where to look."""
        code, log = self.codes[rank], self.log(rank)
        how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with {code}"
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES:] if rank else []
        tail = "".join(f"\n  {line}" for line in lines)
        what = f"rank {rank} of {self.ranks} {how}, and all others were ended."
        return what, "", f"Its log is {log}.{tail}"


def _failed(code: int) -> bool:
    return code not in (0, INTERRUPTED)


def name_of_launch() -> str:
    """What identifies the launch that this process belongs to, the same when its ranks are started again; or empty."""
    return os.environ.get(LAUNCH) or os.environ.get("TORCHELASTIC_RUN_ID", "")


def restarted(out: Path) -> Path | None:
    """The run that this launch has begun or resumed, and saved, before its ranks were started again.

    Args:
        out: where runs have their folders.
    """
    from scrimp import checkpoint

    own = name_of_launch()
    # A user of torchrun may give two launches one name.
    if not own or (LAUNCH not in os.environ and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"):
        return None
    mine: list[Path] = []
    for found in filter(None, map(checkpoint.snapshots, out.glob("*/checkpoints"))):
        with suppress(UserError):  # Somebody else's may be damaged.
            mine += [found[-1].parent.parent] * (checkpoint.meta(found[-1]).get("launch") == own)
    return max(mine, key=lambda run: run.stat().st_mtime, default=None)


def end_with_parent() -> None:
    """Let this rank stop, and save, when the launch that started it is killed. Linux only; elsewhere nothing."""
    if LAUNCH in os.environ and sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PDEATHSIG, signal.SIGTERM)
