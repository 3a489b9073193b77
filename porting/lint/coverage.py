"""Whether a port's conversion uses every key of a checkpoint once and fills every parameter of its model.

The port's own model is built and its own conversion is run, on the meta device: names and shapes are real, there are no
values, and a checkpoint of any size takes seconds. This runs the port file, and needs the sources of NxD Inference.
"""

from __future__ import annotations

import json
import re
import struct
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...store.errors import InputError
from ..structure.meta import model_on_meta, one_rank, port_classes, port_config
from .provenance import Provenance

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
#: Attributes under which a port of two stacks names their applications.
STACKS = ("_encoder_cls", "_decoder_cls")
#: Buffers that old checkpoints carry and every implementation computes.
_COMPUTED = re.compile(r"(rotary_emb\.inv_freq|\.masked_bias|\.attn(ention)?\.bias|position_ids)$")
#: Parameters that no checkpoint fills: caches, and rank numbers, which the loader counts.
_NOT_LOADED = re.compile(r"(^|\.)(kv_mgr\.|.*rank_util\.rank$|.*spmd_rank(_tkg)?\.rank$|.*local_expert_indices$)")


@dataclass(frozen=True)
class CoverageProblem:
    """One rule broken by a conversion.

    Attributes:
        rule: id of the rule, see `linter`.
        message: what is wrong.
        fix: what to do.
    """

    rule: str
    message: str
    fix: str


def read_index(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint's safetensors files on the meta device: names, shapes and dtypes from their headers.

    Raises:
        InputError: there are none, a file of the index is missing, or a header cannot be read.
    """
    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors"))
    if index.is_file():
        try:
            files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (ValueError, KeyError, AttributeError) as error:
            raise InputError(f"{index} is no safetensors index: {error}") from error
    if not files:
        raise InputError(f"{folder} holds no safetensors files; name the folder of the Hugging Face checkpoint")
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        for name, entry in _header(file).items():
            if name != "__metadata__":
                weights[name] = torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]], device="meta")
    return weights


def _header(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header: dict[str, Any] = json.loads(stream.read(length))
    except (OSError, struct.error, ValueError) as error:
        raise InputError(f"{file} is not a readable safetensors file: {error}") from error
    return header


def check_coverage(port: str, checkpoint: Path, *, config: str = "", tp: int = 1) -> list[CoverageProblem]:
    """Build a port's model and run its conversion, both without values, and compare names and shapes.

    Args:
        port: the causal model class as FILE:CLASS.
        checkpoint: folder of the Hugging Face checkpoint.
        config: its configuration class as FILE:CLASS; the one that the port names by default.
        tp: tensor-parallel degree that the conversion is told.

    Raises:
        InputError: the sources of NxD Inference, the port's class or the checkpoint cannot be read.
    """
    weights = read_index(checkpoint)
    model_class, config_class = port_classes(port, config)
    configuration = port_config(model_class, config_class, checkpoint)
    with one_rank():
        try:
            provenance, parts = Provenance(weights), []
            models = [(part, model_on_meta(part, configuration)) for part in stacks_of(model_class)]
            configuration.neuron_config.tp_degree = tp
            for part, model in models:
                state = _convert(part, configuration, model, checkpoint, weights, provenance)
                parts.append((model.state_dict(), state))
        except InputError:
            raise
        except Exception as error:  # noqa: BLE001 (any failure of the port's code is the finding)
            return [_failure(error)]
    tied = bool(getattr(configuration, "tie_word_embeddings", False))
    return _compare(parts, weights, provenance, tied=tied)


def stacks_of(model_class: Any) -> list[Any]:
    """The classes whose conversions a port has: of encoder and decoder where they are two, else its own."""
    return [getattr(model_class, name) for name in STACKS if hasattr(model_class, name)] or [model_class]


def _failure(error: Exception) -> CoverageProblem:
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if "meta" in text.lower():
        advice = "run 'sleuth port validate' on a CPU: it loads the weights and names those that do not fit"
        return CoverageProblem("conversion-needs-values", f"the conversion needs the weights' values ({text})", advice)
    return CoverageProblem("conversion-fails", text, "correct the conversion, or the model class")


def _convert(
    model_class: Any,
    configuration: Any,
    model: torch.nn.Module,
    checkpoint: Path,
    weights: Mapping[str, torch.Tensor],
    provenance: Provenance,
) -> dict[str, torch.Tensor]:
    """The port's converted checkpoint, with preshard hooks applied; `provenance` learns where tensors come from."""
    from neuronx_distributed.trace import trace
    from neuronx_distributed_inference.models import application_base

    own_loader = application_base.load_state_dict
    application_base.load_state_dict = lambda *_, **__: dict(weights)
    try:
        with provenance, torch.device("meta"):
            state = model_class.get_state_dict(str(checkpoint), configuration)
            trace.invoke_preshard_hook(model, state, "")
    finally:
        application_base.load_state_dict = own_loader
    return {name: weight for name, weight in state.items() if isinstance(weight, torch.Tensor)}


def _compare(
    parts: Sequence[tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]],
    weights: Mapping[str, torch.Tensor],
    provenance: Provenance,
    *,
    tied: bool,
) -> list[CoverageProblem]:
    """Problems of one or two stacks, each given by its parameters and its converted checkpoint."""
    problems, later = [], []
    used: set[str] = set()
    for expected, state in parts:
        missing = [name for name in expected if name not in state and not _NOT_LOADED.search(name)]
        for pattern, names in _grouped(missing).items():
            problems.append(
                CoverageProblem(
                    "unfilled-parameter",
                    f"{pattern} ({_count(names)}) is not in the converted checkpoint",
                    "add it in convert_hf_to_neuron_state_dict; a missing weight is loaded as it was initialised, "
                    "silently",
                )
            )
        filled: defaultdict[str, list[str]] = defaultdict(list)
        for name in expected:
            for key in provenance.sources(state[name]) if name in state else ():
                filled[key].append(name)
        used |= filled.keys()
        later += [*_shapes(expected, state), *_doubled(expected, weights, filled, state, tied=tied)]
    lost = [
        key
        for key in weights
        if key not in used and not _COMPUTED.search(key) and not (tied and key.startswith("lm_head"))
    ]
    for pattern, names in _grouped(lost).items():
        problems.append(
            CoverageProblem(
                "unconsumed-key",
                f"checkpoint key {pattern} ({_count(names)}) fills no parameter of the model",
                "rename it in convert_hf_to_neuron_state_dict, or give the model the module it belongs to",
            )
        )
    return problems + later


