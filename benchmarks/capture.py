"""What capturing costs: time beyond the bare forward pass, against the two simplest ways to dump tensors.

Every variant keeps the outputs of all modules of one Llama-like model (134M parameters, random initialisation, four
prompts of 512 tokens, one after the other) and ends with its data synced to the device:

    bare        the forward passes alone
    record      `tensorsleuth` as a user runs it: index, statistics, checksums, catalog, weights fingerprint
    torch.save  a hook that saves each tensor to a file of its own
    raw file    a hook that writes each tensor's bytes to one file
    empty run   `tensorsleuth` without a forward pass: the part of `record` that does not grow with it

The variants alternate within one process and medians are printed, so that a slow minute of the machine hits all
of them. Other load still distorts single ratios: run it on a quiet machine, and more than once. The last column is
the same ratio between the fastest runs, which other load touches least.

    python benchmarks/capture.py [--repeats 5] [--folder DIR] [--dtype float32 --dtype bfloat16]
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tensorsleuth.capture.layout import Row, StepLayout
from tensorsleuth.capture.pending import to_numpy
from tensorsleuth.capture.recorder import record
from tensorsleuth.capture.slots import tensor_slots
from tensorsleuth.store.hdf5_file import sync_folder
from tensorsleuth.store.trace import Trace
from transformers import AutoModelForCausalLM, LlamaConfig

N_PROMPTS = 4
N_TOKENS = 512
N_THREADS = 2
#: Largest accepted time beyond the bare forward, as a multiple of the same time of the named variant.
LIMITS = {"torch.save": 0.45, "raw file": 1.5}
CONFIG = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "vocab_size": 32000,
    "max_position_embeddings": 1024,
}

Model = torch.nn.Module
Variant = Callable[[Model, torch.Tensor, Path], None]


def forward(model: Model, ids: torch.Tensor) -> None:
    for prompt in ids:
        model(input_ids=prompt[None], use_cache=False)


def bare(model: Model, ids: torch.Tensor, folder: Path) -> None:
    forward(model, ids)


def recorded(model: Model, ids: torch.Tensor, folder: Path) -> None:
    trace = Trace.create(folder / "trace")
    with record(trace, model, run="run", role="reference") as recorder:
        for prompt in range(N_PROMPTS):
            with recorder.step(StepLayout("prefill", 0, 1, N_TOKENS, (Row(0, prompt, 0, N_TOKENS, 0),))):
                forward(model, ids[prompt : prompt + 1])


def empty_run(model: Model, ids: torch.Tensor, folder: Path) -> None:
    """What a run costs whatever its size: weights fingerprint, small parameters, manifest, catalog."""
    with record(Trace.create(folder / "trace"), model, run="run", role="reference"):
        pass


@contextmanager
def output_hooks(model: Model, keep: Callable[[torch.Tensor], None]) -> Iterator[None]:
    def hook(module: Model, args: Any, output: Any) -> None:
        for _, tensor in tensor_slots(output):
            keep(tensor)

    handles = [module.register_forward_hook(hook) for module in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def torch_save(model: Model, ids: torch.Tensor, folder: Path) -> None:
    paths: list[Path] = []

    def keep(tensor: torch.Tensor) -> None:
        paths.append(folder / f"{len(paths)}.pt")
        torch.save(tensor, paths[-1])

    with output_hooks(model, keep):
        forward(model, ids)
    for path in paths:
        sync(path)
    sync_folder(folder)


def raw_file(model: Model, ids: torch.Tensor, folder: Path) -> None:
    with (folder / "raw.bin").open("wb", buffering=0) as file:
        with output_hooks(model, lambda tensor: write_all(file, tensor)):
            forward(model, ids)
        os.fsync(file.fileno())
    sync_folder(folder)


def write_all(file: Any, tensor: torch.Tensor) -> None:
    view = memoryview(to_numpy(tensor).reshape(-1).view("uint8"))
    while view:
        view = view[file.write(view) :]


def sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


VARIANTS: dict[str, Variant] = {
    "bare": bare,
    "record": recorded,
    "torch.save": torch_save,
    "raw file": raw_file,
    "empty run": empty_run,
}


def timed(variant: Variant, model: Model, ids: torch.Tensor, parent: Path) -> float:
    folder = Path(tempfile.mkdtemp(dir=parent))
    os.sync()
    started = time.perf_counter()
    variant(model, ids, folder)
    seconds = time.perf_counter() - started
    shutil.rmtree(folder)
    return seconds


def volume(model: Model, ids: torch.Tensor) -> tuple[int, int]:
    sizes: list[int] = []
    with output_hooks(model, lambda tensor: sizes.append(tensor.nbytes)):
        forward(model, ids)
    return len(sizes), sum(sizes)


def measure(dtype: torch.dtype, repeats: int, parent: Path) -> bool:
    """Print one table; returns whether every limit is kept."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**CONFIG), dtype=dtype).eval()
    ids = torch.randint(0, CONFIG["vocab_size"], (N_PROMPTS, N_TOKENS))
    n_tensors, nbytes = volume(model, ids)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for repeat in range(repeats + 1):
        for name, variant in VARIANTS.items():
            took = timed(variant, model, ids, parent)
            if repeat:  # the first round warms caches and compiles the statistics
                seconds[name].append(took)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    extra = {name: median[name] - median["bare"] for name in ("record", "torch.save", "raw file")}
    print(
        f"\n{str(dtype).removeprefix('torch.')}: {n_parameters / 1e6:.0f}M parameters, "
        f"{N_PROMPTS} x {N_TOKENS} tokens, {n_tensors} tensors, {nbytes / 1e6:.0f} MB, {N_THREADS} threads, "
        f"{repeats} repeats"
    )
    print(
        f"{'variant':12}{'median s':>10}{'min s':>8}{'max s':>8}{'beyond bare s':>15}{'record is':>11}{'limit':>7}"
        f"{'by minima':>11}"
    )
    least = {name: min(values) - min(seconds["bare"]) for name, values in seconds.items()}
    kept = True
    for name, values in seconds.items():
        line = f"{name:12}{median[name]:10.3f}{min(values):8.3f}{max(values):8.3f}"
        if name in extra:
            line += f"{extra[name]:15.3f}"
        if name in LIMITS:
            ratio = extra["record"] / extra[name]
            kept &= ratio <= LIMITS[name]
            line += f"{ratio:10.2f}x{LIMITS[name]:6.2f}x{least['record'] / least[name]:10.2f}x"
            line += "" if ratio <= LIMITS[name] else "  EXCEEDED"
        print(line, flush=True)
    return kept


def main() -> None:
    """Measure every dtype asked for; exit 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to write")
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16"])
    arguments = parser.parse_args()
    torch.set_num_threads(N_THREADS)
    print(f"load average before: {os.getloadavg()[0]:.2f}; writing to {arguments.folder}")
    with torch.no_grad(), tempfile.TemporaryDirectory(dir=arguments.folder) as parent:
        kept = [
            measure(getattr(torch, name), arguments.repeats, Path(parent))
            for name in arguments.dtype or ["float32", "bfloat16"]
        ]
    raise SystemExit(0 if all(kept) else 1)


if __name__ == "__main__":
    main()
