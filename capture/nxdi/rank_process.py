"""What every rank's process does around its own work: report errors to its parent, and join the other ranks."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from ...store.errors import SleuthError
from .ranks import Parent

#: Interface for the ranks' sockets: they are on one machine.
_LOOPBACK = "lo"


def run_rank(arguments: list[str], work: Callable[[Path, int, Parent], None]) -> int:
    """Do one rank's work and return the exit code.

    Args:
        arguments: file of the job, rank, number of the pipe for events, process id of the parent.
        work: called with the job's file, the rank and the parent; what it raises is told to the parent.
    """
    job, rank, events, parent_id = arguments
    parent = Parent(int(events), int(parent_id))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        work(Path(job), int(rank), parent)
    except Exception as error:  # noqa: BLE001 (reported to the parent, which raises it)
        traceback.print_exc()
        expected = isinstance(error, SleuthError)
        text = str(error) if expected else f"{type(error).__name__}: {error}"
        parent.tell("error", message=text, expected=expected)
        return 1
    return 0


def join_ranks(rendezvous: str, rank: int, size: int) -> None:
    """Make the process group of all ranks; `rendezvous` is a file that does not exist yet."""
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _LOOPBACK)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)


def join_alone() -> None:
    """Make this process the only rank, unless it has a process group already.

    The group is left before the interpreter ends: a thread of gloo that lets go of a Python object later than that
    takes the whole process down with it (`terminate called without an active exception`).
    """
    if torch.distributed.is_initialized():
        return
    folder = tempfile.mkdtemp(prefix="sleuth-rendezvous-")
    atexit.register(_leave, folder)
    join_ranks(str(Path(folder) / "rendezvous"), 0, 1)


def _leave(folder: str) -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    shutil.rmtree(folder, ignore_errors=True)
