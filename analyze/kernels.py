"""The compiled pass over three tensors: widen block by block, subtract in float64, add up.

Blocks are widened to float64 BEFORE the subtraction: a float32 difference is already off by 6e-8. The
reductions allow reassociation (so that they vectorise) but not "no NaNs" or "no infinities", and they run over
finished differences, so that reassociation can never turn a sum of differences into a difference of sums.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from .block_kernels import INFINITY_BITS, read_block
from .compiled import MAGNITUDE, as_bits, as_float32, as_float64, compiled, compiled_sum, prefetch
from .rows import (
    BAD,
    BAD_BASELINE,
    BAD_REFERENCE,
    BAD_TARGET,
    BASELINE_SQ,
    BASELINE_SUM,
    BASELINE_VAR,
    COLUMNS,
    COUNT,
    EXCLUDED,
    FIT_COV,
    MAX_BASELINE,
    MAX_TARGET,
    PRODUCT,
    REFERENCE_SQ,
    REFERENCE_SUM,
    REFERENCE_VAR,
    SHIFT_BASELINE,
    SHIFT_REFERENCE,
    SHIFT_TARGET,
    TARGET_NORM_SQ,
    TARGET_SQ,
    TARGET_SUM,
    TARGET_VAR,
)
from .triples import (
    BFLOAT16,
    FLOAT32,
    FLOAT64,
    INT32,
    INT64,
    ITEM_BYTES,
    TABLE8,
    TABLE16,
    UINT32,
    UINT64,
    ByteArray,
    Float32Array,
    FloatArray,
    IntArray,
)

BLOCK = 1024  # elements; the work arrays that a float comparison touches (40 KB) stay in the first-level cache

_LOW_BITS = 2047  # what a 64-bit integer has beyond the 53 bits of a float64

_Views: TypeAlias = tuple[ByteArray, Any, Any, IntArray]


@compiled
def _fetch_ahead(data: ByteArray, start: int, stop: int) -> None:
    """Ask for bytes `start .. stop`, so that memory works while the sums of a block are added up."""
    for at in range(start, min(stop, data.shape[0]), 64):
        prefetch(data, at)


@compiled
def _views(data: ByteArray) -> _Views:
    """The bytes as unsigned words of 1, 2 and 4 bytes and as int64 (all but the right one are unused)."""
    size = data.shape[0]
    return (
        data,
        data[: size // 2 * 2].view(np.uint16),
        data[: size // 4 * 4].view(np.uint32),
        data[: size // 8 * 8].view(np.int64),
    )


@compiled
def _widen(
    views: _Views, kind: int, table: Float32Array, start: int, count: int, out: FloatArray, low: FloatArray
) -> None:
    """Elements `start .. start + count` as float64; 64-bit integers as `out + low`, both exact."""
    bytes_, halves, words, longs = views
    stop = start + count
    if kind == FLOAT32:
        source = words[start:stop]  # a slice, since a loop over start + i checks for negative indices
        for i in range(count):
            out[i] = as_float32(source[i])
    elif kind == BFLOAT16:
        brains = halves[start:stop]
        for i in range(count):
            out[i] = as_float32(np.uint32(brains[i]) << np.uint32(16))
    elif kind == FLOAT64:
        doubles = longs[start:stop]
        for i in range(count):
            out[i] = as_float64(doubles[i])
    elif kind == TABLE16:
        codes = halves[start:stop]
        for i in range(count):
            out[i] = table[codes[i]]
    elif kind == TABLE8:
        octets = bytes_[start:stop]
        for i in range(count):
            out[i] = table[octets[i]]
    elif kind == INT32:
        for i in range(count):
            out[i] = np.int32(words[start + i])
    elif kind == UINT32:
        for i in range(count):
            out[i] = words[start + i]
    elif kind == INT64:
        for i in range(count):
            rest = longs[start + i] & np.int64(_LOW_BITS)
            out[i] = longs[start + i] - rest
            low[i] = rest
    elif kind == UINT64:
        for i in range(count):
            tail = np.uint64(longs[start + i]) & np.uint64(_LOW_BITS)
            out[i] = np.uint64(longs[start + i]) - tail
            low[i] = tail


@compiled
def _subtract(
    x: FloatArray, low_x: FloatArray, r: FloatArray, low_r: FloatArray, count: int, wide: bool, errors: FloatArray
) -> int:
    """`errors = x - r`; returns the bits of the largest magnitude, which rank NaN above infinity."""
    if wide:
        for i in range(count):
            errors[i] = (x[i] - r[i]) + (low_x[i] - low_r[i])
        return _largest(errors, count)
    largest = 0
    for i in range(count):
        difference = x[i] - r[i]
        errors[i] = difference
        largest = max(largest, as_bits(difference) & np.int64(MAGNITUDE))
    return largest


@compiled
def _largest(errors: FloatArray, count: int) -> int:
    largest = 0
    for i in range(count):
        largest = max(largest, as_bits(errors[i]) & np.int64(MAGNITUDE))
    return largest


@compiled
def _drop_nonfinite(
    r: FloatArray, b: FloatArray, t: FloatArray, count: int, has_baseline: bool, eb: FloatArray, et: FloatArray,
    row: FloatArray,
) -> int:  # fmt: skip
    """Close up the finite elements of a block; count the others in `row`; return how many stay."""
    kept = 0
    for i in range(count):
        middle = b[i] if has_baseline else r[i]
        fine_r, fine_b, fine_t = np.isfinite(r[i]), np.isfinite(middle), np.isfinite(t[i])
        if fine_r and fine_b and fine_t:
            r[kept], t[kept] = r[i], t[i]
            eb[kept], et[kept] = eb[i], et[i]
            kept += 1
        elif (r[i] == middle and r[i] == t[i]) or (np.isnan(r[i]) and np.isnan(middle) and np.isnan(t[i])):
            row[EXCLUDED] += 1.0
        else:
            row[BAD] += 1.0
            row[BAD_REFERENCE] += 0.0 if fine_r else 1.0
            row[BAD_BASELINE] += 0.0 if fine_b or not has_baseline else 1.0
            row[BAD_TARGET] += 0.0 if fine_t else 1.0
    return kept


@compiled_sum
def _accumulate(
    r: FloatArray, t: FloatArray, eb: FloatArray, et: FloatArray, count: int, sums: FloatArray, index: int
) -> None:
    """Add a block to its row of sums; the row's shifts keep the centred sums free of cancellation."""
    shift_r = sums[index, SHIFT_REFERENCE]
    shift_b, shift_t = sums[index, SHIFT_BASELINE], sums[index, SHIFT_TARGET]
    rr = bb = tt = norm = product = 0.0
    sum_r = sum_b = sum_t = var_r = var_b = var_t = cov = 0.0
    for i in range(count):
        x, y, b, e = r[i], t[i], eb[i], et[i]
        rr += x * x
        bb += b * b
        tt += e * e
        norm += y * y
        product += x * y
        dx, db, de = x - shift_r, b - shift_b, e - shift_t
        sum_r += dx
        sum_b += db
        sum_t += de
        var_r += dx * dx
        var_b += db * db
        var_t += de * de
        cov += dx * de
    row = sums[index]
    row[COUNT] += count
    row[REFERENCE_SQ] += rr
    row[BASELINE_SQ] += bb
    row[TARGET_SQ] += tt
    row[TARGET_NORM_SQ] += norm
    row[PRODUCT] += product
    row[REFERENCE_SUM] += sum_r
    row[BASELINE_SUM] += sum_b
    row[TARGET_SUM] += sum_t
    row[REFERENCE_VAR] += var_r
    row[BASELINE_VAR] += var_b
    row[TARGET_VAR] += var_t
    row[FIT_COV] += cov


