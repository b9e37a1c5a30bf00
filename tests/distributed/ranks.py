"""Several ranks of this machine for a test: one start of processes for many checks, as a start takes seconds.

    found = together(2, "parity", "layouts")    # runs layouts() of parity.py on two ranks

A job is a function of a module in this folder that takes texts and returns JSON on the first rank. What any rank
raises is raised here, with the rank's name.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any


def together(ranks: int, module: str, job: str, *given: str, seconds: int = 240) -> Any:
    """What a job returns on the first of so many ranks; it takes what is given."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    here = Path(__file__).parent
    own = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR",
           "PYTHONPATH": os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])}  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, __file__, module, job, str(rank), str(ranks), *given],
            env=os.environ | own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        told = [process.communicate(timeout=seconds) for process in started]
    finally:
        for process in started:
            process.kill()
    faults = [
        f"rank {rank} ({p.returncode}):\n{err}"
        for rank, (p, (_, err)) in enumerate(zip(started, told, strict=True))
        if p.returncode
    ]
    assert not faults, "\n".join(faults)
    return json.loads(told[0][0].splitlines()[-1])


def main(module: str, job: str, rank: int, ranks: int, *given: str) -> None:
    """One rank."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, timeout=timedelta(seconds=120))
    try:
        found = getattr(importlib.import_module(module), job)(*given)
        dist.barrier()
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # Others wait for this rank, and would keep it from leaving.
    if rank == 0:
        print(json.dumps(found), flush=True)
    dist.destroy_process_group()
    # Threads of gloo that still end make a process abort, rarely; how launched runs leave is tested by test_launch.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:])
