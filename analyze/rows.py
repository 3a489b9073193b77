"""The layout of a row of sums: what one pass over the tensors keeps of every position, and how rows add up.

The centred sums (`*_SUM`, `*_VAR`, `FIT_COV`) are taken about the row's own shifts (its first element), which
keeps a variance exact when the mean dwarfs it. `fold` merges rows with the pairwise update of Chan, Golub and
LeVeque, "Algorithms for Computing the Sample Variance" (1983): only non-negative terms are added.
"""

from __future__ import annotations

import numpy as np

from .triples import FloatArray

# The first four are kept for every position.
REFERENCE_SQ, BASELINE_SQ, TARGET_SQ, BAD = range(4)
TOKEN_COLUMNS = 4
COUNT, EXCLUDED, BAD_REFERENCE, BAD_BASELINE, BAD_TARGET = range(4, 9)
TARGET_NORM_SQ, PRODUCT, MAX_BASELINE, MAX_TARGET = range(9, 13)
SHIFT_REFERENCE, SHIFT_BASELINE, SHIFT_TARGET = range(13, 16)
REFERENCE_SUM, BASELINE_SUM, TARGET_SUM = range(16, 19)
REFERENCE_VAR, BASELINE_VAR, TARGET_VAR, FIT_COV = range(19, 23)
COLUMNS = 23

_PLAIN = slice(REFERENCE_SQ, PRODUCT + 1)
_SHIFTS = slice(SHIFT_REFERENCE, SHIFT_TARGET + 1)
_SUMS = slice(REFERENCE_SUM, TARGET_SUM + 1)
_VARS = slice(REFERENCE_VAR, TARGET_VAR + 1)


def fold(rows: FloatArray) -> FloatArray:
    """Merge rows of sums, `float64[n, COLUMNS]`, into one, `float64[COLUMNS]`, whose shifts are the means."""
    total = np.zeros(COLUMNS)
    if len(rows) == 0:
        return total
    total[_PLAIN] = rows[:, _PLAIN].sum(axis=0)
    rows = rows[rows[:, COUNT] > 0]
    if len(rows) == 0:
        return total
    total[MAX_BASELINE] = rows[:, MAX_BASELINE].max()
    total[MAX_TARGET] = rows[:, MAX_TARGET].max()
    with np.errstate(over="ignore", invalid="ignore"):  # overflow shows as inf or NaN, and as such in the record
        count = rows[:, COUNT, None]
        inside = rows[:, _SUMS] / count
        origin = rows[0, _SHIFTS]
        means = (rows[:, _SHIFTS] - origin) + inside
        mean = (count * means).sum(axis=0) / total[COUNT]
        offset = means - mean
        total[_SHIFTS] = origin + mean
        centred = rows[:, _VARS] - rows[:, _SUMS] * inside
        total[_VARS] = (np.maximum(centred, 0.0) + count * offset * offset).sum(axis=0)
        shared = rows[:, FIT_COV] - rows[:, REFERENCE_SUM] * inside[:, 2]
        total[FIT_COV] = (shared + count[:, 0] * offset[:, 0] * offset[:, 2]).sum()
    return total
