"""Peak memory of `compare` on a trace and on one ten times as large: it should stay flat.

Three synthetic runs (FP32, BF16, BF16) of the same sites are compared in a process of their own; printed is the peak
resident memory of that process, mapped file pages included, and its ratio. The trace grows in the number of positions
per prompt, then in the number of prompts.

    python benchmarks/memory.py [--sites 16] [--positions 1024] [--width 2048]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from tensorsleuth.store import Prompt, PromptTokens, RunManifest, RunWriter, TensorKey, Trace

LIMIT = 1.25
CHILD = """
import re, sys
from pathlib import Path
from tensorsleuth.analyze.compare import ComparisonRequest, compare
from tensorsleuth.store import Trace
summary = compare(Trace.open(sys.argv[1]), ComparisonRequest("r", "t", "b"))
assert summary.verdict == "pass", summary
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024)
"""


@dataclass
class Values:
    """A numpy array as the writer takes it."""

    array: Any
    memo: Any = None

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(self.array.nbytes)

    @contextmanager
    def values(self) -> Iterator[Any]:
        """The array itself."""
        yield self.array


def make_trace(path: Path, sites: int, prompts: int, positions: int, width: int) -> int:
    """Write three runs and return the bytes of their tensors."""
    trace = Trace.create(path)
    total = 0
    for run, dtype in (("r", np.float32), ("b", ml_dtypes.bfloat16), ("t", ml_dtypes.bfloat16)):
        listing = tuple(Prompt(p, str(p), None, positions) for p in range(prompts))
        tokens = tuple(PromptTokens(p, (p, *range(positions))) for p in range(prompts))
        start = RunManifest(
            0, run, "target", "import", "synthetic", str(np.dtype(dtype)), "cpu", 1, "running",
            "2026-01-01T00:00:00+00:00", {}, listing, tokens,
        )  # fmt: skip
        manifest = trace.begin_run(start)
        with RunWriter(trace.run_folder(run), run, manifest=manifest.to_json) as writer:
            for prompt in range(prompts):
                for site in range(sites):
                    generator = np.random.default_rng([prompt, site])
                    exact = generator.standard_normal((1, positions, width), dtype=np.float32)
                    noise = np.random.default_rng([prompt, site, len(run), ord(run)]).standard_normal(width, np.float32)
                    values = exact if run == "r" else (exact + 2e-3 * noise).astype(dtype)
                    name = f"layers.{site}.mlp"
                    key = TensorKey(prompt, "prefill", 0, 0, site, name, "output", "", "b s h", 0, positions)
                    writer.put(key, Values(values))
                    total += values.nbytes
        trace.finish_run(replace(manifest, status="complete"))
    return total


def peak_of_compare(path: Path) -> int:
    """Peak resident memory of a process that compares the runs of a trace, in bytes."""
    done = subprocess.run([sys.executable, "-c", CHILD, str(path)], capture_output=True, text=True, check=True)
    return int(done.stdout)


def main() -> None:
    """Print the table; exit with 1 when memory grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=16)
    parser.add_argument("--positions", type=int, default=1024)
    parser.add_argument("--width", type=int, default=2048)
    arguments = parser.parse_args()
    cases = {"one": (1, 1), "ten times the positions": (1, 10), "ten times the prompts": (10, 1)}
    print(f"{'trace':28}{'values':>10}{'peak RSS':>12}{'ratio':>8}")
    first = 0
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for name, (prompts, times) in cases.items():
            path = Path(folder) / name.replace(" ", "-")
            size = make_trace(path, arguments.sites, prompts, arguments.positions * times, arguments.width)
            peak = peak_of_compare(path)
            first = first or peak
            worst = max(worst, peak / first)
            print(f"{name:28}{size / 1e6:>7.0f} MB{peak / 1e6:>9.0f} MB{peak / first:>8.2f}", flush=True)
    print(f"largest ratio {worst:.2f}, limit {LIMIT}: {'ok' if worst <= LIMIT else 'MISSED'}")
    sys.exit(worst > LIMIT)


if __name__ == "__main__":
    main()
