"""Models of NxD Inference on a CPU against transformers: are all sites matched, and rightly?

Small random checkpoints (norms away from 1, biases away from 0) are captured from transformers in FP32 and BF16, and
from NxD Inference in FP32 and BF16 on one and two ranks: prefill and eight teacher-forced decode steps of twelve
prompts. Needs the sources (NXDI_SRC, NXD_SRC); without them, one line says so.

    python benchmarks/nxdi_models.py [--model NAME ...] [--seed N] [--keep FOLDER]

Two replicates of the baseline (summation and nudge) show how clean BF16 runs scatter.

The table has one line per model, dtype and number of ranks. `share` is the part of the reference's sites that is
matched, `fits` the same without those that are skipped because the target has no such thing. Experts that are modules
of their own are compared by token with the target's fused ones. `flips` counts tokens, over all layers, that a router
sends to other experts than in FP32: the baseline's, then the target's; one flip can outweigh all rounding. `wrong`
counts pairs whose relative L2 is above 1e-3
in FP32 (a BF16 run is held against the FP32 run on as many ranks: a pair that is wrong there, or not there, is wrong).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tensorsleuth.analyze.compare import ComparisonRequest, ComparisonSummary, compare
from tensorsleuth.analyze.verdict import Thresholds
from tensorsleuth.capture.generate import Generation
from tensorsleuth.capture.hf import ModelSource, quiet_transformers
from tensorsleuth.capture.hf_run import HuggingFaceCapture, capture_hugging_face
from tensorsleuth.capture.nxdi.run import NxdiCapture, capture_on_cpu
from tensorsleuth.capture.prompts import PromptInput
from tensorsleuth.capture.replicate import Replicate
from tensorsleuth.porting.environment import find_environment, require_sources
from tensorsleuth.store import InputError, SleuthError, Trace
from tensorsleuth.store.dims import by_position

N_DECODE = 8
BATCH = 6
TOLERANCE = 1e-5
WRONG = 1e-3
MATCHED = 0.95
REPLICATES = ("summation", "nudge")
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
QWEN_EXPERTS = {
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
OSS_EXPERTS = {
    "head_dim": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 128,
    "initial_context_length": 4096,
}
#: Configuration class of transformers, its arguments beyond SIZES, and the class of NxD Inference.
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("LlamaConfig", {"attention_bias": True}, "NeuronLlamaForCausalLM"),
    "qwen2": ("Qwen2Config", {}, "NeuronQwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", {"head_dim": 32}, "NeuronQwen3ForCausalLM"),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}, "NeuronMixtralForCausalLM"),
    "qwen3_moe": ("Qwen3MoeConfig", QWEN_EXPERTS, "NeuronQwen3MoeForCausalLM"),
    "gpt_oss": ("GptOssConfig", OSS_EXPERTS, "NeuronGptOssForCausalLM"),
}
#: The library converts packed FP4 experts only; the checkpoints here hold plain ones.
_GPT_OSS = """
from neuronx_distributed_inference.models.gpt_oss import modeling_gpt_oss as library


class Port(library.NeuronGptOssForCausalLM):
    @staticmethod
    def convert_hf_to_neuron_state_dict(state, config):
        for layer in range(config.num_hidden_layers):
            attention, experts = f"layers.{layer}.self_attn", f"layers.{layer}.mlp.experts"
            moe = f"layers.{layer}.feed_forward.moe"
            for norm in ("input_layernorm", "post_attention_layernorm"):
                state[f"layers.{layer}.{norm}.weight_unpadded"] = state[f"layers.{layer}.{norm}.weight"].clone()
            state[f"{attention}.learned_sinks.sink"] = state.pop(f"{attention}.sinks")
            state[f"{attention}.rank_util.rank"] = library.torch.arange(config.neuron_config.tp_degree)
            for kind in ("weight", "bias"):
                state[f"{moe}.router.linear_router.{kind}"] = state.pop(f"layers.{layer}.mlp.router.{kind}")
            mlp_op = f"{moe}.expert_mlps.mlp_op"
            gate_up = state.pop(f"{experts}.gate_up_proj").transpose(1, 2)
            state[f"{mlp_op}.gate_up_proj.weight"] = library.convert_gate_up_proj(gate_up)
            bias = state.pop(f"{experts}.gate_up_proj_bias")
            state[f"{mlp_op}.gate_up_proj.bias"] = library.convert_gate_up_proj(bias, is_bias=True)
            state[f"{mlp_op}.down_proj.weight"] = state.pop(f"{experts}.down_proj")
            state[f"{mlp_op}.down_proj.bias"] = state.pop(f"{experts}.down_proj_bias")
        state["norm.weight_unpadded"] = state["norm.weight"].clone()
        state["rank_util.rank"] = library.torch.arange(config.neuron_config.tp_degree)
        return state
