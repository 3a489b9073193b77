"""Free-running generation against the reference's: how many tokens match, position by position."""

from __future__ import annotations

from dataclasses import dataclass

from ...store.errors import InputError
from ...store.manifest import PromptTokens
from ...store.trace import Trace
from ..align import match_prompts


@dataclass(frozen=True)
class GreedyMatch:
    """One prompt, greedy in both runs.

    Attributes:
        prompt: index in the reference.
        n_tokens: tokens that the reference generated.
        n_match: of these, positions with the same token in the run.
        first_difference: position of the first token that differs or is missing, None: all are the same.
        n_missing: tokens that the run did not generate since it ended earlier; they count as different.
        n_beyond: tokens that it generated beyond the reference's end.
    """

    prompt: int
    n_tokens: int
    n_match: int
    first_difference: int | None
    n_missing: int
    n_beyond: int


def greedy_matches(trace: Trace, reference: str, run: str) -> list[GreedyMatch]:
    """Compare the continuations of two free runs.

    Raises:
        TraceNotFoundError: the trace has no such run.
        InputError: the run was teacher-forced, shares no prompt with the reference, or generated nothing.
    """
    forced = [tokens for tokens in trace.manifest(run).tokens if tokens.forced_from is not None]
    if forced:
        raise InputError(
            f"run {run!r} was teacher-forced, so its tokens are not its own; capture it without --teacher, with "
            "--generate, and name that run with --greedy"
        )
    mine, others = _tokens(trace, reference), _tokens(trace, run)
    lengths = {prompt.prompt: prompt.n_tokens for prompt in trace.manifest(reference).prompts}
    pairs = [pair for pair in match_prompts(trace, reference, None, run) if pair.n_common is not None]
    found = [_match(pair.prompt, lengths[pair.prompt], mine[pair.prompt], others[pair.target]) for pair in pairs]
    found = [match for match in found if match.n_tokens]
    if not found:
        raise InputError(f"runs {reference!r} and {run!r} share no prompt that the reference continued (--generate)")
    return found


def runs_free(trace: Trace, run: str) -> bool:
    """Whether a run chose tokens of its own."""
    manifest = trace.manifest(run)
    lengths = {prompt.prompt: prompt.n_tokens for prompt in manifest.prompts}
    generated = [tokens for tokens in manifest.tokens if len(tokens.token_ids) > lengths.get(tokens.prompt, 0)]
    return bool(generated) and all(tokens.forced_from is None for tokens in generated)


def _tokens(trace: Trace, run: str) -> dict[int, PromptTokens]:
    return {tokens.prompt: tokens for tokens in trace.manifest(run).tokens}


def _match(prompt: int, length: int, reference: PromptTokens, run: PromptTokens) -> GreedyMatch:
    expected, got = reference.token_ids[length:], run.token_ids[length:]
    same = [a == b for a, b in zip(expected, got, strict=False)]
    first = next((index for index, equal in enumerate(same) if not equal), len(same))
    difference = None if first == len(expected) else length + first
    missing = max(len(expected) - len(got), 0)
    return GreedyMatch(prompt, len(expected), sum(same), difference, missing, max(len(got) - len(expected), 0))
