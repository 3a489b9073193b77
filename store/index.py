"""The shard index: one row per recorded tensor.

The same rows live in three places: as lines of the journal beside an open shard, as an Arrow table sealed
into a closed shard, and (with the run's name and its tensor ids) as the `tensors` table of the catalog.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa

from .errors import FormatError

#: Version of shards, journals and their index. Readers refuse any other.
FORMAT_VERSION = 1

#: `dataset` of a tensor that was captured as statistics only: there are no bytes to read.
NO_DATASET = ""


@dataclass(frozen=True, slots=True)
class TensorKey:
    """Where and when a tensor appeared: everything known before its values are looked at.

    Attributes:
        prompt: index of the prompt in the run; None for parameters and buffers.
        phase: `encode` (positions are those of an encoder's source), `prefill`, `decode`, `forward` (a model without
            tokens) or `static` (parameters, buffers).
        step: 0 for prefill, then 1, 2, ... for decode steps.
        call: how often the module had been called before within the same step.
        exec_order: position in execution order within the step.
        module: module path, empty for the root.
        port: `output`, `input`, `parameter` or `buffer`.
        slot: element of a tuple or field of a dataclass (`0`, `hidden_states`, `past.0.key`), or empty.
        dims: axes, see `store.dims`.
        position_start: first token position covered, None without positions.
        position_count: number of token positions covered, None without positions.
    """

    prompt: int | None
    phase: str
    step: int
    call: int
    exec_order: int
    module: str
    port: str
    slot: str
    dims: str
    position_start: int | None = None
    position_count: int | None = None


@dataclass(frozen=True, slots=True)
class Statistics:
    """Moments over the finite elements of a tensor, and counts of the others.

    All moments are None when no element is finite, and for complex tensors, which have no order; `std` is the
    population standard deviation.
    """

    mean: float | None
    std: float | None
    min: float | None
    max: float | None
    absmax: float | None
    n_nan: int
    n_inf: int
    n_zero: int


@dataclass(frozen=True, slots=True)
class TensorRow:
    """One row of a shard index.

    Attributes:
        seq: running number within run and rank, from 0.
        key: where and when the tensor appeared.
        shape: axis lengths.
        dtype: torch name of the element type.
        nbytes: size of the values.
        dataset: HDF5 dataset that holds the bytes, `NO_DATASET` for statistics-only rows.
        offset: byte offset of the values in the shard file; -1 when no bytes are stored.
        alias: True when an earlier tensor of the shard holds the same bytes.
        checksum: XXH3-128 of the raw bytes, hexadecimal.
        statistics: see `Statistics`.
    """

    seq: int
    key: TensorKey
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    dataset: str
    offset: int
    alias: bool
    checksum: str
    statistics: Statistics


_KEY_FIELDS = tuple(TensorKey.__dataclass_fields__)
_STATISTICS_FIELDS = tuple(Statistics.__dataclass_fields__)

#: Arrow schema of a shard index, in the column order of the catalog's `tensors` table.
SCHEMA = pa.schema(
    [
        pa.field("seq", pa.int64(), nullable=False),
        pa.field("prompt", pa.int32()),
        pa.field("phase", pa.string(), nullable=False),
        pa.field("step", pa.int32(), nullable=False),
        pa.field("call", pa.int32(), nullable=False),
        pa.field("exec_order", pa.int32(), nullable=False),
        pa.field("module", pa.string(), nullable=False),
        pa.field("port", pa.string(), nullable=False),
        pa.field("slot", pa.string(), nullable=False),
        pa.field("dims", pa.string(), nullable=False),
        pa.field("position_start", pa.int32()),
        pa.field("position_count", pa.int32()),
        pa.field("shape", pa.list_(pa.int64()), nullable=False),
        pa.field("dtype", pa.string(), nullable=False),
        pa.field("nbytes", pa.int64(), nullable=False),
        pa.field("dataset", pa.string(), nullable=False),
        pa.field("file_offset", pa.int64(), nullable=False),
        pa.field("alias", pa.bool_(), nullable=False),
        pa.field("checksum", pa.string(), nullable=False),
        pa.field("mean", pa.float64()),
        pa.field("std", pa.float64()),
        pa.field("min", pa.float64()),
        pa.field("max", pa.float64()),
        pa.field("absmax", pa.float64()),
        pa.field("n_nan", pa.int64(), nullable=False),
        pa.field("n_inf", pa.int64(), nullable=False),
        pa.field("n_zero", pa.int64(), nullable=False),
    ]
)


def to_tuple(row: TensorRow) -> tuple[object, ...]:
    """The row's values in `SCHEMA` order."""
    key, stats = row.key, row.statistics
    return (
        row.seq,
        *(getattr(key, name) for name in _KEY_FIELDS),
        list(row.shape),
        row.dtype,
        row.nbytes,
        row.dataset,
        row.offset,
        row.alias,
        row.checksum,
        *(getattr(stats, name) for name in _STATISTICS_FIELDS),
    )


def to_table(rows: Iterable[tuple[object, ...]]) -> pa.Table:
    """Arrow table of rows given as tuples in `SCHEMA` order."""
    columns = list(zip(*rows, strict=True)) or [()] * len(SCHEMA)
    return pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)], schema=SCHEMA
    )


def encode(table: pa.Table) -> bytes:
    """The index as an Arrow IPC stream, the form sealed into a shard."""
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, SCHEMA) as writer:
        writer.write_table(table)
    return sink.getvalue()


def decode(data: bytes) -> pa.Table:
    """The index table of a sealed shard.

    Raises:
        FormatError: the bytes are not an index of this format version.
    """
    try:
        table = pa.ipc.open_stream(data).read_all()
    except pa.ArrowInvalid as error:
        raise FormatError(f"the shard's index cannot be read: {error}") from error
    if table.schema != SCHEMA:
        raise FormatError("the shard's index has other columns than this version of tensorsleuth writes")
    return table
