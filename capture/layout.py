"""Which rows of a batched tensor belong to which prompt and which token positions.

A forward pass over tokens has a layout: for every batch row, the prompt it computes, where its real tokens start in
the token axis, how many there are and the position of the first. From it every captured tensor is cut into one
tensor per prompt that holds real positions only: padding is never stored and never enters a statistic.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..store.dims import Axis, parse_dims
from ..store.errors import InputError
from ..store.names import is_attention


@dataclass(frozen=True, slots=True)
class Row:
    """Real tokens of one batch row.

    Attributes:
        index: batch row.
        prompt: index of its prompt.
        start: first real token in the token axis.
        count: number of real tokens.
        position: token position of the first one in its prompt.
    """

    index: int
    prompt: int
    start: int
    count: int
    position: int


@dataclass(frozen=True, slots=True)
class StepLayout:
    """Layout of one forward pass.

    Attributes:
        phase: `prefill`, `decode`, or `encode`: what the encoder of an encoder-decoder reads.
        step: 0 for prefill, then 1, 2, ...
        batch: length of the batch axis.
        length: length of the token axis.
        rows: rows that hold real tokens.
        source: layout of the source, whose length is another; None without an encoder, or where it does not run.
        keys: `bool[batch, keys]`, which of the keys that attention sees are real tokens; None where that is unknown.
    """

    phase: str
    step: int
    batch: int
    length: int
    rows: tuple[Row, ...]
    source: StepLayout | None = None
    keys: torch.Tensor | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Cut:
    """One prompt's part of a captured tensor; positions are None when the tensor has no token axis."""

    prompt: int | None
    values: torch.Tensor
    dims: str
    position_start: int | None
    position_count: int | None


def layout_from_mask(mask: torch.Tensor, length: int, *, phase: str, step: int, prompts: Sequence[int]) -> StepLayout:
    """Layout of a forward pass over the last `length` columns of an attention mask.

    Args:
        mask: `[batch, past + length]`, true (or 1) at real tokens; padding may be left or right.
        length: number of tokens per row in this forward pass.
        phase: `prefill` or `decode`.
        step: 0 for prefill, then 1, 2, ...
        prompts: prompt index of every batch row; rows of finished prompts have a zero in the mask's last column.

    Raises:
        InputError: a row's real tokens are not contiguous within the window.
    """
    real = mask.to(torch.bool)
    positions = real.to(torch.int64).cumsum(1) - 1
    rows = []
    for index, prompt in enumerate(prompts):
        window = real[index, -length:].nonzero().flatten()
        if len(window) == 0:
            continue
        start, count = int(window[0]), len(window)
        if int(window[-1]) - start + 1 != count:
            raise InputError(
                f"attention mask row {index} has holes among its last {length} tokens; pad on one side only"
            )
        first = mask.shape[1] - length + start
        rows.append(Row(index, prompt, start, count, int(positions[index, first])))
    return StepLayout(phase, step, len(prompts), length, tuple(rows), keys=real)


def layout_of(shape: Sequence[int], layout: StepLayout | None) -> StepLayout | None:
    """Whose tokens a tensor holds: those of the pass, or the source's, told by the length of its token axis."""
    source = None if layout is None else layout.source
    if layout is None or source is None or infer_dims(shape, layout.batch, layout.length, last_only=False):
        return layout
    return source if infer_dims(shape, source.batch, source.length, last_only=False) else layout


def infer_dims(shape: Sequence[int], batch: int, length: int, *, last_only: bool) -> str:
    """Name the axes of a tensor that a forward pass over `[batch, length]` tokens produced.

    Args:
        shape: its shape.
        batch: batch size of the pass.
        length: tokens per row.
        last_only: a token axis of length one stands for the last token (a head that computes only that).

    Returns:
        A dims text, empty when the tensor has no token axis that can be recognised. An axis `1 s` in first place is
        one that broadcasts over the batch.
    """
    rest = {0: "", 1: " h", 2: " n d"}
    if len(shape) >= 2 and shape[0] in (batch, 1):
        lead = "b" if shape[0] == batch else "1"
        if shape[1] == length and len(shape) - 2 in rest:
            return f"{lead} s{rest[len(shape) - 2]}"
        if len(shape) == 4 and shape[2] == length:
            return f"{lead} n s d"
        if len(shape) == 3 and shape[1] == 1 and last_only:
            return f"{lead} s h"
    if len(shape) in (1, 2) and shape[0] == batch * length:
        return "(b s) e" if len(shape) == 2 else "(b s)"
    return ""