"""


def prompts(seed: int) -> list[PromptInput]:
    """Twelve prompts of 3 to 14 random tokens."""
    rng = np.random.default_rng(seed)
    return [
        PromptInput(str(n), token_ids=tuple(int(token) for token in rng.integers(2, SIZES["vocab_size"], 3 + n)))
        for n in range(12)
    ]


def save_checkpoint(name: str, folder: Path, seed: int) -> Path:
    """A random model whose norms are not 1 and whose biases are not 0."""
    config_class, extra, _ = MODELS[name]
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**{**SIZES, **extra})
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            is_norm, is_bias = "norm" in parameter_name, parameter_name.endswith("bias")
            centre, width = (1.0, 0.3) if is_norm else (0.0, 0.3 if is_bias else 0.1)
            parameter.copy_(centre + width * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return folder


def port_of(name: str, folder: Path) -> str:
    """The library's class as MODULE:CLASS, or that of a port file written into the folder."""
    if name == "gpt_oss":
        file = folder / "port_of_gpt_oss.py"
        file.write_text(_GPT_OSS)
        return f"{file}:Port"
    return f"neuronx_distributed_inference.models.{name}.modeling_{name}:{MODELS[name][2]}"


def references(folder: Path, model: Path, seed: int) -> Trace:
    """A trace with the FP32 reference and the BF16 baseline."""
    trace = Trace.create(folder)
    source, generation = ModelSource(model), Generation(new_tokens=N_DECODE + 1, batch_size=BATCH)
    capture_hugging_face(
        trace, HuggingFaceCapture(source, "fp32", "reference", prompts=prompts(seed), generation=generation)
    )
    generation = Generation(batch_size=BATCH)
    capture_hugging_face(
        trace, HuggingFaceCapture(source, "bf16", "baseline", "bfloat16", teacher="fp32", generation=generation)
    )
    return trace


def replicates(trace: Trace, model: Path) -> tuple[str, ...]:
    """Runs that show how the baseline scatters."""
    for kind in REPLICATES:
        capture_hugging_face(
            trace,
            HuggingFaceCapture(
                ModelSource(model), kind, "baseline", "bfloat16", teacher="fp32",
                generation=Generation(batch_size=BATCH), replicate=Replicate(kind),
            ),
        )  # fmt: skip
    return REPLICATES


#: Eager attention returns its weights as well.
_RETURNED_BY_ATTENTION = "SELECT DISTINCT slot FROM tensors WHERE run = 'fp32' AND module LIKE '%.self_attn'"


def port_and_compare(
    trace: Trace, run: str, model: Path, port: str, dtype: str, tp: int, clean: tuple[str, ...] = ()
) -> ComparisonSummary:
    """Capture a port and compare it: in FP32 by relative L2, in BF16 against the baseline and its replicates."""
    eager = any(row["slot"] == "1" for row in trace.query(_RETURNED_BY_ATTENTION).to_pylist())
    batches = Generation(batch_size=BATCH)
    request = NxdiCapture(
        model, port, run, "target", dtype=dtype, tp=tp, teacher="fp32", generation=batches, scores=eager
    )
    capture_on_cpu(trace, request)
    if dtype == "float32":
        return compare(trace, ComparisonRequest("fp32", run, thresholds=Thresholds(relative_l2=TOLERANCE)))
    return compare(trace, ComparisonRequest("fp32", run, "bf16", replicates=clean))


