"""Rows of the `logits` table: every shared position of a comparison, measured and judged on its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ...store.progress import Progress
from ...store.trace import Trace
from ..align import AlignedSite
from ..moments import NONFINITE
from ..triples import FloatArray
from ..verdict import FAIL, PASS, UNDECIDED
from .chance import distance_spread, flip_odds
from .criteria import FLIP_SIGMAS, Positions, keeps, worst_limits
from .distributions import Columns, Grid, joined, measure_rows
from .source import AlignedLogits, ComparedRuns

_TEXT = ("comparison", "phase", "state", "verdict")
_INTEGERS = (
    "prompt", "position", "reference_token", "baseline_token", "target_token", "rank_reference_token", "n_tied",
    "n_nonfinite_reference", "n_nonfinite_baseline", "n_nonfinite_target",
)  # fmt: skip
_TRUTHS = ("top1", "top1_baseline", "padding_wins")
_NUMBERS = (
    "r_ratio", "r_raw", "cosine", "cosine_raw", "cosine_baseline", "kl", "kl_baseline", "js", "js_baseline",
    "top5", "top5_baseline", "top10", "top10_baseline", "error_top5", "error_top5_baseline", "error_top50",
    "error_top50_baseline", "error_top1000", "error_top1000_baseline", "error_all", "error_all_baseline",
    "reference_norm", "baseline_error", "target_error", "margin_ulp", "flip_expected", "flip_sigma", "p_reference",
    "p_reference_token",
)  # fmt: skip

#: Columns of the rows; undefined numbers are NULL.
ROWS = pa.schema(
    [
        *((name, pa.string()) for name in _TEXT),
        *((name, pa.int32()) for name in _INTEGERS),
        *((name, pa.bool_()) for name in _TRUTHS),
        *((name, pa.float64()) for name in _NUMBERS),
    ]
)
#: How a single position must stand to its limits.
_SENSES = {"kl": "<=", "cosine": ">=", "r_ratio": "<="}


def measured_rows(trace: Trace, runs: ComparedRuns, logits: AlignedLogits, progress: Progress) -> pa.Table:
    """Measure every shared position; logits are read piece by piece, once.

    Returns:
        A table of `ROWS`.
    """
    total = sum(len(by_prompt) for by_prompt in logits.phases.values())
    done = 0
    tables = [ROWS.empty_table()]
    for phase, by_prompt in logits.phases.items():
        parts = []
        for prompt, aligned in by_prompt.items():
            progress(f"{phase} of prompt {prompt}", done, total)
            padding = logits.padding.get(phase, {}).get(prompt)
            parts.append(_of_prompt(aligned, padding, prompt, Grid.of(logits.dtype)))
            trace.release_pages()
            done += 1
        tables.append(judged_rows(joined(parts), runs, phase, logits.sites.vocabulary, logits.dtype))
    return pa.concat_tables(tables)


def judged_rows(columns: Columns, runs: ComparedRuns, phase: str, vocabulary: int, dtype: str) -> pa.Table:
    """Rows of one phase from what `measure_rows` found at all of its positions.

    Args:
        columns: of all prompts, with `prompt` and `padding_wins`.
        runs: the comparison.
        phase: name of the phase.
        vocabulary: number of tokens.
        dtype: dtype that the target computes logits in.
    """
    return _judged(_as_table(columns, runs, phase, vocabulary), runs, dtype)


def _of_prompt(aligned: AlignedSite, padding: AlignedSite | None, prompt: int, grid: Grid) -> Columns:
    columns = joined([measure_rows(triple, grid) for triple in aligned])
    n = len(columns["position"])
    columns["prompt"] = np.full(n, prompt, np.int64)
    beyond = np.full(n, -np.inf)
    if padding is not None:
        beyond = np.concatenate([_largest(triple.target) for triple in padding])
    wins = ~(beyond <= columns["largest"])  # NaN in the padding wins
    columns["padding_wins"] = np.where(np.isnan(columns["largest"]), np.nan, wins)
    return columns


def _largest(rows: npt.NDArray[Any]) -> FloatArray:
    return np.asarray(rows.astype(np.float64).max(axis=1))


def _as_table(columns: Columns, runs: ComparedRuns, phase: str, vocabulary: int) -> pa.Table:
    """Rows of one phase, with the odds of a flip, which take all of the phase's positions together."""
    n = len(columns["position"])
    if runs.baseline is None:
        spread = np.sqrt(columns["rounding"])
    else:
        error = columns["baseline_error"] / np.sqrt(vocabulary)
        spread = distance_spread(error, columns["moved_sq"], columns["moved_n"])
    with np.errstate(invalid="ignore", divide="ignore"):
        columns["flip_sigma"] = np.where(columns["top1"] == 0.0, columns["behind"] / spread, np.nan)
    columns["flip_expected"] = flip_odds(columns["margins"], spread)
    constants = {"comparison": runs.comparison, "phase": phase, "verdict": PASS}
    columns |= {name: np.full(n, text) for name, text in constants.items()}
    return pa.table([_typed(columns[field.name], field.type) for field in ROWS], schema=ROWS)


def _typed(values: npt.NDArray[Any], kind: pa.DataType) -> pa.Array:
    """An Arrow array in which what is undefined (NaN, token -1) is NULL."""
    if kind == pa.string():
        return pa.array(values.tolist(), kind)
    missing = np.isnan(values) if values.dtype.kind == "f" else values < 0
    return pa.array(np.where(missing, 0, values).astype(kind.to_pandas_dtype()), kind, mask=missing)


def _judged(rows: pa.Table, runs: ComparedRuns, dtype: str) -> pa.Table:
    """Mark the positions whose own numbers are beyond what any position of a clean port shows."""
    limits = worst_limits(Positions("", rows, runs.baseline is not None, dtype), runs.thresholds)
    verdicts = []
    for row in rows.select(["state", "n_nonfinite_target", "flip_sigma", *_SENSES]).to_pylist():
        broken = [name for name in limits if keeps(row[name], _SENSES[name], limits[name]) is False]
        leap = runs.baseline is not None and (row["flip_sigma"] or 0.0) > FLIP_SIGMAS
        if row["state"] == NONFINITE:
            verdicts.append(FAIL if row["n_nonfinite_target"] else UNDECIDED)
        else:
            verdicts.append(FAIL if broken or leap else PASS)
    return rows.set_column(ROWS.get_field_index("verdict"), "verdict", pa.array(verdicts, pa.string()))
