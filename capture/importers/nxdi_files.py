"""The files of NxD Inference's capture hook, and of dumps that follow its names.

    captured_tensors_{cte|tkg|tg}_step_{n}_module_{path}_{output|input}[_{slot}].pt
    captured_tensors_{cte|tkg|tg}_step_{n}_manual_tensor_{i}.pt
    capture_metadata.json

The step counts forward passes from 1 over all prompts; the phase in the name is `cte` for step 1 only, whatever ran.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .defects import looks_like_cosines, placeholder_fault
from .dump import DumpFile, Report, dtype_of, name_fault, shown, tensors_of
from .evidence import EmbeddingRows, embedding_rows
from .modules import is_embedding

METADATA = "capture_metadata.json"
PREFIX = "captured_tensors_"
_NAME = re.compile(
    r"captured_tensors_(?P<label>cte|tkg|tg)_step_(?P<step>\d{1,9})_"
    r"(?:module_(?P<module>.+)_(?P<port>output|input)s?(?:_(?P<slot>\w+))?|manual_tensor_(?P<manual>\d+))\.pt"
)


@dataclass(frozen=True)
class Parsed:
    """A file name of the hook, read."""

    file: DumpFile
    label: str
    step: int
    module: str
    port: str
    slot: str


@dataclass(frozen=True)
class Sighting:
    """A tensor of the dump, looked at once.

    Attributes:
        parsed: its file.
        key: its slot within the file.
        shape, dtype: of the tensor.
        cosines: whether it can only be a table of rotary cosines.
        embedding: its rows by batch row, for the output of a token embedding.
    """

    parsed: Parsed
    key: str
    shape: tuple[int, ...]
    dtype: str
    cosines: bool
    embedding: tuple[EmbeddingRows, ...]


def parse_files(files: Sequence[DumpFile], report: Report) -> list[Parsed]:
    """Read the file names, in the order of steps; others and second files of one tensor are reported."""
    found: dict[tuple[int, str, str, str], Parsed] = {}
    for file in sorted(files, key=_plain_first):
        match = _NAME.fullmatch(file.name)
        if match is None:
            report.skip(file.name, "is not named like a file of the capture hook")
            continue
        module = match["module"] or f"manual.{match['manual']}"
        fault = name_fault(module)
        if fault is not None:
            report.skip(file.name, fault)
            continue
        port, slot = match["port"] or "output", match["slot"] or ""
        parsed = Parsed(file, match["label"], int(match["step"]), module, port, slot)
        # Element 0 of a tuple is the module's main output: with and without its number is the same tensor.
        first = found.setdefault((parsed.step, module, port, "" if slot == "0" else slot), parsed)
        if first is not parsed:
            report.skip(file.name, f"duplicate: {first.file.name} holds the same site and step; that one is imported")
    return sorted(found.values(), key=lambda parsed: parsed.step)


def _plain_first(file: DumpFile) -> tuple[bool, str]:
    return "_tg_" in file.name, file.name


def read_metadata(source: Path, present: set[str], report: Report) -> dict[str, dict[str, Any]]:
    """The entries of capture_metadata.json by file name; only names that are in the dump are kept.

    The hook rewrites the file after every tensor, so a killed process leaves half of it.
    """
    path = source / METADATA
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_bytes())["tensors"]
        listed = {str(name): entry for name, entry in entries.items() if isinstance(entry, dict)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        report.skip(METADATA, f"cannot be read ({type(error).__name__}); the file names tell the same")
        return {}
    for name in listed.keys() - present:
        # The name is only compared and printed, so it may be anything.
        if name not in report.skipped:
            report.skip(name, f"missing: {METADATA} lists it")
    return {name: entry for name, entry in listed.items() if name in present}


def drop_leftovers(parsed: Sequence[Parsed], metadata: dict[str, dict[str, Any]], report: Report) -> list[Parsed]:
    """Leave out steps that were written before an earlier step: the counter was reset and the files are older."""
    times: dict[int, list[float]] = {}
    for item in parsed:
        stamp = metadata.get(item.file.name, {}).get("timestamp")
        if isinstance(stamp, (int, float)):
            times.setdefault(item.step, []).append(float(stamp))
    stale: set[int] = set()
    newest = float("-inf")
    for step in sorted(times):
        if max(times[step]) < newest:
            stale.add(step)
        newest = max(newest, min(times[step]))
    for item in parsed:
        if item.step in stale:
            report.skip(
                item.file.name,
                "left over from an earlier generation: its step was written before the steps that precede it "
                "(the step counter was reset in between)",
            )
    return [item for item in parsed if item.step not in stale]


def sight(item: Parsed, metadata: dict[str, dict[str, Any]], report: Report) -> list[Sighting]:
    """Open a file and look at what it holds; placeholders and contradictions are reported."""
    found = []
    for key, tensor in tensors_of(item.file, report):
        fault = placeholder_fault(tensor, item.module) or _contradiction(tensor, key, metadata.get(item.file.name))
        if fault is not None:
            report.skip(item.file.name, fault, key)
            continue
        rows: tuple[EmbeddingRows, ...] = ()
        if is_embedding(item.module) and item.port == "output" and tensor.ndim == 3:
            rows = tuple(embedding_rows(tensor))
        found.append(
            Sighting(item, key, tuple(tensor.shape), dtype_of(tensor), looks_like_cosines(tensor, item.module), rows)
        )
    return found


def _contradiction(tensor: torch.Tensor, key: str, entry: dict[str, Any] | None) -> str | None:
    if entry is None or key:
        return None
    shape, dtype = entry.get("tensor_shape"), entry.get("tensor_dtype")
    if shape is not None and shape != list(tensor.shape):
        return f"holds shape {list(tensor.shape)}, {METADATA} says {shown(str(shape))}"
    if dtype is not None and str(dtype) != str(tensor.dtype):
        return f"holds {tensor.dtype}, {METADATA} says {shown(str(dtype))}"
    return None


def report_missing(parsed: Sequence[Parsed], report: Report) -> None:
    """Name the files that other steps have and a step lacks."""
    sites = {(item.module, item.port, item.slot) for item in parsed}
    by_step: dict[int, dict[tuple[str, str, str], Parsed]] = {}
    for item in parsed:
        by_step.setdefault(item.step, {})[item.module, item.port, item.slot] = item
    for step, have in by_step.items():
        label = next(iter(have.values())).label
        for module, port, slot in sorted(sites - have.keys()):
            if module.startswith("manual."):
                continue  # the hook numbers whatever a step registered
            name = f"{PREFIX}{label}_step_{step}_module_{module}_{port}{f'_{slot}' if slot else ''}.pt"
            report.skip(name, "missing: other steps have this site")
