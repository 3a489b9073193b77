"""Recording one rank of a run: a bounded queue, two threads and rolling shards.

Producers call `put` from forward hooks. It returns at once unless more than `queue_bytes` are waiting, in which
case it blocks: memory stays bounded and nothing is dropped. One thread hashes and summarises the next tensor while
the other stores the one before it; neither touches the catalog.

A forward pass that keeps every core busy is slowed by a thread beside it by more than that thread's work, because its
own threads wait for each other. The writer then takes turns instead: it lets tensors gather, and `put` waits while they
are stored.
"""

from __future__ import annotations

import fcntl
import os
import queue
import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy.typing as npt

from .errors import CaptureError, RunExistsError, StorageError
from .index import TensorKey
from .shard_writer import Content, ShardWriter, content_of, shard_name
from .trace import site_name

#: A shard is closed once it holds this many bytes of tensors.
SHARD_BYTES = 1 << 30
#: How many bytes may wait in the queue before `put` blocks.
QUEUE_BYTES = 256 << 20
#: How many bytes gather before the writer takes its turn, when it takes turns.
TURN_BYTES = 32 << 20
#: How many summarised tensors may wait to be stored.
_AHEAD = 2


class ValueSource(Protocol):
    """Values that the writer reads in its own threads, once per `put`.

    Attributes:
        memo: what the writer found out about the values, kept for the next `put` of the same source.
    """

    memo: Content | None

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""

    def values(self) -> AbstractContextManager[npt.NDArray[Any]]:
        """C-contiguous values, guaranteed unchanged while the context is open."""


@dataclass(frozen=True)
class _Summarised:
    """A tensor between the two threads.

    Attributes:
        key: where and when it appeared.
        array: its values.
        content: their digest and statistics.
        held: guarantees the values until it is closed.
    """

    key: TensorKey
    array: npt.NDArray[Any]
    content: Content
    held: ExitStack


@dataclass(frozen=True)
class Totals:
    """What a writer has stored so far."""

    n_tensors: int
    nbytes: int
    stored_nbytes: int