@compiled
def read_rows(
    reference: ByteArray,
    baseline: ByteArray,
    target: ByteArray,
    kinds: int,
    tables: tuple[Float32Array, Float32Array, Float32Array],
    has_baseline: bool,
    features: int,
    start: int,
    stop: int,
    sums: FloatArray,
    errors: FloatArray,
    filled: int,
) -> int:
    """Read elements `start .. stop` of a row-major triple.

    `sums[0]` belongs to the row that holds `start`; rows are added to, so that a row may arrive in pieces.
    `errors` is `float64[2, capacity]` and receives the finite errors of baseline and target from `filled` on.
    Either may be empty (then it is not computed). Returns the new fill of `errors`.
    """
    kind_r, kind_b, kind_t = kinds & 15, (kinds >> 4) & 15, kinds >> 8
    wide = max(kind_r, kind_b, kind_t) >= INT64  # the last kinds are the 64-bit integers
    views_r, views_b, views_t = _views(reference), _views(baseline), _views(target)
    table_r, table_b, table_t = tables
    r, b, t = np.empty(BLOCK), np.empty(BLOCK), np.empty(BLOCK)
    size = BLOCK if wide else 1
    low_r, low_b, low_t = np.zeros(size), np.zeros(size), np.zeros(size)
    summing, keeping = sums.shape[0] > 0, errors.shape[1] > 0
    into = errors if keeping else np.zeros((2, BLOCK))
    uncounted = np.zeros((1, COLUMNS))
    at, first = start, start // features
    size_r, size_b, size_t = ITEM_BYTES[kind_r], ITEM_BYTES[kind_b], ITEM_BYTES[kind_t]
    common = has_baseline and kind_r == FLOAT32 and kind_b == BFLOAT16 and kind_t in (BFLOAT16, FLOAT32)
    while at < stop:
        index = at // features - first
        count = min(BLOCK, stop - at, features - at % features)
        to = filled if keeping else 0
        eb, et = into[0, to : to + count], into[1, to : to + count]
        ahead, beyond = at + count, min(at + count + BLOCK, stop)
        _fetch_ahead(reference, ahead * size_r, beyond * size_r)
        _fetch_ahead(target, ahead * size_t, beyond * size_t)
        _fetch_ahead(baseline, ahead * size_b, beyond * size_b)
        if common:
            words_r, halves_b = views_r[2][at : at + count], views_b[1][at : at + count]
            if kind_t == BFLOAT16:
                largest_b, largest_t = read_block(words_r, halves_b, views_t[1][at : at + count], eb, et, sums, index)
            else:
                largest_b, largest_t = read_block(words_r, halves_b, views_t[2][at : at + count], eb, et, sums, index)
            if max(largest_b, largest_t) < INFINITY_BITS:
                at += count
                filled += count if keeping else 0
                continue
        _widen(views_r, kind_r, table_r, at, count, r, low_r)
        _widen(views_t, kind_t, table_t, at, count, t, low_t)
        largest_b, largest_t = 0, _subtract(t, low_t, r, low_r, count, wide, et)
        if has_baseline:
            _widen(views_b, kind_b, table_b, at, count, b, low_b)
            largest_b = _subtract(b, low_b, r, low_r, count, wide, eb)
        elif keeping:
            eb[:] = 0.0
        if wide:
            for i in range(count):
                r[i] += low_r[i]
                t[i] += low_t[i]
        at += count
        if max(largest_b, largest_t) >= INFINITY_BITS:
            row = sums[index] if summing else uncounted[0]
            count = _drop_nonfinite(r, b, t, count, has_baseline, eb, et, row)
            largest_b, largest_t = _largest(eb, count), _largest(et, count)
        if summing and count > 0:
            if sums[index, COUNT] == 0.0:
                sums[index, SHIFT_REFERENCE] = r[0]
                sums[index, SHIFT_BASELINE] = eb[0]
                sums[index, SHIFT_TARGET] = et[0]
            _accumulate(r, t, eb, et, count, sums, index)
            sums[index, MAX_BASELINE] = max(sums[index, MAX_BASELINE], as_float64(largest_b))
            sums[index, MAX_TARGET] = max(sums[index, MAX_TARGET], as_float64(largest_t))
        if keeping:
            filled += count
    return filled
