"""Recognising output that is none: repeated, empty, or made of a single token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

#: A period this often in a row at the end of an answer is a loop, and it must cover this many tokens.
_TIMES, _LEAST = 4, 12
_LONGEST_PERIOD = 16
#: Share of distinct tokens below which a longer answer says next to nothing.
_DISTINCT = 0.1


def incoherence(tokens: Sequence[int], *, special: frozenset[int] = frozenset(), text: str | None = None) -> str:
    """Why an answer is no text, or empty if it may be.

    Args:
        tokens: its tokens, without the prompt.
        special: ids of special tokens.
        text: the decoded answer, if there is a tokenizer.
    """
    if not tokens or all(token in special for token in tokens):
        return "the answer is empty: the first token is a special one" if tokens else "the answer is empty"
    tokens = list(tokens)
    while tokens[-1] in special:
        tokens.pop()
    if len(set(tokens)) == 1 and len(tokens) >= _TIMES:
        return f"the same token {len(tokens)} times"
    for period in range(1, _LONGEST_PERIOD + 1):
        times = _repeats(tokens, period)
        if times >= _TIMES and times * period >= min(_LEAST, len(tokens) // 2 + 1):
            return f"the last {period} tokens are repeated {times} times"
    if len(tokens) >= 2 * _LONGEST_PERIOD and len(Counter(tokens)) < _DISTINCT * len(tokens):
        return f"{len(Counter(tokens))} different tokens among {len(tokens)}"
    if text is not None and text and sum(character == "\ufffd" for character in text) > 0.2 * len(text):
        return "a fifth of the text is not decodable"
    return ""


def _repeats(tokens: Sequence[int], period: int) -> int:
    """How often the last `period` tokens stand in a row at the end."""
    block = list(tokens[-period:])
    times = 0
    end = len(tokens)
    while end >= period and list(tokens[end - period : end]) == block:
        times += 1
        end -= period
    return times