def _shapes(expected: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> list[CoverageProblem]:
    wrong = [
        name
        for name, parameter in expected.items()
        if name in state and not _NOT_LOADED.search(name) and state[name].shape != parameter.shape
    ]
    return [
        CoverageProblem(
            "weight-shape",
            f"{pattern} ({_count(names)}) gets {list(state[names[0]].shape)}, "
            f"its parameter is {list(expected[names[0]].shape)}",
            "transpose, split or join the weight in the conversion, or size the module by the configuration",
        )
        for pattern, names in _grouped(wrong).items()
    ]


def _doubled(
    expected: Mapping[str, torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    used: Mapping[str, list[str]],
    state: Mapping[str, torch.Tensor],
    *,
    tied: bool,
) -> list[CoverageProblem]:
    """Keys that fill more parameters than they have values for."""
    doubled: dict[str, tuple[str, ...]] = {}
    for key, names in used.items():
        if len(names) < 2 or (tied and any(name.startswith("lm_head") for name in names)):
            continue
        alone = [name for name in names if state[name].numel() >= weights[key].numel() and expected[name].dim()]
        if len(alone) > 1:
            doubled[key] = tuple(alone)
    return [
        CoverageProblem(
            "key-used-twice",
            f"checkpoint key {pattern} ({_count(keys)}) fills {' and '.join(doubled[keys[0]][:3])}",
            "give each parameter the weight of its own name",
        )
        for pattern, keys in _grouped(list(doubled)).items()
    ]


def _grouped(names: list[str]) -> dict[str, list[str]]:
    """Names by their pattern with numbers taken out."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name), []).append(name)
    return groups


def _count(names: list[str]) -> str:
    return "1 tensor" if len(names) == 1 else f"{len(names)} tensors"