def cut(
    tensor: torch.Tensor,
    layout: StepLayout | None,
    *,
    last_only: bool,
    positions: range | None = None,
    dims: str | None = None,
    part: int = 0,
) -> Iterator[Cut]:
    """Split a captured tensor by prompt and drop padding.

    Args:
        tensor: as it came out of a module.
        layout: layout of the forward pass, None for a model without tokens.
        last_only: see `infer_dims`.
        positions: keep only these token positions (a `range` with step 1).
        dims: its axes where they are known, None to infer them.
        part: which part of a sharded position axis (`b s[tp] h`) this tensor is.
    """
    if layout is None:
        yield Cut(None, tensor, "", None, None)
        return
    if dims is None:
        dims = infer_dims(tensor.shape, layout.batch, layout.length, last_only=last_only)
    if not dims:
        whole = len(layout.rows) == 1
        yield Cut(layout.rows[0].prompt if whole else None, tensor, "", None, None)
        return
    only_last = last_only and tensor.ndim == 3 and tensor.shape[1] == 1 and layout.length > 1
    axes = parse_dims(dims).axes
    held = _held(tensor, axes, part)
    for row in layout.rows:
        real = _last(row) if only_last else _overlap(row, held)
        kept = None if real is None else _keep(real, positions)
        if real is not None and kept is not None:
            found = _cut_row(tensor, dims, layout, kept, only_last, held.start if held else 0)
            # A few positions must not keep the whole tensor in memory while they wait to be written.
            yield replace(found, values=found.values.clone()) if kept.count < real.count else found


def holds_attention_weights(path: str, port: str, slot: str, shape: Sequence[int], layout: StepLayout) -> bool:
    """Whether a tensor is what an attention module of transformers returns beside its output: `b n s k`."""
    return (
        layout.keys is not None
        and layout.source is None
        and (port, slot) == ("output", "1")
        and is_attention(path)
        and len(shape) == 4
        and (shape[0], shape[2]) == (layout.batch, layout.length)
        and shape[3] <= layout.keys.shape[1]
    )


def cut_weights(tensor: torch.Tensor, layout: StepLayout, *, positions: range | None = None) -> Iterator[Cut]:
    """Split attention weights by prompt, and drop the keys that are padding.

    Args:
        tensor: `[batch, heads, tokens, keys]`; where a cache keeps a window only, the last keys.
        layout: layout of the forward pass, with its keys.
        positions: see `cut`.
    """
    assert layout.keys is not None, "see holds_attention_weights"
    for part in cut(tensor, layout, last_only=False, positions=positions, dims="b n s k"):
        row = next(row for row in layout.rows if row.prompt == part.prompt)
        real = layout.keys[row.index, layout.keys.shape[1] - tensor.shape[3] :].to(tensor.device)
        yield part if bool(real.all()) else replace(part, values=part.values[..., real])


def _held(tensor: torch.Tensor, axes: Sequence[Axis], part: int) -> range | None:
    """The part of the token axis that a rank holds when that axis is sharded."""
    for index, axis in enumerate(axes):
        if axis.names == ("s",) and axis.sharded:
            length = tensor.shape[index]
            return range(part * length, (part + 1) * length)
    return None


def _overlap(row: Row, held: range | None) -> Row | None:
    if held is None:
        return row
    first, stop = max(row.start, held.start), min(row.start + row.count, held.stop)
    return Row(row.index, row.prompt, first, stop - first, row.position + first - row.start) if first < stop else None


def _last(row: Row) -> Row:
    return Row(row.index, row.prompt, row.start + row.count - 1, 1, row.position + row.count - 1)


def _keep(row: Row, positions: range | None) -> Row | None:
    if positions is None:
        return row
    first = max(row.position, positions.start)
    stop = min(row.position + row.count, positions.stop)
    if first >= stop:
        return None
    return Row(row.index, row.prompt, row.start + first - row.position, stop - first, first)


def _cut_row(tensor: torch.Tensor, dims: str, layout: StepLayout, row: Row, only_last: bool, held: int) -> Cut:
    for index, axis in enumerate(parse_dims(dims).axes):
        if axis.names == ("b", "s"):
            tensor = _narrow(tensor, index, row.index * layout.length + row.start, row.count)
        elif axis.names == ("b",):
            tensor = _narrow(tensor, index, row.index, 1)
        elif axis.names == ("s",) and not only_last:
            tensor = _narrow(tensor, index, row.start - held, row.count)
    return Cut(row.prompt, tensor, re.sub(r"^1 ", "b ", dims), row.position, row.count)


def _narrow(tensor: torch.Tensor, axis: int, start: int, count: int) -> torch.Tensor:
    return tensor if tensor.shape[axis] == count else tensor.narrow(axis, start, count)
