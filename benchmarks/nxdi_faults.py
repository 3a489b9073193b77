"""Bugs planted in NxD Inference's llama on a CPU: is each found, and at the right site?

A checkpoint or a class of the port is changed, captured in FP32 and BF16 on one and two ranks, and compared with
transformers as `nxdi_models.py` does. Needs the sources (NXDI_SRC, NXD_SRC); without them, one line says so.

    python benchmarks/nxdi_faults.py [--seed N] [--keep FOLDER]

One line per planted fault: the site that the comparison names first, and whether it is the planted one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from nxdi_models import SIZES, pairs_of, port_and_compare, port_of, references, run_tables, save_checkpoint
from safetensors.torch import load_file, save_file
from tensorsleuth.cli.compare import first_divergence
from tensorsleuth.store import Trace

LAYER = 1


@dataclass(frozen=True)
class Fault:
    """A planted bug.

    Attributes:
        site: the site of the reference that has to be named first.
        weights: changes the checkpoint.
        code: body of the port's model class; empty for the library's own.
        ranks: numbers of ranks on which it exists.
        below_bf16: its effect is smaller than the rounding of BF16, so that only FP32 can show it.
    """

    site: str
    weights: Callable[[dict[str, torch.Tensor]], None] | None = None
    code: str = ""
    ranks: tuple[int, ...] = (1, 2)
    below_bf16: bool = False


def _scale_o_proj(weights: dict[str, torch.Tensor]) -> None:
    weights[f"model.layers.{LAYER}.self_attn.o_proj.weight"] *= 1.01


def _swap_kv_heads(weights: dict[str, torch.Tensor]) -> None:
    heads, size = SIZES["num_key_value_heads"], SIZES["hidden_size"] // SIZES["num_attention_heads"]
    order = [1, 0, *range(2, heads)]
    for name in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
        key = f"model.layers.{LAYER}.self_attn.{name}"
        by_head = weights[key].reshape(heads, size, *weights[key].shape[1:])
        weights[key] = by_head[order].reshape(weights[key].shape).contiguous()


_EPSILON = """
    def init_model(self, config):
        super().init_model(config)
        self.layers[{layer}].input_layernorm.variance_epsilon *= 100
"""
#: Every rank loads what rank 0 was given of one weight, or of all.
_SHARD = """
    def load_state_dict(self, state, strict=True, assign=False):
        for name in sorted(state):
            if {condition}:
                weight = state[name].contiguous().clone()
                torch.distributed.broadcast(weight, 0)
                state[name] = weight
        return super().load_state_dict(state, strict=strict, assign=assign)
"""
FAULTS = {
    "o_proj x 1.01": Fault(f"model.layers.{LAYER}.self_attn.o_proj", weights=_scale_o_proj),
    "norm epsilon x 100, 1st": Fault("model.layers.0.input_layernorm", code=_EPSILON.format(layer=0)),
    "norm epsilon x 100, 2nd": Fault(
        f"model.layers.{LAYER}.input_layernorm", code=_EPSILON.format(layer=LAYER), below_bf16=True
    ),
    "KV heads 0, 1 swapped": Fault(f"model.layers.{LAYER}.self_attn.k_proj", weights=_swap_kv_heads),
    "rank 0's up_proj": Fault(
        f"model.layers.{LAYER}.mlp.up_proj",
        code=_SHARD.format(condition=f'name == "layers.{LAYER}.mlp.up_proj.weight"'),
        ranks=(2,),
    ),
    "rank 0's layer": Fault(
        f"model.layers.{LAYER}.self_attn.q_proj",
        code=_SHARD.format(condition=f'name.startswith("layers.{LAYER}.") and "rank" not in name'),
        ranks=(2,),
    ),
}
_PORT = """
import torch
from neuronx_distributed_inference.models.llama.modeling_llama import NeuronLlamaForCausalLM, NeuronLlamaModel


class BrokenModel(NeuronLlamaModel):
{code}

class Broken(NeuronLlamaForCausalLM):
    _model_cls = BrokenModel
"""
FAULT_HEADER = (
    f"{'fault':24} {'dtype':9} {'tp':>2} {'verdict':8} {'first failing site':36} {'phase':8} {'R or L2':>9}  as planted"
)


def fault_lines(folder: Path, seed: int) -> bool:
    """Print the second table; returns whether every fault is found where it was planted."""
    model = save_checkpoint("llama", folder / "faults-model", seed)
    trace = references(folder / "faults", model, seed)
    right = True
    for number, (name, fault) in enumerate(FAULTS.items()):
        broken, port = model, port_of("llama", folder)
        if fault.weights is not None:
            broken = _changed(model, fault.weights, folder / f"faults-model-{number}")
        if fault.code:
            file = folder / f"broken_port_{number}.py"
            file.write_text(_PORT.format(code=fault.code))
            port = f"{file}:Broken"
        for dtype in ("float32", "bfloat16"):
            for tp in fault.ranks:
                right &= _fault_line(trace, name, fault, broken, port, dtype, tp, f"{number}-{dtype}-tp{tp}")
    return right


def _fault_line(trace: Trace, name: str, fault: Fault, model: Path, port: str, dtype: str, tp: int, run: str) -> bool:
    summary = port_and_compare(trace, run, model, port, dtype, tp)
    first = first_divergence(trace, run)
    found = first is not None and first["site"] == fault.site
    answer = "yes" if found else f"NO, {fault.site}"
    if fault.below_bf16 and dtype == "bfloat16" and first is None:
        found, answer = True, "below the rounding"
    site, phase, size = "-", "-", float("nan")
    if first is not None:
        site, phase, size = first["site"], first["phase"], first["r_ratio"]
        if dtype == "float32":
            size = pairs_of(trace, run)[site, first["target_site"]]
    print(
        f"{name:24} {dtype:9} {tp:2} {summary.verdict:8} {site:36} {phase:8} {size:9.2e}  {answer}",
        flush=True,
    )
    for reason in summary.reasons:
        print(f"    {reason}", flush=True)
    return found


def _changed(model: Path, change: Callable[[dict[str, torch.Tensor]], None], folder: Path) -> Path:
    """A copy of a checkpoint with changed weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(json.loads((model / "config.json").read_text())))
    weights = load_file(model / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _faults(folder: Path, arguments: argparse.Namespace) -> list[bool]:
    print(FAULT_HEADER, flush=True)
    return [fault_lines(folder, arguments.seed)]


if __name__ == "__main__":
    run_tables(
        argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter), _faults
    )
