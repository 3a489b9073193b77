"""What answers cost: the whole analysis of a trace against capturing its three runs.

A Llama-like model (134M parameters, random initialisation) is captured in FP32, in BF16 and as a target with another
RoPE base, four prompts of 512 tokens and eight decode steps each, inputs and outputs of all modules. Then `compare`,
`logits`, `localize` and `diagnose` run on the trace. Every step is the command that a user types, in a process of
its own, importing torch (or not) included.

    python benchmarks/chain.py [--tokens 512] [--outputs-only] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from capture import CONFIG, N_PROMPTS

#: Largest accepted time of the analysis, as a multiple of the time that the three captures took.
LIMIT = 1.0
DECODE_STEPS = 8
ANALYSIS = ("compare", "logits", "localize", "diagnose")


def write_models(folder: Path, tokens: int) -> None:
    """Two configurations, which differ in the RoPE base alone, and the prompts."""
    common = {**CONFIG, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    common |= {"max_position_embeddings": tokens + 2 * DECODE_STEPS, "eos_token_id": None}
    for name, base in (("model", 10_000.0), ("port", 500_000.0)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({**common, "rope_theta": base}))
    with (folder / "prompts.jsonl").open("w") as file:
        for prompt in range(N_PROMPTS):
            ids = [(7919 * (prompt * tokens + at) + 13 * at * at) % CONFIG["vocab_size"] for at in range(tokens)]
            file.write(json.dumps({"id": str(prompt), "token_ids": ids}) + "\n")


def seconds_of(*arguments: str) -> float:
    """Run one command of `sleuth`; a verdict that fails is no error."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "tensorsleuth", *arguments], capture_output=True, text=True)
    if done.returncode not in (0, 1, 3):
        raise SystemExit(f"sleuth {' '.join(arguments)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return time.perf_counter() - started


def captures(folder: Path, io: str) -> dict[str, float]:
    """Capture the three runs; seconds of each."""
    trace, seconds = str(folder / "trace"), {}
    for run, role, model, dtype in (
        ("ref", "reference", "model", "float32"),
        ("base", "baseline", "model", "bfloat16"),
        ("port", "target", "port", "bfloat16"),
    ):
        first = ("--prompts", str(folder / "prompts.jsonl"), "--generate", str(DECODE_STEPS + 1))
        fed = first if run == "ref" else ("--teacher", "ref")
        how = ("--io", io, "--random-init", "0", "--dtype", dtype)
        head = ("capture", "hf", trace, str(folder / model), "--run", run, "--role", role)
        seconds[f"capture {run}"] = seconds_of(*head, *fed, *how)
    return seconds


def analysis(folder: Path) -> dict[str, float]:
    """Everything that is asked of the trace; seconds of each command."""
    trace = str(folder / "trace")
    runs = ("--reference", "ref", "--baseline", "base", "--target", "port", "--name", "c")
    return {name: seconds_of(name, trace, *(runs if name == "compare" else ("c",))) for name in ANALYSIS}


def main() -> None:
    """Print seconds of every command and the ratio; exit 1 if the limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512, help="per prompt")
    parser.add_argument("--outputs-only", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to write")
    arguments = parser.parse_args()
    print(f"load average before: {os.getloadavg()[0]:.2f}; writing to {arguments.folder}")
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        write_models(folder, arguments.tokens)
        captured = captures(folder, "output" if arguments.outputs_only else "both")
        asked = analysis(folder)
    finally:
        shutil.rmtree(folder)
    for name, seconds in (captured | asked).items():
        print(f"{name:14}{seconds:8.1f} s")
    ratio = sum(asked.values()) / sum(captured.values())
    print(
        f"analysis {sum(asked.values()):.1f} s, captures {sum(captured.values()):.1f} s: "
        f"{ratio:.2f}x, limit {LIMIT:.1f}x{'' if ratio <= LIMIT else '  EXCEEDED'}"
    )
    raise SystemExit(0 if ratio <= LIMIT else 1)


if __name__ == "__main__":
    main()
