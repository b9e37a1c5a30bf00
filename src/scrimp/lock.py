"""One writer in a folder at a time. The lock is the system's: it ends with the process, however that ends."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TextIO

from scrimp.errors import UserError


def lock(folder: Path) -> TextIO | None:
    """Take the right to write into a folder; closing what is returned gives it back.

    The file stays, with the number of the process that holds it. Removing it would let two processes lock two files
    of that name.

    Returns:
        The locked file, or None where the system or the disk has no locks.
    Raises:
        UserError: if another process writes into the folder.
        OSError: if the file cannot be written.
    """
    try:
        import fcntl
    except ImportError:
        return None
    file = (folder / "lock").open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        what = f"process {holder} is training this run." if holder else "another process is training this run."
        raise UserError(what, str(folder), "Wait until it ends, or stop it; then use --resume.") from None
    except OSError:
        file.close()
        return None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file