def pairs_of(trace: Trace, run: str) -> dict[tuple[str, str], float]:
    """Relative L2 of every compared pair, the larger of its phases."""
    rows = trace.query(
        """SELECT site, target_site, max(coalesce(relative_l2, 0)) AS error FROM measurements
           WHERE comparison = ? AND prompt IS NULL GROUP BY ALL""",
        [run],
    ).to_pylist()
    return {(row["site"], row["target_site"]): row["error"] for row in rows}


#: Router logits (of gpt_oss: scores) by model: module of transformers, element of its output, module of NxD Inference.
ROUTERS = {
    "mixtral": ("block_sparse_moe.gate", "", "mlp.router.linear_router"),
    "qwen3_moe": ("mlp.gate", "", "mlp.router.linear_router"),
    "gpt_oss": ("mlp.router", "0", "feed_forward.moe.router.linear_router"),
}


def flips(trace: Trace, run: str) -> str:
    """Tokens that are sent to other experts than in FP32: baseline/target."""
    name = Path(trace.manifest(run).model).name.removesuffix("-model")
    if name not in ROUTERS:
        return "-"
    theirs, slot, ours = ROUTERS[name]
    counts = {"bf16": 0, run: 0}
    for layer in range(SIZES["num_hidden_layers"]):
        expected = _chosen(trace, "fp32", f"model.layers.{layer}.{theirs}", slot)
        for other in counts:
            is_theirs = other == "bf16"
            path = f"model.layers.{layer}.{theirs}" if is_theirs else f"layers.{layer}.{ours}"
            found = _chosen(trace, other, path, slot if is_theirs else "")
            counts[other] += sum(found[place] != experts for place, experts in expected.items())
    return f"{counts['bf16']}/{counts[run]}" if trace.manifest(run).dtype == "bfloat16" else str(counts[run])


def _chosen(trace: Trace, run: str, module: str, slot: str) -> dict[tuple[int, int], frozenset[int]]:
    """The two experts with the largest logits by prompt and position."""
    rows = trace.query(
        """SELECT t.*, s.path FROM tensors t JOIN shards s USING (run, rank, shard)
           WHERE run = ? AND module = ? AND port = 'output' AND slot = ? AND rank = 0""",
        [run, module, slot],
    ).to_pylist()
    chosen = {}
    for row in rows:
        stored = trace.values(*(row[column] for column in ("path", "dtype", "shape", "file_offset", "nbytes")))
        for offset, logits in enumerate(by_position(stored.astype(np.float64), row["dims"])):
            experts = np.argsort(logits.ravel())[-2:]
            chosen[row["prompt"], row["position_start"] + offset] = frozenset(experts.tolist())
    return chosen


HEADER = (
    f"{'model':10} {'dtype':9} {'tp':>2} {'matched':>7} {'unm.':>5} {'skip':>5} {'share':>7} {'fits':>7} "
    f"{'worst L2':>9} {'R':>15} {'flips':>7} {'verdict':10} {'wrong':>5}"
)


