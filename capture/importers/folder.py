"""A plain folder (or one file) of .pt, .npy and .safetensors: one tensor or one dictionary of tensors per file.

A bare tensor is named by its file: `layers/0/mlp.npy` is module `layers.0.mlp`. In a dictionary, a key with dots is a
module path and any other key a slot of the file's module. `step_3` and `prompt_1` in file or folder names are read as
numbers, not as part of the module.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...store.manifest import Prompt, PromptTokens
from ...store.progress import Progress
from ..layout import Row, StepLayout
from .dump import DumpFile, Plan, Planned, Report, dtype_of, name_fault, tensors_of
from .modules import execution_key, holds_shard, is_head
from .tokens import Hints, KnownPrompt

_NUMBERED = re.compile(r"(?:^|(?<=[._-]))(step|prompt|rank)[_-]?(\d{1,9})(?:[._-]|$)")


@dataclass(frozen=True)
class Named:
    """What a file's name says."""

    module: str
    step: int
    prompt: int
    rank: int


def name_of(file: DumpFile) -> Named:
    """Module path and numbers in the relative path of a file."""
    stem = file.name.rpartition(".")[0].replace("/", ".")
    numbers = {kind: int(value) for kind, value in _NUMBERED.findall(stem)}
    module = _NUMBERED.sub("", stem).strip("._-")
    return Named(module, numbers.get("step", 0), numbers.get("prompt", 0), numbers.get("rank", 0))


def plan_folder(files: Sequence[DumpFile], report: Report, *, hints: Hints, progress: Progress) -> Plan:
    """Survey a folder of tensors.

    Raises:
        InputError: the tokens cannot be used without knowing the prompts' lengths.
    """
    known = hints.known
    if any(prompt.n_prompt is None for prompt in known):
        known = [_whole(prompt) for prompt in known]
        report.assume('tokens without "n_prompt" are taken as prompts without a continuation')
    seen: dict[tuple[str, str, int, int, int], str] = {}
    tensors: list[Planned] = []
    names = [name_of(file) for file in files]
    degree = max(hints.tp, max((named.rank for named in names), default=0) + 1)
    for number, (file, named) in enumerate(zip(files, names, strict=True)):
        progress("read", number, len(files))
        fault = name_fault(named.module)
        if fault is not None:
            report.skip(file.name, fault)
            continue
        for key, tensor in tensors_of(file, report):
            module, slot = (key, "") if "." in key else (named.module, key)
            identity = (module, slot, named.step, named.prompt, named.rank)
            if identity in seen:
                report.skip(file.name, f"duplicate: {seen[identity]} holds the same site, step and prompt", key)
                continue
            seen[identity] = file.name
            shape = tuple(tensor.shape)
            layout = _layout(shape, named, known, is_head(module))
            phase = layout.phase if layout else "forward"
            sharded = "features" if degree > 1 and holds_shard(module, "output") else ""
            if known and layout is None:
                report.note(file.name, f"shape {list(shape)} has no axis of the prompts' lengths: no positions", key)
            tensors.append(
                Planned(
                    file, key, shape, dtype_of(tensor), module, "output", slot, phase, named.step, 0, named.prompt,
                    layout, last_only=is_head(module), sharded=sharded, rank=named.rank,
                )
            )  # fmt: skip
    if not known:
        report.assume("no tokens were given: tensors are stored without positions and compared whole")
    return _finish(tensors, known, degree)


def _finish(tensors: list[Planned], known: Sequence[KnownPrompt], degree: int) -> Plan:
    """Number the sites in the usual order of execution, and keep prompts only if any tensor has positions."""
    names = sorted({t.module for t in tensors}, key=lambda module: execution_key(module, "output"))
    order = {module: index for index, module in enumerate(names)}
    ordered = sorted((replace(t, order=order[t.module]) for t in tensors), key=lambda t: t.rank)
    if not any(t.layout for t in tensors):
        return Plan("import", ordered, degree)
    prompts = tuple(Prompt(i, p.id, p.text, p.n_prompt or len(p.token_ids)) for i, p in enumerate(known))
    return Plan("import", ordered, degree, prompts, tuple(PromptTokens(i, p.token_ids) for i, p in enumerate(known)))


def _whole(prompt: KnownPrompt) -> KnownPrompt:
    return KnownPrompt(prompt.id, prompt.text, prompt.token_ids, prompt.n_prompt or len(prompt.token_ids))


def _layout(shape: tuple[int, ...], named: Named, known: Sequence[KnownPrompt], head: bool) -> StepLayout | None:
    """Where the positions of a tensor lie, from its shape and the prompts' lengths; None when that does not tell."""
    batch = len(known) if len(known) > 1 and shape and shape[0] == len(known) else 1
    if batch == 1 and named.prompt >= len(known):
        return None
    rows = list(enumerate(known)) if batch > 1 else [(named.prompt, known[named.prompt])]
    length = _token_axis(shape, batch)
    if length is None:
        return None
    lengths = [prompt.n_prompt or 0 for _, prompt in rows]
    if named.step > 0 and length == 1:
        found = [Row(i, p, 0, 1, n + named.step - 1) for i, ((p, _), n) in enumerate(zip(rows, lengths, strict=True))]
        return StepLayout("decode", named.step, batch, 1, tuple(found))
    if named.step > 0:
        return None
    totals = [len(prompt.token_ids) for _, prompt in rows]
    if length in (totals[0], totals[0] - 1) and batch == 1:
        lengths = [length]  # one forward pass over all tokens
    if head and length == 1:
        length = max(lengths)
    elif length < max(lengths):
        return None
    found = [Row(i, p, 0, n, 0) for i, ((p, _), n) in enumerate(zip(rows, lengths, strict=True))]
    return StepLayout("prefill", 0, batch, length, tuple(found))


def _token_axis(shape: tuple[int, ...], batch: int) -> int | None:
    if len(shape) >= 3 and shape[0] == batch:
        return shape[1] if len(shape) == 3 else shape[2]
    return shape[0] if len(shape) == 2 and batch == 1 else None
