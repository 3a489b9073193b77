"""Dumps of vLLM-Neuron's ModelCapture.

    [target|draft|vision/]dp{r}/{prefill_s128_0|decode_b1_0}/{module}/rank{r}.pt
    .../{prefill_s128_0}/{prefill_s128_0}_meta.json     {"req_ids": [...], "positions": [...]}

Tensors are `[tokens, ...]`, the tokens of all requests of a forward pass one after another; padding repeats the last
position. Every tensor-parallel rank is there, so what the ranks share and what they split can be told from the values.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ...store.progress import Progress
from ..pending import to_numpy
from .dump import DumpFile, Plan, Planned, Report, dtype_of, name_fault, tensors_of
from .modules import execution_key, holds_shard
from .requests import Requests, Segment, segments_of
from .tokens import Hints

_PASS = re.compile(r"(prefill)_s(\d+)_(\d+)|(decode)_b(\d+)_(\d+)")
_RANK = re.compile(r"rank(\d{1,6})\.pt")
_REPLICA = re.compile(r"dp(\d{1,6})")
#: Folder of the main model beside `draft` and `vision`; it adds nothing to module names.
_MAIN = "target"


@dataclass(frozen=True, order=True)
class Place:
    """Where a file lies: sub-model, data-parallel replica, forward pass, module, tensor-parallel rank."""

    part: str
    replica: int
    forward: str
    module: str
    rank: int


@dataclass
class Forward:
    """One forward pass of one replica.

    Attributes:
        phase: `prefill` or `decode`.
        length: tokens of the bucket.
        segments: real tokens by request, None when the metadata is missing or contradicts itself.
        files: rank files by module.
    """

    phase: str
    length: int
    segments: list[Segment] | None
    files: dict[str, dict[int, DumpFile]] = field(default_factory=dict)


def place_of(name: str) -> Place | None:
    """Read the relative path of a file, None when it is not of this layout."""
    *folders, forward, module, leaf = name.split("/") if name.count("/") >= 3 else ("", "", "", "")
    rank = _RANK.fullmatch(leaf)
    replica = next((m for m in map(_REPLICA.fullmatch, folders) if m), None)
    if rank is None or replica is None or not _PASS.fullmatch(forward):
        return None
    part = ".".join(folder for folder in folders if folder not in (replica[0], _MAIN))
    return Place(part, int(replica[1]), forward, module, int(rank[1]))


def plan_vllm_neuron(
    source: Path, files: Sequence[DumpFile], report: Report, *, hints: Hints, progress: Progress
) -> Plan:
    """Survey a dump in ModelCapture's layout.

    Raises:
        InputError: the tokens do not fit the dump.
    """
    forwards: dict[tuple[str, int, str], Forward] = {}
    ranks: set[int] = set()
    for file in files:
        place = place_of(file.name)
        fault = "is not in ModelCapture's layout (dp0/prefill_s128_0/<module>/rank0.pt)" if place is None else None
        if place is not None:
            fault = name_fault(f"{place.part}.{place.module}")
        if place is None or fault is not None:
            report.skip(file.name, fault or "")
            continue
        key = (place.part, place.replica, place.forward)
        if key not in forwards:
            forwards[key] = _forward(source, file, place, report)
        forwards[key].files.setdefault(place.module, {})[place.rank] = file
        ranks.add(place.rank)
    tp = max(hints.tp, max(ranks, default=0) + 1)
    requests = Requests({key: f.segments for key, f in forwards.items()}, hints.known, report)
    sites = sorted({(key[0], module) for key, f in forwards.items() for module in f.files}, key=_site_key)
    order = {site: index for index, site in enumerate(sites)}
    tensors: list[Planned] = []
    total = sum(len(by_rank) for f in forwards.values() for by_rank in f.files.values())
    for key in sorted(forwards):
        for module, by_rank in forwards[key].files.items():
            progress("read", len(tensors), total)
            tensors.extend(_plan_module(key, forwards[key], module, by_rank, tp, requests, order, report))
    return Plan("vllm-neuron", sorted(tensors, key=lambda t: t.rank), tp, requests.prompts, requests.tokens)


def _site_key(site: tuple[str, str]) -> tuple[Any, ...]:
    return (site[0] != "vision", site[0], execution_key(site[1], "output"))


def _forward(source: Path, file: DumpFile, place: Place, report: Report) -> Forward:
    match = _PASS.fullmatch(place.forward)
    phase, length = ("prefill", 2) if match and match[1] else ("decode", 5)
    folder = file.path.parents[1]
    name = f"{place.forward}_meta.json"
    path = next((p for p in (folder / name, folder.parent / name) if p.is_file()), folder / name)
    shown = path.relative_to(source).as_posix()
    segments, positions = None, []
    try:
        meta = json.loads(path.read_bytes())
        requests = meta["req_ids"] if "req_ids" in meta else meta["request_ids"]
        positions = [int(p) for p in meta["positions"]]
        segments = segments_of([str(r) for r in requests], positions, phase)
    except FileNotFoundError:
        report.skip(shown, "missing: its tensors are stored without prompt and positions")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        report.skip(shown, f"cannot be used ({error}): its tensors are stored without prompt and positions")
    size = int(match[length]) if match else 0
    return Forward(phase, len(positions) or size, segments)


def _plan_module(
    key: tuple[str, int, str],
    forward: Forward,
    module: str,
    by_rank: dict[int, DumpFile],
    tp: int,
    requests: Requests,
    order: dict[tuple[str, str], int],
    report: Report,
) -> list[Planned]:
    """The tensors of one module in one forward pass, on every rank."""
    part = key[0]
    planned: list[Planned] = []
    digests: dict[str, list[bytes]] = {}
    for rank in range(tp):
        if rank not in by_rank:
            folder = next(iter(by_rank.values())).name.rpartition("/")[0]
            report.skip(f"{folder}/rank{rank}.pt", f"missing: the dump has {tp} ranks, this module lacks rank {rank}")
            continue
        file = by_rank[rank]
        for slot, tensor in tensors_of(file, report):
            axes = _axes(tuple(tensor.shape), forward, tp)
            if axes is None:
                report.skip(file.name, _foreign_rows(tuple(tensor.shape), forward), slot)
                continue
            rows, dims = axes
            digest = xxhash.xxh3_128_digest(np.ascontiguousarray(to_numpy(tensor)).view(np.uint8).data)
            digests.setdefault(slot, []).append(digest)
            placed = requests.layout(key, forward.phase, forward.length, rows, rank, tp)
            planned.append(
                Planned(
                    file, slot, tuple(tensor.shape), dtype_of(tensor), f"{part}.{module}" if part else module, "output",
                    slot, forward.phase, placed.step, order[part, module], None, placed.layout,
                    sharded="s" if placed.by_position else "", rank=rank, dims=dims,
                )
            )  # fmt: skip
    return [_mark(item, module, digests[item.key], tp, report) for item in planned]


def _mark(item: Planned, module: str, digests: Sequence[bytes], tp: int, report: Report) -> Planned:
    """Mark a tensor that differs between ranks; whether it does shows in the digests of its values, by rank."""
    if item.sharded or len(set(digests)) == 1:
        return item
    if holds_shard(module, "output"):
        return replace(item, sharded="features", copies=_copies(digests, tp))
    report.note(
        item.file.name,
        "ranks differ in a tensor that ranks should share: partial sums, a shard that its name does not tell, or ranks "
        "out of step",
    )
    return item


def _copies(digests: Sequence[bytes], tp: int) -> int:
    """How many consecutive ranks hold the same shard, as replicated key and value heads do."""
    same = next((index for index, digest in enumerate(digests) if digest != digests[0]), len(digests))
    groups = [digests[start : start + same] for start in range(0, len(digests), same)]
    regular = len(digests) == tp and all(len(group) == same and len(set(group)) == 1 for group in groups)
    return same if regular else 1


def _axes(shape: tuple[int, ...], forward: Forward, tp: int) -> tuple[int, str] | None:
    """Length of the token axis and dims: `[tokens, ...]`, or `[1, tokens, hidden]` as reference captures have it.

    The token axis holds all tokens, one per request, or one rank's part of the tokens; None when it is none of these.
    """
    if forward.segments is None:
        return 0, ""
    possible = {forward.length, len(forward.segments)}
    if forward.length % tp == 0:
        possible.add(forward.length // tp)
    if len(shape) == 3 and shape[0] == 1 < forward.length and shape[1] in possible:
        return shape[1], "b s h"
    if 1 <= len(shape) <= 3 and shape[0] in possible:
        return shape[0], "(b s)" + ("", " e", " n d")[len(shape) - 1]
    return None


def _foreign_rows(shape: tuple[int, ...], forward: Forward) -> str:
    return (
        f"has shape {list(shape)}, the forward pass has {forward.length} tokens of {len(forward.segments or ())} "
        "requests: perhaps tokens of other data-parallel replicas, whose metadata is not in this folder"
    )
