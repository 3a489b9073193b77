"""Recognising the layout of a dump by its files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...store.errors import InputError
from .dump import DumpFile
from .nxdi_files import METADATA, PREFIX
from .vllm_neuron import place_of

#: Layouts by name, with what their files look like.
FORMATS = {
    "nxdi": "captured_tensors_cte_step_1_module_<path>_output.pt and capture_metadata.json",
    "vllm-neuron": "dp0/prefill_s128_0/<module>/rank0.pt",
    "equivalence": "captured_tensors_cte_step_1_module_<path>_output.pt without capture_metadata.json, tg for decode",
    "tensors": "any .pt, .npy or .safetensors files",
}


def detect(source: Path, files: Sequence[DumpFile]) -> str:
    """The layout of a dump.

    Raises:
        InputError: no layout, or more than one, is recognised.
    """
    hooked = [file.name for file in files if file.name.startswith(PREFIX)]
    served = [file.name for file in files if place_of(file.name) is not None]
    if hooked and served:
        raise InputError(
            f"{source} is ambiguous: it holds files like {FORMATS['nxdi']} and like {FORMATS['vllm-neuron']}; "
            "choose --format nxdi or --format vllm-neuron"
        )
    if served:
        return "vllm-neuron"
    if hooked:
        return _hook_or_skill(source, hooked)
    below = next((file.path.parent for file in files if f"/{PREFIX}" in file.name), None)
    if below is not None:
        raise InputError(f"{source} holds dumps in folders below it; import them one by one, for example {below}")
    if files:
        return "tensors"
    expected = "; ".join(f"{name}: {look}" for name, look in FORMATS.items())
    raise InputError(f"{source} holds no tensor files that can be imported; expected one of: {expected}")


def _hook_or_skill(source: Path, names: Sequence[str]) -> str:
    by_hook = (source / METADATA).is_file() or any(name.startswith(f"{PREFIX}tkg_") for name in names)
    by_skill = any(name.startswith(f"{PREFIX}tg_") for name in names)
    if by_hook and by_skill:
        raise InputError(
            f"{source} is ambiguous: it holds files of NxD Inference's hook ({METADATA} or _tkg_ names) and of the "
            "equivalence skill (_tg_ names); choose --format nxdi or --format equivalence (both read all of them)"
        )
    return "nxdi" if by_hook else "equivalence"
