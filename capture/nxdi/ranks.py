"""One process per rank: started together, stopped together.

Ranks report events as JSON lines on a pipe of their own. When one dies, the others get a moment to fail by
themselves (their collectives break), then they are killed. A rank whose parent dies is killed by the kernel.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...store.errors import CaptureError

#: Seconds that ranks have to end after one has failed.
GRACE_SECONDS = 5.0
_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.2


@dataclass
class Rank:
    """One running rank."""

    number: int
    process: subprocess.Popen[bytes]
    events: int
    log: Path
    pending: bytes = b""


class RankGroup:
    """The processes of one capture; use it as a context, nothing outlives it."""

    def __init__(self, command: Sequence[str], size: int, folder: Path, variables: Mapping[str, str]) -> None:
        """Start `size` processes.

        Args:
            command: program and arguments; the rank, the pipe and the parent's process id are appended.
            size: number of ranks.
            folder: where their output goes, one log file per rank.
            variables: environment variables on top of this process's.
        """
        self.ranks: list[Rank] = []
        self._selector = selectors.DefaultSelector()
        with contextlib.ExitStack() as unless_all_start:
            unless_all_start.callback(self.stop)
            for number in range(size):
                self._start(command, number, folder, {**os.environ, **variables})
            unless_all_start.pop_all()

    def _start(self, command: Sequence[str], number: int, folder: Path, variables: Mapping[str, str]) -> None:
        reader, writer = os.pipe()
        log = folder / f"rank{number}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, str(number), str(writer), str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(writer,),
                start_new_session=True,
                env=dict(variables),
            )
        os.close(writer)
        rank = Rank(number, process, reader, log)
        self.ranks.append(rank)
        self._selector.register(reader, selectors.EVENT_READ, rank)

    def tell(self, line: str) -> None:
        """Send one line to the standard input of every rank."""
        for rank in self.ranks:
            if rank.process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    rank.process.stdin.write(line.encode() + b"\n")
                    rank.process.stdin.flush()

    def run(self, on_event: Callable[[int, dict[str, Any]], None]) -> list[int]:
        """Pass on events until every rank has ended.

        Returns:
            The exit code of each rank, negative for one that a signal ended.
        """
        deadline: float | None = None
        while self._selector.get_map():
            for key, _ in self._selector.select(_POLL_SECONDS):
                self._read(key.data, on_event)
            if deadline is None and any(rank.process.poll() not in (None, 0) for rank in self.ranks):
                deadline = time.monotonic() + GRACE_SECONDS
            if deadline is not None and time.monotonic() > deadline:
                self._kill()
        return [rank.process.wait() for rank in self.ranks]

    def _read(self, rank: Rank, on_event: Callable[[int, dict[str, Any]], None]) -> None:
        data = os.read(rank.events, 1 << 16)
        if not data:
            self._selector.unregister(rank.events)
            os.close(rank.events)
            rank.process.wait()
            return
        *lines, rank.pending = (rank.pending + data).split(b"\n")
        for line in lines:
            on_event(rank.number, json.loads(line))

    def stop(self) -> None:
        """End every rank that still runs."""
        self._kill()
        for key in list(self._selector.get_map().values()):
            self._selector.unregister(key.fd)
            os.close(key.fd)
        self._selector.close()
        for rank in self.ranks:
            if rank.process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    rank.process.stdin.close()
            rank.process.wait()

    def _kill(self) -> None:
        for rank in self.ranks:
            if rank.process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(rank.process.pid, signal.SIGKILL)

    def __enter__(self) -> RankGroup:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


def last_words(log: Path) -> str:
    """The last line a rank printed, or nothing."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else ""


class Parent:
    """What a rank knows of the process that started it."""

    def __init__(self, events: int, parent: int) -> None:
        """Tie this process's life to the parent's.

        Raises:
            CaptureError: the parent is gone already.
        """
        self._events = events
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            raise CaptureError("the process that started this rank is gone")

    def tell(self, kind: str, **values: Any) -> None:
        """Send an event."""
        line = json.dumps({"kind": kind, **values}, default=str).encode() + b"\n"
        while line:
            line = line[os.write(self._events, line) :]

    def wait(self) -> str:
        """The next line from the parent; empty when it will not send one."""
        return sys.stdin.readline().strip()
