"""Dumps of NxD Inference's capture hook, and of the equivalence skill, which keeps its file names.

Only rank 0 is there. Prefill is padded to a bucket, decode holds one position a step, the head one position in all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ...store.manifest import Prompt, PromptTokens
from ...store.progress import Progress
from ..layout import Row, StepLayout
from .boundaries import Group, Pass, Placed, group_passes, place
from .defects import COSINES, FIRST_OF_TUPLE, OVERWRITTEN, selected_rows_fault
from .dump import DumpFile, Plan, Planned, Report
from .evidence import TokenEvidence
from .modules import execution_key, holds_shard, is_head, leaf
from .nxdi_files import (
    Sighting,
    drop_leftovers,
    parse_files,
    read_metadata,
    report_missing,
    sight,
)
from .tokens import Hints, KnownPrompt


def plan_nxdi(
    source: Path,
    files: Sequence[DumpFile],
    report: Report,
    *,
    stack: str,
    hints: Hints,
    progress: Progress,
) -> Plan:
    """Survey a dump in the hook's layout.

    Raises:
        InputError: the tokens do not fit the dump.
    """
    parsed = parse_files(files, report)
    metadata = read_metadata(source, {file.name for file in files}, report)
    parsed = drop_leftovers(parsed, metadata, report)
    report_missing(parsed, report)
    sightings: list[Sighting] = []
    for number, item in enumerate(parsed):
        progress("read", number, len(parsed))
        sightings.extend(sight(item, metadata, report))
    sightings = _without_cosines(sightings, report)
    by_step: dict[int, list[Sighting]] = {}
    for found in sightings:
        by_step.setdefault(found.parsed.step, []).append(found)
    passes = [_pass(step, items, hints.tp) for step, items in sorted(by_step.items())]
    passes = _without_overwritten(passes, by_step, hints.known, report)
    if not passes:
        return Plan(stack, [], hints.tp)
    groups = group_passes(passes, hints.known, report)
    placed = place(groups, hints.known, TokenEvidence(hints.rows), report)
    order = _execution_order(sightings, list(metadata))
    tensors = [
        planned
        for group, rows in zip(groups, placed, strict=True)
        for item in ([group.prefill] if group.prefill else []) + list(group.decodes)
        for planned in _plan_pass(item, group, rows, by_step[item.step], order, hints, report)
    ]
    return Plan(stack, tensors, hints.tp, *_prompts(groups, placed))


def _without_cosines(sightings: Sequence[Sighting], report: Report) -> list[Sighting]:
    """Leave out attention captures that hold cosines, in all steps of the module once it is sure in one."""
    sure = {(s.parsed.module, s.parsed.port, s.shape[-1]) for s in sightings if s.cosines}
    kept = []
    for item in sightings:
        if item.shape and (item.parsed.module, item.parsed.port, item.shape[-1]) in sure:
            report.skip(item.parsed.file.name, COSINES, item.key)
        else:
            kept.append(item)
    return kept


def _pass(step: int, items: Sequence[Sighting], tp: int) -> Pass:
    """A forward pass, with the batch and length that most of its tensors have."""
    batch, length = _batch_and_length(items, tp)
    rows = next((s.embedding for s in items if s.embedding and s.shape[:2] == (batch, length)), ())
    return Pass(step, items[0].parsed.label, batch, length, rows)


def _without_overwritten(
    passes: Sequence[Pass],
    by_step: dict[int, list[Sighting]],
    known: Sequence[KnownPrompt],
    report: Report,
) -> list[Pass]:
    """Leave out prefills that hold one position although every prompt has more."""
    if not known or any((prompt.n_prompt or len(prompt.token_ids)) == 1 for prompt in known):
        return list(passes)
    overwritten = [item for item in passes if item.label == "cte" and item.length == 1]
    for found in (found for item in overwritten for found in by_step[item.step]):
        report.skip(found.parsed.file.name, OVERWRITTEN, found.key)
    return [item for item in passes if item not in overwritten]


def _batch_and_length(items: Sequence[Sighting], tp: int) -> tuple[int, int]:
    votes = Counter((s.shape[0], s.shape[1]) for s in items if len(s.shape) == 3 and not is_head(s.parsed.module))
    if not votes:
        votes = Counter((s.shape[0], s.shape[2]) for s in items if len(s.shape) == 4)
    if not votes:
        votes = Counter((s.shape[0], s.shape[1]) for s in items if len(s.shape) == 3)
    if not votes:
        votes = Counter((1, s.shape[0]) for s in items if s.shape)
    if not votes:
        return 1, 1
    batch, length = votes.most_common(1)[0][0]
    # Sequence parallelism leaves most tensors with a part of the positions.
    return batch, max(other for b, other in votes if b == batch and (other == length or other == length * tp))


def _execution_order(sightings: Sequence[Sighting], metadata_order: Sequence[str]) -> dict[tuple[str, str], int]:
    """Places of the sites in the usual order of execution; manual tensors last, in the order they were saved."""
    saved = {name: index for index, name in enumerate(metadata_order)}
    sites: dict[tuple[str, str], int] = {}
    for item in sightings:
        sites.setdefault((item.parsed.module, item.parsed.port), saved.get(item.parsed.file.name, len(saved)))
    manual = [site for site in sites if site[0].startswith("manual.")]
    named = sorted((site for site in sites if site not in manual), key=lambda site: execution_key(*site))
    return {site: index for index, site in enumerate([*named, *sorted(manual, key=lambda site: sites[site])])}


def _plan_pass(
    item: Pass,
    group: Group,
    rows: Sequence[Placed],
    sightings: Sequence[Sighting],
    order: dict[tuple[str, str], int],
    hints: Hints,
    report: Report,
) -> list[Planned]:
    prefill = item is group.prefill
    layout = _layout(item, group, rows)
    planned = []
    for found in sightings:
        parsed = found.parsed
        fault = selected_rows_fault(found.shape, item.batch, item.length, parsed.module)
        if fault is not None:
            report.skip(parsed.file.name, fault, found.key)
            continue
        if prefill and parsed.label != "cte":
            report.note(parsed.file.name, f"labelled {parsed.label}, imported as a prefill (step 0)", found.key)
        sharded = _sharded(found, item, hints, report)
        planned.append(
            Planned(
                parsed.file,
                found.key,
                found.shape,
                found.dtype,
                parsed.module,
                parsed.port,
                _slot(found, report),
                "prefill" if prefill else "decode",
                item.step - group.first_step,
                order[parsed.module, parsed.port],
                rows[0].prompt if len(rows) == 1 else None,
                _part(layout, found.shape[1], hints.rank) if sharded == "s" else layout,
                last_only=is_head(parsed.module),
                sharded=sharded,
                rank=hints.rank,
            )
        )
    return planned


def _part(layout: StepLayout | None, length: int, rank: int) -> StepLayout | None:
    """The layout of one rank's consecutive part of the positions."""
    if layout is None:
        return None
    rows = []
    for row in layout.rows:
        start, stop = max(row.start, rank * length), min(row.start + row.count, (rank + 1) * length)
        if start < stop:
            position = row.position + start - row.start
            rows.append(replace(row, start=start - rank * length, count=stop - start, position=position))
    return replace(layout, length=length, rows=tuple(rows))


