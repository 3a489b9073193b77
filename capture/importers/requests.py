"""Requests of a serving engine: which tokens of a forward pass belong to which prompt."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...store.errors import InputError
from ...store.manifest import Prompt, PromptTokens
from ..layout import Row, StepLayout
from .dump import Report
from .tokens import KnownPrompt

_NUMBER = re.compile(r"(\d+)")
ForwardKey = tuple[str, int, str]


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one request in a forward pass: `count` tokens from row `start`, first at `position`."""

    request: str
    start: int
    count: int
    position: int


@dataclass(frozen=True)
class Placement:
    """Where a tensor's rows lie; `by_position`: ranks hold consecutive parts of the positions."""

    layout: StepLayout | None
    step: int
    by_position: bool


def segments_of(requests: Sequence[str], positions: Sequence[int], phase: str) -> list[Segment]:
    """Split the positions of a forward pass among its requests; the rest is padding.

    Raises:
        ValueError: there are fewer runs of consecutive positions than requests, or what follows them is no padding.
    """
    if not requests:
        raise ValueError("no request ids")
    runs: list[tuple[int, int]] = []
    for index, position in enumerate(positions):
        if runs and position == positions[index - 1] + 1:
            runs[-1] = runs[-1][0], index + 1
        else:
            runs.append((index, index + 1))
    speculative = len({stop - start for start, stop in runs}) == 1 and len(runs) == len(requests)
    if phase == "decode" and len(requests) > 1 and not speculative:
        if len(positions) < len(requests):
            raise ValueError(f"{len(positions)} positions for {len(requests)} requests")
        return [Segment(request, row, 1, positions[row]) for row, request in enumerate(requests)]
    if len(runs) < len(requests):
        raise ValueError(f"{len(runs)} runs of consecutive positions for {len(requests)} requests")
    if any(stop - start > 1 for start, stop in runs[len(requests) :]):
        raise ValueError(f"more runs of consecutive positions than the {len(requests)} requests")
    return [
        Segment(request, start, stop - start, positions[start])
        for request, (start, stop) in zip(requests, runs, strict=False)
    ]


class Requests:
    """The prompts of a dump, numbered, with their lengths and tokens."""

    def __init__(
        self,
        forwards: Mapping[ForwardKey, Sequence[Segment] | None],
        known: Sequence[KnownPrompt],
        report: Report,
    ) -> None:
        """Number the requests and pair them with tokens.

        Raises:
            InputError: the tokens do not fit.
        """
        self._segments = forwards
        found: dict[tuple[int, str], int] = {}
        for (_, replica, forward), segments in forwards.items():
            for segment in segments or ():
                end = segment.position + segment.count if forward.startswith("prefill") else 0
                request = replica, segment.request
                found[request] = max(found.get(request, 0), end)
        ordered = sorted(found, key=lambda request: (request[0], _natural(request[1])))
        self._index = {request: index for index, request in enumerate(ordered)}
        self._n_prompt = [found[request] for request in ordered]
        matched = _match(ordered, self._n_prompt, known, report)
        self.prompts = tuple(
            Prompt(i, prompt.id, prompt.text, self._n_prompt[i] or prompt.n_prompt or len(prompt.token_ids))
            for i, prompt in enumerate(matched)
        )
        self.tokens = tuple(PromptTokens(i, prompt.token_ids) for i, prompt in enumerate(matched))
        if found and not known:
            report.assume("no tokens were given: positions come from the metadata, prompts are numbered by request id")

    def layout(self, key: ForwardKey, phase: str, length: int, rows: int, rank: int, tp: int) -> Placement:
        """Where the rows of one rank's tensor lie.

        Args:
            key: the forward pass.
            phase: `prefill` or `decode`.
            length: tokens of the pass, padding included.
            rows: rows of the tensor: all tokens, one per request, or one rank's part of the tokens.
            rank, tp: the rank and how many there are.
        """
        segments = self._segments[key]
        if segments is None:
            return Placement(None, 0, False)
        step = 0 if phase == "prefill" else max(self._step(key[1], segment) for segment in segments)
        if rows == length:
            found = [self._row(key[1], s, s.start, s.count, s.position) for s in segments]
        elif rows == len(segments):
            found = [self._row(key[1], s, i, 1, s.position + s.count - 1) for i, s in enumerate(segments)]
        else:
            found = [row for s in segments for row in self._part(key[1], s, rank * rows, rows)]
        layout = StepLayout(phase, step, 1, rows, tuple(found))
        return Placement(layout, step, tp > 1 and rows not in (length, len(segments)))

    def _row(self, replica: int, segment: Segment, start: int, count: int, position: int) -> Row:
        return Row(0, self._index[replica, segment.request], start, count, position)

    def _part(self, replica: int, segment: Segment, first: int, rows: int) -> list[Row]:
        """The tokens of a segment that fall into rows `first` to `first + rows` of the forward pass."""
        start, stop = max(segment.start, first), min(segment.start + segment.count, first + rows)
        if start >= stop:
            return []
        return [self._row(replica, segment, start - first, stop - start, segment.position + start - segment.start)]

    def _step(self, replica: int, segment: Segment) -> int:
        n_prompt = self._n_prompt[self._index[replica, segment.request]]
        return max(segment.position + segment.count - n_prompt, 1) if n_prompt else 1


def _match(
    ordered: Sequence[tuple[int, str]], lengths: Sequence[int], known: Sequence[KnownPrompt], report: Report
) -> list[KnownPrompt]:
    """The tokens of every request: by id, else in order."""
    if not known or not ordered:
        return []
    by_id = {prompt.id: prompt for prompt in known}
    names = [request for _, request in ordered]
    if len(set(names)) == len(names) and set(names) <= by_id.keys():
        matched = [by_id[name] for name in names]
        report.assume("tokens were matched by request id")
    elif len(known) == len(ordered):
        matched = list(known)
        report.assume("tokens are taken in the order of the request ids; prompt lengths agree")
    else:
        raise InputError(
            f"the tokens hold {len(known)} prompts, the dump {len(ordered)} requests ({', '.join(names[:5])}); "
            'give one prompt for each, or lines whose "id" is the request id'
        )
    for name, length, prompt in zip(names, lengths, matched, strict=True):
        if length and (length > len(prompt.token_ids) or prompt.n_prompt not in (None, length)):
            raise InputError(
                f"request {name} prefilled {length} tokens, prompt {prompt.id!r} has "
                f"{prompt.n_prompt or len(prompt.token_ids)}; give the tokens that the dump was made with"
            )
    return matched


def _natural(text: str) -> tuple[tuple[int, str], ...]:
    pieces = _NUMBER.split(text)
    return tuple((int(piece), "") if piece.isdigit() and piece.isascii() else (-1, piece) for piece in pieces)
