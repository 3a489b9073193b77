"""Writing a surveyed dump into the shards of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy.typing as npt
import torch

from ...store.index import TensorKey
from ...store.manifest import RunManifest
from ...store.progress import Progress
from ...store.run_writer import RunWriter
from ...store.trace import Trace
from ..layout import cut
from ..pending import to_numpy
from .dump import DumpFile, Plan, Planned, Report, dtype_of, tensors_of
from .modules import annotate

#: Bytes that may wait for the disk; mapped files make more of it pointless.
_QUEUE_BYTES = 64 << 20


class ImportedValues:
    """A tensor of a dump as the writer takes it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        """Keep a reference; nothing writes into a tensor of a dump."""
        self.memo: Any = None
        self.nbytes = tensor.numel() * tensor.element_size()
        self._tensor = tensor

    @contextmanager
    def values(self) -> Iterator[npt.NDArray[Any]]:
        """The values, read from the mapped file."""
        yield to_numpy(self._tensor)


@dataclass
class Written:
    """What was stored: totals, tensors with positions, and the place of every module in execution order."""

    n_tensors: int = 0
    nbytes: int = 0
    stored_nbytes: int = 0
    positions: int = 0
    orders: dict[str, int] = field(default_factory=dict)


def write_ranks(
    trace: Trace, manifest: RunManifest, plan: Plan, report: Report, written: Written, progress: Progress
) -> None:
    """Write one rank after the other, so that one writer and one file are open at a time."""
    done = 0
    for rank, of_rank in groupby(plan.tensors, key=lambda tensor: tensor.rank):
        writer = RunWriter(
            trace.run_folder(manifest.run),
            manifest.run,
            rank=rank,
            manifest=manifest.to_json,
            queue_bytes=_QUEUE_BYTES,
        )
        with writer:
            for file, of_file in groupby(of_rank, key=lambda tensor: tensor.file):
                wanted = {tensor.key: tensor for tensor in of_file}
                progress("store", done, len(plan.tensors))
                done += len(wanted)
                _write_file(writer, file, wanted, report, written)
        totals = writer.totals
        written.n_tensors += totals.n_tensors
        written.nbytes += totals.nbytes
        written.stored_nbytes += totals.stored_nbytes


def _write_file(
    writer: RunWriter, file: DumpFile, wanted: dict[str, Planned], report: Report, written: Written
) -> None:
    for slot, tensor in tensors_of(file, report):
        planned = wanted.pop(slot, None)
        if planned is None:
            continue
        if tuple(tensor.shape) != planned.shape or dtype_of(tensor) != planned.dtype:
            report.skip(file.name, "changed while it was being imported", slot)
            continue
        if planned.layout is not None and not planned.layout.rows:
            report.skip(file.name, "holds padding only", slot)
            continue
        for part in cut(tensor, planned.layout, last_only=planned.last_only, dims=planned.dims):
            dims = annotate(part.dims, planned.sharded, planned.copies)
            key = TensorKey(
                planned.prompt if part.position_start is None else part.prompt,
                planned.phase,
                planned.step,
                0,
                planned.order,
                planned.module,
                planned.port,
                planned.slot,
                dims,
                part.position_start,
                part.position_count,
            )
            writer.put(key, ImportedValues(part.values))
            written.positions += part.position_start is not None
            written.orders.setdefault(planned.module, planned.order)