class RunWriter:
    """Writes the shards of one rank of a run."""

    def __init__(
        self,
        folder: Path,
        run: str,
        *,
        rank: int = 0,
        statistics_only: bool = False,
        manifest: Callable[[], bytes],
        shard_bytes: int = SHARD_BYTES,
        queue_bytes: int = QUEUE_BYTES,
        take_turns: bool = False,
    ) -> None:
        """Lock the rank and start the threads.

        Args:
            folder: the run's folder; it exists.
            run: name of the run.
            rank: rank that this process records.
            statistics_only: store statistics and checksums, not values.
            manifest: returns the run's manifest as JSON bytes; called when a shard is sealed.
            shard_bytes: roll over to a new shard beyond this size.
            queue_bytes: back-pressure limit.
            take_turns: store only while producers wait; for producers that use every core.

        Raises:
            RunExistsError: another process is writing this rank.
        """
        self._folder, self._run, self._rank = folder, run, rank
        self._statistics_only, self._manifest = statistics_only, manifest
        self._shard_bytes, self._queue_bytes = shard_bytes, queue_bytes
        self._lock_fd = lock_rank(folder, run, rank)
        self._queue: deque[tuple[TensorKey, ValueSource]] = deque()
        lock = threading.Lock()
        self._condition = threading.Condition(lock)  # something to take, or room to put
        self._idle = threading.Condition(lock)  # nothing left to store; apart, so as not to wake up for each tensor
        self._waiting_bytes = 0
        self._turn_bytes = min(TURN_BYTES, queue_bytes) if take_turns else 0
        self._draining = False
        self._n_taken = 0
        self._closing = False
        self._error: BaseException | None = None
        self._shard: ShardWriter | None = None
        self._next_shard = 0
        self._n_tensors = self._nbytes = self._stored_nbytes = 0
        self._summarised: queue.Queue[_Summarised | None] = queue.Queue(maxsize=_AHEAD)
        self._threads = [
            threading.Thread(target=target, name=f"{name}-{run}-{rank}", daemon=True)
            for name, target in (("summaries", self._summarise), ("shards", self._work))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def totals(self) -> Totals:
        """Counts so far; exact after `flush` or `close`."""
        return Totals(self._n_tensors, self._nbytes, self._stored_nbytes)

    def put(self, key: TensorKey, source: ValueSource) -> None:
        """Hand over one tensor; blocks while the queue is full.

        Raises:
            SleuthError: the writer has failed; nothing more can be stored.
        """
        with self._condition:
            while self._waiting_bytes > self._queue_bytes and self._error is None:
                self._condition.wait()
            self._raise_error()
            self._queue.append((key, source))
            self._waiting_bytes += source.nbytes
            if self._waiting_bytes >= self._turn_bytes:
                self._drain(wait=self._turn_bytes > 0)

    def flush(self) -> None:
        """Return once everything handed over so far is acknowledged: it now survives the death of the process.

        Raises:
            SleuthError: the writer has failed.
        """
        with self._condition:
            self._drain(wait=True)

    def _drain(self, *, wait: bool) -> None:
        """Let the writer store what is queued, and wait for it if asked to."""
        self._draining = True
        self._condition.notify_all()
        while wait and (self._queue or self._n_taken) and self._error is None:
            self._idle.wait()
        self._raise_error()

    def close(self) -> None:
        """Drain the queue, seal the last shard and stop the thread.

        Raises:
            SleuthError: the writer has failed; what was acknowledged stays salvageable by `sleuth repair`.
        """
        with self._condition:
            self._closing = self._draining = True
            self._condition.notify_all()
        for thread in self._threads:
            thread.join()
        (self._folder / lock_name(self._rank)).unlink(missing_ok=True)
        os.close(self._lock_fd)
        self._raise_error()

    def _raise_error(self) -> None:
        if isinstance(self._error, OSError):
            raise StorageError(
                f"run {self._run!r}: cannot write to {self._folder}: {self._error.strerror or self._error}; "
                f"{self._n_tensors} tensors are safe: free space, then 'sleuth repair {self._folder.parents[1]}'"
            ) from self._error
        if self._error is not None:
            raise self._error

    def _summarise(self) -> None:
        """Take tensors from the queue, hash and summarise them, and pass them on."""
        while (item := self._next()) is not None:
            self._attempt(item[0], self._pass_on, *item)
        self._summarised.put(None)

    def _pass_on(self, key: TensorKey, source: ValueSource) -> None:
        with ExitStack() as stack:
            array = stack.enter_context(source.values())
            content = source.memo = source.memo or content_of(array)
            self._summarised.put(_Summarised(key, array, content, stack.pop_all()))

    def _work(self) -> None:
        """Store what was summarised; after an error let go of the rest."""
        while (item := self._summarised.get()) is not None:
            self._attempt(item.key, self._store, item)
            with self._condition:
                self._n_taken -= 1
                if not self._n_taken and not self._queue:
                    self._idle.notify_all()
        if self._error is None:
            self._attempt(None, self._seal)
        if self._error is not None and self._shard is not None:
            self._shard.abandon()

    def _attempt(self, key: TensorKey | None, action: Callable[..., None], *arguments: object) -> None:
        try:
            action(*arguments)
        except CaptureError as error:
            site = f"{site_name(key.module, key.port, key.slot, key.call)}: " if key else ""
            self._fail(CaptureError(f"{site}{error}"))
        except Exception as error:  # noqa: BLE001 (the producer raises it on its next call; silence would block it)
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Note the first error, empty the queue and wake up whoever waits."""
        # HDF5 reports a full disk as RuntimeError or ValueError.
        with self._condition:
            if self._error is None:
                self._error = error if not isinstance(error, (ValueError, RuntimeError)) else _as_os_error(error)
            self._queue.clear()
            self._waiting_bytes = 0
            self._condition.notify_all()
            self._idle.notify_all()

    def _next(self) -> tuple[TensorKey, ValueSource] | None:
        with self._condition:
            if not self._queue:
                self._draining = self._closing
            while not (self._queue and self._draining) and not self._closing and self._error is None:
                self._condition.wait()
            if not self._queue or self._error is not None:
                return None
            item = self._queue.popleft()
            self._n_taken += 1
            self._waiting_bytes -= item[1].nbytes
            self._condition.notify_all()
            return item

    def _store(self, item: _Summarised) -> None:
        with item.held:
            if self._error is not None:
                return
            if self._shard is None:
                number = self._next_shard
                path = self._folder / shard_name(self._rank, number)
                self._shard = ShardWriter(path, self._run, self._rank, number)
                self._next_shard += 1
            before = self._shard.nbytes
            row = self._shard.add(
                self._n_tensors, item.key, item.array, item.content, statistics_only=self._statistics_only
            )
        self._n_tensors += 1
        self._nbytes += row.nbytes
        self._stored_nbytes += self._shard.nbytes - before
        if self._shard.nbytes >= self._shard_bytes:
            self._seal()

    def _seal(self) -> None:
        if self._shard is not None:
            self._shard.seal(self._manifest())
            self._shard = None

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _as_os_error(error: Exception) -> BaseException:
    return OSError(None, f"HDF5: {error}")


def lock_name(rank: int) -> str:
    """File name of the advisory lock of one rank."""
    return f"rank{rank}.lock"


def lock_rank(folder: Path, run: str, rank: int) -> int:
    """Take the advisory lock of one rank's shards; it is released when the process ends or the fd closes.

    Returns:
        The file descriptor that holds the lock.

    Raises:
        RunExistsError: a live process holds it.
    """
    path = folder / lock_name(rank)
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(fd, 32).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise RunExistsError(
            f"run {run!r} is being written by process {holder}; wait for it, or choose another --run name"
        ) from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, str(os.getpid()).encode(), 0)
    return fd
