"""How fast a measurement is, against copying the same bytes and against plain float64 numpy.

Run: python benchmarks/measure.py [elements ...]      (default 1e6 1e7 1e8; the last needs about 8 GB)

Two copies are the yardsticks: `np.copy`, which allocates its result, is the one the requirements are held against;
`np.copyto` into memory that is there already is the harder one (8 MB stay in the processor's cache), and is printed
beside it.

Every line is the median of repeats that are interleaved with the others, so that a busy machine slows all of
them alike; only the ratios mean something. Rates count the bytes of the three inputs (8 per element).
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections.abc import Callable

import ml_dtypes
import numpy as np
from tensorsleuth.analyze.measure import Triple, measure

FEATURES = 4096
REQUIRED = {"moments": 0.4, "full": 0.12, "naive": 12.0}


def triple(elements: int) -> Triple:
    """A float32 reference, its bfloat16 rounding, and a bfloat16 target that is off by 1 % and some noise."""
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((round(elements / FEATURES), FEATURES), np.float32)
    target = np.empty(reference.shape, ml_dtypes.bfloat16)
    for row, line in zip(reference, target, strict=True):
        line[:] = row * np.float32(1.01) + np.float32(1e-3) * rng.standard_normal(FEATURES, np.float32)
    return Triple(reference, reference.astype(ml_dtypes.bfloat16), target, np.arange(len(reference)))


def naive(whole: Triple) -> tuple[float, ...]:
    """The columns of the moments, as one would write them down."""
    assert whole.baseline is not None
    r, b, t = (np.asarray(x).astype(np.float64) for x in (whole.reference, whole.baseline, whole.target))
    eb, et = b - r, t - r
    centred = r - r.mean()
    slope = np.vdot(centred, et) / np.vdot(centred, centred)
    return (
        float(np.linalg.norm(et) / np.linalg.norm(eb)),
        float(np.linalg.norm(et) / np.linalg.norm(r)),
        float(np.vdot(t, r) / np.linalg.norm(t) / np.linalg.norm(r)),
        float(np.abs(et).max() / np.abs(eb).max()),
        float(et.std() / eb.std()),
        float(et.mean()),
        float(np.linalg.norm(et - et.mean() - slope * centred) / np.linalg.norm(eb)),
    )


def interleaved(jobs: dict[str, Callable[[], object]], repeats: int) -> dict[str, tuple[float, float]]:
    """Median wall and processor seconds per job.

    Short jobs run in batches of a tenth of a second: on a busy machine a job that fits between two preemptions
    would otherwise look faster than it is.
    """
    batches = {}
    for name, job in jobs.items():
        job()
        start = time.perf_counter()
        job()
        batches[name] = math.ceil(0.1 / (time.perf_counter() - start))
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            wall, processor = time.perf_counter(), time.process_time()
            for _ in range(batches[name]):
                job()
            spent = time.perf_counter() - wall, time.process_time() - processor
            samples[name].append((spent[0] / batches[name], spent[1] / batches[name]))
    return {
        name: (statistics.median(wall for wall, _ in times), statistics.median(cpu for _, cpu in times))
        for name, times in samples.items()
    }


def compare(elements: int, threads: int) -> bool:
    whole = triple(elements)
    assert whole.baseline is not None
    sources = (whole.reference, whole.baseline, whole.target)
    copies = [np.zeros_like(x) for x in sources]
    size = sum(x.nbytes for x in sources)

    def copy() -> None:
        for into, source in zip(copies, sources, strict=True):
            np.copyto(into, source)

    jobs: dict[str, Callable[[], object]] = {
        "np.copy": lambda: [np.copy(x) for x in sources],
        "np.copyto": copy,
        "naive": lambda: naive(whole),
    }
    for count in sorted({1, threads}):
        jobs[f"moments x{count}"] = lambda count=count: measure({0: [whole]}, quantiles=False, threads=count)
        jobs[f"full x{count}"] = lambda count=count: measure({0: [whole]}, threads=count)
    repeats = 9 if elements < 3e7 else 5
    seconds = interleaved(jobs, repeats)
    load = os.getloadavg()[0]
    print(f"\n{whole.reference.size:.3g} elements, {size / 1e6:.0f} MB, median of {repeats}, load {load:.1f}")
    print("                 wall ms     GB/s  of np.copy  of np.copyto  x naive |   CPU ms")
    met = True
    for name, (wall, processor) in seconds.items():
        to_copy, to_copyto, to_naive = (seconds[job][0] / wall for job in ("np.copy", "np.copyto", "naive"))
        kind, _, used = name.partition(" x")
        verdict = ""
        if used == str(threads):
            good = to_copy >= REQUIRED[kind] and (kind != "moments" or to_naive >= REQUIRED["naive"])
            verdict = "  met" if good else "  MISSED"
            met &= good
        print(
            f"  {name:12} {wall * 1e3:9.1f} {size / wall / 1e9:8.2f} {to_copy:11.3f} {to_copyto:13.3f} {to_naive:8.1f}"
            f" |{processor * 1e3:9.1f}{verdict}"
        )
    return met


def main() -> None:
    threads = os.cpu_count() or 1
    print(
        f"np.copy, np.copyto and naive numpy on 1 thread; measure on 1 and {threads} threads (row blocks), load "
        f"{os.getloadavg()[0]:.1f}\nrequired on {threads} threads: moments >= {REQUIRED['moments']} of np.copy and >= "
        f"{REQUIRED['naive']} x naive; full >= {REQUIRED['full']} of np.copy"
    )
    met = [compare(int(float(argument)), threads) for argument in sys.argv[1:] or ("1e6", "1e7", "1e8")]
    sys.exit(0 if all(met) else 1)


if __name__ == "__main__":
    main()