def _layout(item: Pass, group: Group, rows: Sequence[Placed]) -> StepLayout | None:
    """Real tokens of a pass; None when positions are unknown. Buckets are padded on the right."""
    if any(row.prompt is not None and row.n_prompt is None for row in rows):
        return None
    found = []
    for index, row in enumerate(rows):
        if row.prompt is None or row.n_prompt is None:
            continue
        if item is group.prefill:
            found.append(Row(index, row.prompt, 0, row.n_prompt, 0))
            continue
        position = row.n_prompt + item.step - group.first_step - 1
        ended = row.known is not None and len(rows) > 1 and position >= len(row.known.token_ids)
        if not ended:  # rows of finished prompts compute padding
            found.append(Row(index, row.prompt, 0, 1, position))
    phase = "prefill" if item is group.prefill else "decode"
    return StepLayout(phase, item.step - group.first_step, item.batch, item.length, tuple(found))


def _slot(found: Sighting, report: Report) -> str:
    """Slot of a tensor: its place in the file or file name; the first of a tuple where the hook drops the others."""
    parsed = found.parsed
    slot = ".".join(part for part in (parsed.slot, found.key) if part)
    name = leaf(parsed.module)
    if not slot and parsed.port == "output" and name in FIRST_OF_TUPLE:
        report.note(parsed.file.name, FIRST_OF_TUPLE[name])
        return "0"
    return slot


def _sharded(found: Sighting, item: Pass, hints: Hints, report: Report) -> str:
    """Which axis of a tensor is one rank's part."""
    parsed, tp = found.parsed, hints.tp
    if tp == 1 or not found.shape or hints.is_whole(parsed.module, found.shape[-1]):
        return ""
    if len(found.shape) == 3 and item.length > 1 and found.shape[1] * tp == item.length:
        report.note(
            parsed.file.name, f"rank {hints.rank}'s positions only (sequence parallel); {tp - 1} ranks are missing"
        )
        return "s"
    if holds_shard(parsed.module, parsed.port):
        report.note(parsed.file.name, f"rank {hints.rank}'s shard only; the other {tp - 1} ranks are missing")
        return "features"
    return ""


def _prompts(
    groups: Sequence[Group], placed: Sequence[Sequence[Placed]]
) -> tuple[tuple[Prompt, ...], tuple[PromptTokens, ...]]:
    prompts, tokens = [], []
    for group, rows in zip(groups, placed, strict=True):
        for row in rows:
            if row.prompt is None or row.known is None or row.n_prompt is None:
                continue
            prompts.append(Prompt(row.prompt, row.known.id, row.known.text, row.n_prompt))
            # The token after the last computed position was chosen, if it is known; later ones were not.
            computed = row.n_prompt + group.n_decodes + 1
            tokens.append(PromptTokens(row.prompt, row.known.token_ids[:computed]))
    return tuple(prompts), tuple(tokens)
