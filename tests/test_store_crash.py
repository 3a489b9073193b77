"""A capture that is killed at a random moment loses nothing it had acknowledged."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "crash.py"


def test_killed_captures_lose_no_acknowledged_tensor(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARK), "5", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(
        r"5 kills: 5 repaired and verified \(\d+ open shards salvaged\), \d+ acknowledged tensors, "
        r"\d+ stored tensors bit-identical, 0 lost, 0 wrong\n",
        done.stdout,
    )
