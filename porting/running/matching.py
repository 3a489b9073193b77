"""How many tokens of a port are the reference's: greedy, teacher-forced, and how many misses rounding explains.

A free run that takes another token once goes on with another text, so that every token after it counts as wrong. Forced
to the reference's tokens, each position is judged by itself. A first miss is explained if the lead that was overcome is
within what rounding does to the baseline at that position (fewer than three standard deviations).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...analyze.logits.greedy import GreedyMatch, greedy_matches
from ...analyze.sql_library import run_sql
from ...store.trace import Trace

#: Share of tokens that must be the reference's: the Autoport skill's criterion.
PASSES_AT = 0.95
#: A lead overcome of fewer standard deviations is an ordinary close call.
_CLOSE_CALL = 3.0
_ROWS = """
SELECT prompt, position, top1, flip_sigma, margin_ulp, reference_token, target_token
FROM logits WHERE comparison = ? ORDER BY prompt, position
"""


@dataclass(frozen=True)
class PromptTokenMatch:
    """One prompt.

    Attributes:
        prompt: its index.
        n_tokens: tokens that the reference generated.
        n_greedy: of these, tokens that the port's free run has at the same place.
        n_forced: positions at which the port, forced to the reference's tokens, chooses the same.
        n_forced_positions: positions that were judged.
        first_difference: position of the first token of the free run that differs; None if none does.
        explained: rounding explains that difference; None without one, or if nothing is known of the position.
        margin_ulp: the reference's lead there, in units of the last place of the target's dtype.
        ended_early: tokens that the free run lacks since it ended before the reference.
        beyond: tokens that it has beyond the reference's end.
    """

    prompt: int
    n_tokens: int
    n_greedy: int
    n_forced: int
    n_forced_positions: int
    first_difference: int | None
    explained: bool | None
    margin_ulp: float | None
    ended_early: int
    beyond: int


@dataclass(frozen=True)
class TokenMatch:
    """All prompts; see the properties."""

    prompts: tuple[PromptTokenMatch, ...]

    @property
    def greedy(self) -> float:
        """Share of the reference's tokens that the free run has too; missing and surplus ones count as different."""
        total = sum(one.n_tokens + one.beyond for one in self.prompts)
        return sum(one.n_greedy for one in self.prompts) / total if total else 0.0

    @property
    def forced(self) -> float:
        """Share of positions at which the forced port chooses the reference's token."""
        total = sum(one.n_forced_positions for one in self.prompts)
        return sum(one.n_forced for one in self.prompts) / total if total else 0.0

    @property
    def n_missed(self) -> int:
        """Tokens of free runs that are not the reference's."""
        return sum(one.n_tokens + one.beyond - one.n_greedy for one in self.prompts)

    @property
    def explained(self) -> float:
        """Share of missed tokens that follow a first miss which rounding explains; 1 without misses."""
        missed = [(one.n_tokens + one.beyond - one.n_greedy, one.explained) for one in self.prompts]
        total = sum(count for count, _ in missed)
        return sum(count for count, explained in missed if explained) / total if total else 1.0

    @property
    def verdict(self) -> str:
        """`pass` at 95 % greedy match; below it `undecided` where rounding explains every miss, else `fail`."""
        if self.greedy >= PASSES_AT:
            return "pass"
        return "undecided" if self.explained == 1.0 and self.forced >= PASSES_AT else "fail"

    @property
    def reason(self) -> str:
        """The verdict in words."""
        text = f"{self.greedy:.1%} of tokens match greedily, {self.forced:.1%} teacher-forced"
        if self.n_missed:
            text += f"; rounding explains {self.explained:.0%} of {self.n_missed} misses"
        return text


def token_match(trace: Trace, comparison: str, reference: str, free_run: str | None) -> TokenMatch:
    """Judge the tokens of a comparison whose logits were judged.

    Args:
        trace: the trace.
        comparison: name of the comparison of the forced run.
        reference: the reference run, which ran free.
        free_run: free run of the port; None if the forced one never chose another token, so that they are the same.

    Raises:
        InputError: the runs share no prompt.
    """
    rows: dict[int, dict[int, dict[str, object]]] = {}
    for row in run_sql(trace, _ROWS.replace("?", _quoted(comparison))).to_pylist():
        rows.setdefault(row["prompt"], {})[row["position"]] = row
    manifest = trace.manifest(reference)
    lengths = {prompt.prompt: prompt.n_tokens for prompt in manifest.prompts}
    if free_run is not None:
        matches: Sequence[GreedyMatch] = greedy_matches(trace, reference, free_run)
    else:
        counts = {one.prompt: len(one.token_ids) - lengths[one.prompt] for one in manifest.tokens}
        matches = [GreedyMatch(prompt, n, n, None, 0, 0) for prompt, n in counts.items() if n]
    return TokenMatch(tuple(_one(match, lengths[match.prompt], rows.get(match.prompt, {})) for match in matches))


def forced_misses(trace: Trace, comparison: str) -> int:
    """Generated positions at which a forced port chose another token."""
    statement = (
        f"SELECT count(*) AS n FROM logits WHERE comparison = {_quoted(comparison)} AND NOT coalesce(top1, false)"  # noqa: S608
    )
    return int(run_sql(trace, statement).to_pylist()[0]["n"])


def _one(match: GreedyMatch, length: int, rows: dict[int, dict[str, object]]) -> PromptTokenMatch:
    generated = [row for position, row in rows.items() if position >= length - 1]
    explained: bool | None = None
    margin: float | None = None
    first = match.first_difference
    if first is None and match.n_beyond:
        first = length + match.n_tokens
    if first is not None and (row := rows.get(first - 1)) is not None:
        sigma, lead = row["flip_sigma"], row["margin_ulp"]
        margin = float(lead) if isinstance(lead, float) else None
        explained = not row["top1"] and isinstance(sigma, float) and sigma < _CLOSE_CALL
    return PromptTokenMatch(
        match.prompt,
        match.n_tokens,
        match.n_match,
        sum(bool(row["top1"]) for row in generated),
        len(generated),
        first,
        explained,
        margin,
        match.n_missing,
        match.n_beyond,
    )


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
