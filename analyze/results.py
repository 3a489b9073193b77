"""Collecting the rows of a comparison on disk while it runs, and entering them into the catalog at its end.

The catalog's write lock is held only for the final ingest, and memory stays flat: rows go through Parquet files in a
temporary folder of the trace.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ..store import catalog
from .measure import PROBABILITIES, Measurement
from .pairs import Pair
from .triples import FloatArray

_NUMBERS = (
    "reference_norm",
    "baseline_error",
    "target_error",
    "r_ratio",
    "r_low",
    "r_high",
    "relative_l2",
    "relative_l2_baseline",
    "cosine",
    "max_abs_error",
    "linf_ratio",
    "sigma_ratio",
    "mean_error",
    "qq_slope",
    "qq_intercept",
    "qq_w1",
    "ks",
    "fit_scale",
    "fit_offset",
    "fit_residual",
)
#: Numbers that are known only after the last site.
_OUTCOMES = ("p_value", "q_value", "r_judged", "r_limit")
_MEASUREMENTS = pa.schema(
    [
        *((name, pa.string()) for name in ("comparison", "site", "target_site", "module", "port", "slot", "phase")),
        *((name, pa.int32()) for name in ("measurement", "call", "exec_order", "prompt")),
        ("n", pa.int64()),
        *((name, pa.float64()) for name in _NUMBERS),
        ("state", pa.string()),
    ]
)
_QUANTILES = pa.schema(
    [
        ("comparison", pa.string()),
        ("measurement", pa.int32()),
        *((name, pa.float64()) for name in ("probability", "baseline", "target")),
    ]
)
_TOKENS = pa.schema(
    [
        ("comparison", pa.string()),
        ("measurement", pa.int32()),
        ("position", pa.int32()),
        *((name, pa.float64()) for name in ("baseline_sq", "target_sq", "reference_sq")),
    ]
)
_SCHEMAS = {"measurements": _MEASUREMENTS, "error_quantiles": _QUANTILES, "token_errors": _TOKENS}


@dataclass(frozen=True)
class Judged:
    """A measurement with its place; `measurement` is None when shapes do not match."""

    pair: Pair
    exec_order: int
    phase: str
    prompt: int | None
    measurement: Measurement | None
    state: str


@dataclass(frozen=True)
class Outcomes:
    """Verdicts of all measurements, in their order.

    Attributes:
        verdicts: one each.
        overall: those of the measurements over all prompts.
        n_rerouted: tokens that were left out of the verdict.
        numbers: `p_value`, `q_value`, `r_judged` and `r_limit`; NaN where R did not decide.
        notes: what the verdicts rest on, for people.
    """

    verdicts: tuple[str, ...]
    overall: tuple[str, ...]
    n_rerouted: npt.NDArray[np.int32]
    numbers: Mapping[str, FloatArray]
    notes: tuple[str, ...] = ()

    def columns(self, start: int, stop: int) -> dict[str, pa.Array]:
        """The columns of some measurements."""
        columns = {name: pa.array(self.numbers[name][start:stop], from_pandas=True) for name in _OUTCOMES}
        columns["n_rerouted"] = pa.array(self.n_rerouted[start:stop])
        columns["verdict"] = pa.array(self.verdicts[start:stop], pa.string())
        return columns


class ResultWriter:
    """Rows of one comparison, on their way to the catalog."""

    def __init__(self, folder: Path, comparison: str) -> None:
        """Collect in a temporary folder inside `folder`."""
        self._comparison = comparison
        self._folder = Path(tempfile.mkdtemp(prefix=".comparing-", dir=folder))
        self._writers = {
            table: pq.ParquetWriter(self._folder / f"{table}.parquet", schema) for table, schema in _SCHEMAS.items()
        }
        self.n_measurements = 0

    def add(self, rows: Sequence[Judged]) -> None:
        """Append the measurements of one site."""
        tables: dict[str, list[pa.Table]] = {"error_quantiles": [], "token_errors": []}
        records = []
        for row in rows:
            records.append(self._record(row))
            found = row.measurement
            if found is not None and found.quantiles is not None:
                grid = (PROBABILITIES, found.quantiles.baseline, found.quantiles.target)
                tables["error_quantiles"].append(self._columns(_QUANTILES, grid))
            if found is not None and found.tokens is not None:
                tokens = found.tokens
                columns = (tokens.positions, tokens.baseline_sq, tokens.target_sq, tokens.reference_sq)
                tables["token_errors"].append(self._columns(_TOKENS, columns))
            self.n_measurements += 1
        self._writers["measurements"].write_table(pa.Table.from_pylist(records, schema=_MEASUREMENTS))
        for table, parts in tables.items():
            if parts:
                self._writers[table].write_table(pa.concat_tables(parts))

    def commit(self, connection: Any, outcomes: Outcomes) -> None:
        """Append everything to the catalog."""
        for table, writer in self._writers.items():
            writer.close()
            start = 0
            for batch in pq.ParquetFile(self._folder / f"{table}.parquet").iter_batches(batch_size=1 << 20):
                rows = pa.Table.from_batches([batch])
                if table == "measurements":
                    for name, column in outcomes.columns(start, start + len(rows)).items():
                        rows = rows.append_column(name, column)
                start += len(rows)
                catalog.insert(connection, table, rows)

    def _record(self, row: Judged) -> dict[str, object]:
        site, found = row.pair.reference, row.measurement
        numbers = {name: _finite_or_none(getattr(found, name)) if found else None for name in _NUMBERS}
        return {
            "comparison": self._comparison,
            "measurement": self.n_measurements,
            "site": site.name,
            "target_site": row.pair.target.name,
            "module": site.module,
            "port": site.port,
            "slot": site.slot,
            "call": site.call,
            "exec_order": row.exec_order,
            "phase": row.phase,
            "prompt": row.prompt,
            "n": found.n if found else 0,
            **numbers,
            "state": row.state,
        }

    def _columns(self, schema: pa.Schema, values: Sequence[Any]) -> pa.Table:
        n = len(values[0])
        leading = [pa.array([self._comparison] * n), pa.array(np.full(n, self.n_measurements, np.int32))]
        return pa.table(
            [
                *leading,
                *(pa.array(v, field.type, from_pandas=True) for v, field in zip(values, list(schema)[2:], strict=True)),
            ],
            schema=schema,
        )

    def __enter__(self) -> ResultWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self._writers.values():
            writer.close()
        shutil.rmtree(self._folder)


def _finite_or_none(value: float) -> float | None:
    """NULL for what is undefined (NaN); infinities are kept, they mean a zero denominator."""
    return None if math.isnan(value) else value
