"""Kill captures at random moments and count what is lost: nothing that was acknowledged may be.

A child process captures run after run with small shards and a small queue. After every few forward passes it flushes
and prints how many tensors of which run are acknowledged, with a digest of all their bytes. The parent kills it
with SIGKILL, repairs the trace, verifies it, and compares every stored tensor with what its number says it must hold.

    python benchmarks/crash.py [50] [--folder DIR] [--seed 0]
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import xxhash
from tensorsleuth.capture.recorder import record
from tensorsleuth.store import Trace, repair, verify

SHARD_BYTES = 60_000
QUEUE_BYTES = 20_000
TENSORS_PER_FORWARD = 7
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.float8_e5m2, torch.uint8)


def content(run: int, number: int) -> torch.Tensor:
    """The tensor of that number of a run; every third repeats an earlier one, so that aliases occur."""
    if number % 3 == 2:
        number = number // 2
    generator = torch.Generator().manual_seed(run * 1_000_003 + number)
    dtype = DTYPES[number % len(DTYPES)]
    size = (number * 37) % 900
    raw = torch.randint(0, 256, (size * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype)


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


class Source(torch.nn.Module):
    """Emits the next tensors through a leaf module, and overwrites each right afterwards."""

    def __init__(self, run: int) -> None:
        super().__init__()
        self.leaf = torch.nn.Identity()
        self.run, self.number = run, 0
        self.digest = xxhash.xxh3_128()

    def forward(self) -> None:
        for _ in range(TENSORS_PER_FORWARD):
            tensor = content(self.run, self.number)
            self.digest.update(raw_bytes(tensor))
            self.leaf(tensor)
            tensor.zero_()
            self.number += 1


def capture_until_killed(folder: str, acknowledged: Connection, seed: int) -> None:
    """Body of the child process."""
    torch.set_num_threads(1)
    choose = random.Random(seed)
    trace = Trace.create(folder)
    acknowledged.send(None)
    for run in range(10_000):
        model = Source(run)
        with (
            torch.no_grad(),
            record(
                trace, model, run=f"run{run}", role="reference", shard_bytes=SHARD_BYTES, queue_bytes=QUEUE_BYTES
            ) as recorder,
        ):
            for _ in range(choose.randint(1, 60)):
                model()
                if choose.random() < 0.5:
                    recorder.flush()
                    acknowledged.send((run, model.number, model.digest.hexdigest()))
        acknowledged.send((run, model.number, model.digest.hexdigest()))


@dataclass
class Outcome:
    """Counts over all kills."""

    acknowledged: int = 0
    stored: int = 0
    lost: int = 0
    wrong: int = 0
    salvaged_shards: int = 0
    problems: int = 0


def kill_once(folder: Path, seed: int, outcome: Outcome) -> None:
    """Start a child, kill it, repair, verify and compare."""
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=capture_until_killed, args=(str(folder), sender, seed), daemon=True)
    child.start()
    sender.close()
    receiver.recv()
    time.sleep(random.Random(seed).uniform(0.0, 0.8))
    child.kill()
    child.join()
    acknowledged: dict[int, tuple[int, str]] = {}
    try:
        while True:
            run, number, digest = receiver.recv()
            acknowledged[run] = number, digest
    except (EOFError, OSError):
        pass  # the end of the pipe, perhaps in the middle of a message that was never acknowledged
    trace = Trace.open(folder)
    outcome.salvaged_shards += sum(salvage.n_salvaged > 0 for salvage in repair(trace))
    problems = verify(trace).problems
    for problem in problems:
        print(f"seed {seed}: {problem}")
    outcome.problems += len(problems)
    compare(trace, acknowledged, outcome)


def compare(trace: Trace, acknowledged: dict[int, tuple[int, str]], outcome: Outcome) -> None:
    """Every stored tensor is the one its number says, and every acknowledged one is stored."""
    for run, (number, digest) in acknowledged.items():
        rows = {} if f"run{run}" not in trace.run_names() else stored_rows(trace, f"run{run}")
        found = xxhash.xxh3_128()
        for seq in range(number):
            outcome.acknowledged += 1
            if seq in rows:
                found.update(values_of(trace, rows[seq]))
            else:
                outcome.lost += 1
        outcome.wrong += found.hexdigest() != digest and all(seq in rows for seq in range(number))
    for name in trace.run_names():
        for seq, row in stored_rows(trace, name).items():
            outcome.stored += 1
            outcome.wrong += values_of(trace, row) != raw_bytes(content(int(name[3:]), seq))


def stored_rows(trace: Trace, run: str) -> dict[int, dict[str, Any]]:
    rows = trace.query(
        "SELECT seq, path, t.dtype, shape, file_offset, nbytes FROM tensors t JOIN shards USING (run, shard)"
        " WHERE run = ?",
        [run],
    )
    return {row["seq"]: row for row in rows.to_pylist()}


def values_of(trace: Trace, row: dict[str, Any]) -> bytes:
    return trace.values(row["path"], row["dtype"], tuple(row["shape"]), row["file_offset"], row["nbytes"]).tobytes()


def main() -> None:
    """Kill as often as asked; exit 1 if anything was lost, wrong or could not be verified."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int, nargs="?", default=50)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to write")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    multiprocessing.set_forkserver_preload(["tensorsleuth.capture.recorder", "tensorsleuth.store.statistics"])
    outcome = Outcome()
    clean = 0
    for number in range(arguments.kills):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            before = outcome.problems + outcome.lost + outcome.wrong
            kill_once(Path(folder) / "trace", arguments.seed + number, outcome)
            clean += outcome.problems + outcome.lost + outcome.wrong == before
    print(
        f"{arguments.kills} kills: {clean} repaired and verified ({outcome.salvaged_shards} open shards salvaged), "
        f"{outcome.acknowledged} acknowledged tensors, {outcome.stored} stored tensors bit-identical, "
        f"{outcome.lost} lost, {outcome.wrong} wrong"
    )
    raise SystemExit(0 if clean == arguments.kills else 1)


if __name__ == "__main__":
    main()
