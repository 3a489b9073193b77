"""Every bug of the demo's stand-in, planted and searched for: the site and the cause named first.

The FP32 reference and the BF16 baseline are captured once; each fault is captured and compared as `sleuth demo --fault`
does it, and the clean port as `sleuth demo` does.

    python benchmarks/demo_faults.py [--fault NAME ...]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from fnmatch import fnmatchcase
from pathlib import Path

from tensorsleuth.analyze.diagnosis import diagnose
from tensorsleuth.capture.hf import quiet_transformers
from tensorsleuth.cli.compare import first_divergence
from tensorsleuth.examples.faults import FAULTS
from tensorsleuth.examples.walkthrough import capture_references, capture_target, compare_target
from tensorsleuth.store import Trace


def clean(trace: Trace) -> bool:
    """Print the line of the correct port; returns whether it passes with every R between 0.8 and 1.2."""
    capture_target(trace, run="clean")
    summary = compare_target(trace, run="clean")
    pooled = "FROM measurements WHERE prompt IS NULL AND comparison = 'clean'"
    row = trace.query(f"SELECT min(r_ratio) AS low, max(r_ratio) AS high {pooled}").to_pylist()[0]
    print(
        f"{'(none)':22}{summary.verdict:8} R from {row['low']:.3f} to {row['high']:.3f} over {summary.n_matched} sites"
    )
    return summary.verdict == "pass" and row["low"] >= 0.8 and row["high"] <= 1.2


def planted(trace: Trace, name: str) -> bool:
    """Print the line of one fault; returns whether the site named first is the planted one."""
    fault = FAULTS[name]
    capture_target(trace, fault=name, run=name)
    summary = compare_target(trace, run=name)
    first = first_divergence(trace, name)
    if first is None:
        print(f"{name:22}{summary.verdict:8} nothing found")
        return False
    before = trace.query(
        """SELECT max(r_ratio) AS r FROM measurements WHERE comparison = ? AND prompt IS NULL
           AND verdict = 'pass' AND phase = ? AND exec_order < ?""",
        [name, first["phase"], first["exec_order"]],
    ).to_pylist()[0]["r"]
    found = first["target_site"].partition("[")[0]
    right = fnmatchcase(found, fault.site) and first["phase"] == fault.phase and summary.verdict == "fail"
    findings = diagnose(trace, name)
    cause = f"{findings[0].cause} {findings[0].confidence:.2f}" if findings else "nothing to diagnose"
    context = f"before it at most {before:.3f}" if before else "nothing before it"
    print(
        f"{name:22}{summary.verdict:8} {first['target_site']:40}{first['phase']:9}R {first['r_ratio']:9.3g}  "
        f"{context:26}{cause:28}{'ok' if right else 'WRONG: ' + fault.site}",
        flush=True,
    )
    return right


def main() -> None:
    """Print the table; exit with 1 when a line is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fault", action="append", choices=list(FAULTS))
    arguments = parser.parse_args()
    quiet_transformers()
    with tempfile.TemporaryDirectory() as folder:
        trace = Trace.create(Path(folder) / "trace")
        capture_references(trace)
        right = [clean(trace), *(planted(trace, name) for name in arguments.fault or FAULTS)]
    print(f"{sum(right)} of {len(right)} as expected")
    sys.exit(not all(right))


if __name__ == "__main__":
    main()
