"""Plant bugs in five architectures, and see what the analysis makes of them.

    cd benchmarks && python -m faults [--only GLOB ...] [--jobs N] [--outputs-only] [--keep FOLDER] [--json FILE]

A target is named ARCHITECTURE/FAULT/SEVERITY, a correct port ARCHITECTURE/clean/VARIANT; `--only 'llama/*'` picks some.
NxD Inference's own ports are ARCHITECTURE+nxdiRANKS; they run where its sources are (NXDI_SRC, NXD_SRC).
One line per target, then the scores with 95 % intervals, ours and those of the published rules on the same traces.
docs/fault-benchmark.md says what is planted and how it is scored.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tensorsleuth.capture.replicate import KINDS

from . import nxdi_targets
from .bench import Settings
from .running import run_all, targets
from .scoring import CleanOutcome, Outcome, scores


def main() -> None:
    """Run the benchmark; exit with 1 when a wanted figure is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="glob over target names")
    parser.add_argument("--sample", type=int, help="so many targets only, drawn at random (with a fixed seed)")
    parser.add_argument("--seed", type=int, help="of the sample; its size by default")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--prompts", type=int, default=12, help="prompts per target")
    parser.add_argument("--outputs-only", action="store_true", help="record no inputs of modules")
    parser.add_argument(
        "--replicate", action="append", default=[], choices=KINDS, help="capture this replicate for the verdicts"
    )
    parser.add_argument("--keep", type=Path, help="folder that keeps the traces of all targets that were missed")
    parser.add_argument("--json", type=Path, help="file for the results")
    default = Path(tempfile.gettempdir()) / "tensorsleuth-fault-benchmark"
    parser.add_argument("--cache", type=Path, default=default, help="folder of trained checkpoints")
    arguments = parser.parse_args()
    chosen = targets(arguments.only)
    if any(target.ranks for target in chosen) and (reason := nxdi_targets.why_not()):
        print(f"ports of NxD Inference are left out: {reason}")
        chosen = [target for target in chosen if not target.ranks]
    if arguments.sample:
        random.Random(arguments.sample if arguments.seed is None else arguments.seed).shuffle(chosen)
    chosen = chosen[: arguments.sample]
    with tempfile.TemporaryDirectory(prefix="fault-benchmark-") as scratch:
        folder = arguments.keep or Path(scratch)
        settings = Settings(
            arguments.cache,
            folder,
            inputs=not arguments.outputs_only,
            n_prompts=arguments.prompts,
            replicates=tuple(arguments.replicate),
        )

        def after(faults: Sequence[Outcome], clean: Sequence[CleanOutcome]) -> None:
            if arguments.json is not None:
                write_json(arguments.json, faults, clean)

        faults, clean, broken = run_all(chosen, settings, arguments.jobs, keep=arguments.keep is not None, after=after)
    found = scores(faults, clean)
    print("\n".join(score.line() for score in found))
    sys.exit(bool(broken) or any(missed(score.wanted, score.share) for score in found))


def missed(wanted: str, share: float) -> bool:
    """Whether a share is not what is wanted, `>= 97 %` for example; nothing is missed where nothing was counted."""
    if not wanted or share != share:
        return False
    relation, number, _ = wanted.split()
    return share < float(number) / 100 if relation == ">=" else share > float(number) / 100


def write_json(path: Path, faults: Sequence[Outcome], clean: Sequence[CleanOutcome]) -> None:
    """Everything about every target, and the scores."""
    path.write_text(
        json.dumps(
            {
                "scores": [{**dataclasses.asdict(score), "share": score.share} for score in scores(faults, clean)],
                "faults": [dataclasses.asdict(outcome) for outcome in faults],
                "clean": [dataclasses.asdict(outcome) for outcome in clean],
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