def clean_lines(name: str, folder: Path, seed: int) -> bool:
    """Print a model's lines of the first table; returns whether all of them are as they should be."""
    model = save_checkpoint(name, folder / f"{name}-model", seed)
    trace = references(folder / name, model, seed)
    clean = replicates(trace, model)
    right = True
    in_fp32: dict[int, dict[tuple[str, str], float]] = {}
    for dtype in ("float32", "bfloat16"):
        for tp in (1, 2):
            run = f"{dtype}-tp{tp}"
            try:
                summary = port_and_compare(trace, run, model, port_of(name, folder), dtype, tp, clean)
            except SleuthError as error:
                print(f"{name:10} {dtype:9} {tp:2} does not run: {error}", flush=True)
                right = False
                continue
            found = pairs_of(trace, run)
            in_fp32.setdefault(tp, found)
            wrong = [pair for pair in found if in_fp32[tp].get(pair, np.inf) > WRONG]
            row = trace.query(
                """SELECT max(relative_l2) AS worst,
                          min(r_ratio) FILTER (prompt IS NULL AND state = 'measured') AS low,
                          max(r_ratio) FILTER (prompt IS NULL AND state = 'measured') AS high
                   FROM measurements WHERE comparison = ?""",
                [run],
            ).to_pylist()[0]
            share = summary.n_matched / (summary.n_matched + summary.n_unmatched + summary.n_skipped)
            fits = summary.n_matched / (summary.n_matched + summary.n_unmatched)
            band = "-" if dtype == "float32" else f"{row['low']:.3f}..{row['high']:.3f}"
            print(
                f"{name:10} {dtype:9} {tp:2} {summary.n_matched:7} {summary.n_unmatched:5} {summary.n_skipped:5} "
                f"{share:7.1%} {fits:7.1%} {row['worst']:9.1e} {band:>15} {flips(trace, run):>7} "
                f"{summary.verdict:10} {len(wrong):5}",
                flush=True,
            )
            _explain(trace, run, summary, wrong)
            good_error = dtype != "float32" or row["worst"] < TOLERANCE
            right &= fits >= MATCHED and share >= MATCHED and not wrong and good_error and summary.verdict == "pass"
    return right


def _explain(trace: Trace, run: str, summary: ComparisonSummary, wrong: list[tuple[str, str]]) -> None:
    """Say on stderr why a line is not as it should be."""
    for reason in summary.reasons:
        print(f"    {reason}", file=sys.stderr)
    for site, target in wrong:
        print(f"    wrong pair: {site} = {target}", file=sys.stderr)
    holes = trace.query(
        """SELECT status, count(*) AS n, min(site) AS site, regexp_replace(reason, '[0-9]+', 'N', 'g') AS why
           FROM coverage WHERE comparison = ? AND status <> 'matched' GROUP BY status, why""",
        [run],
    ).to_pylist()
    for hole in holes:
        print(f"    {hole['status']}: {hole['n']} like {hole['site']}: {hole['why']}", file=sys.stderr)
    failing = trace.query(
        """SELECT site, target_site, phase, verdict, relative_l2, relative_l2_baseline, r_ratio, r_low, state
           FROM measurements WHERE comparison = ? AND prompt IS NULL AND verdict <> 'pass' ORDER BY exec_order""",
        [run],
    ).to_pylist()
    for row in failing[:20]:
        print(f"    {row}", file=sys.stderr)


def run_tables(parser: argparse.ArgumentParser, table: Callable[[Path, argparse.Namespace], list[bool]]) -> None:
    """Parse the command line and print a table; exit code 1 if a part is not as it should be.

    Without the sources of NxD Inference, one line says that the table is skipped.
    """
    parser.add_argument("--seed", type=int, default=0, help="of weights and prompts")
    parser.add_argument("--keep", type=Path, help="folder for checkpoints and traces; deleted afterwards by default")
    arguments = parser.parse_args()
    try:
        require_sources(find_environment())
    except InputError as error:
        print(f"skipped: {error}")
        return
    quiet_transformers()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="nxdi-models-") as scratch:
        folder = arguments.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        right = table(folder, arguments)
    print(f"{sum(right)} of {len(right)} parts as required")
    sys.exit(not all(right))


def _models(folder: Path, arguments: argparse.Namespace) -> list[bool]:
    print(HEADER, flush=True)
    return [clean_lines(name, folder, arguments.seed) for name in arguments.model or MODELS]


def main() -> None:
    """Print the table of models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=list(MODELS))
    run_tables(parser, _models)


if __name__ == "__main__":
    main()
