"""Ranking entries by the words of a question: BM25 (Robertson and Zaragoza 2009, section 3) over weighted fields."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from .entries import Entry, entries

#: Saturation of repeated words, and how much a long entry is discounted; the usual values.
_K1, _B = 1.2, 0.75
#: How often a word of a field counts.
_WEIGHTS = {"id": 3, "title": 3, "symptom": 2, "cause": 1, "remedy": 1, "misread": 1, "area": 2}
_WORD = re.compile(r"[a-z]+|\d+(?:\.\d+)?")
_SUFFIXES = ("ations", "ation", "ings", "ing", "ized", "ised", "ies", "ed", "es", "s")


@dataclass(frozen=True)
class Hit:
    """An entry and how well it fits, above 0; only the order means something."""

    entry: Entry
    score: float


def search(text: str, *, limit: int = 10) -> list[Hit]:
    """Entries that share words with a question, the best first.

    Args:
        text: any words; an id or a cause finds its entry first.
        limit: how many at most.
    """
    wanted = words(text)
    counted, frequency = _index()
    mean = sum(sum(counts.values()) for counts in counted.values()) / max(len(counted), 1)
    hits = []
    for name, counts in counted.items():
        length = sum(counts.values()) / mean
        score = sum(
            _rarity(frequency[word], len(counted))
            * counts[word]
            * (_K1 + 1)
            / (counts[word] + _K1 * (1 - _B + _B * length))
            for word in wanted
            if counts[word]
        )
        if score > 0:
            hits.append(Hit(entries()[name], score))
    return sorted(hits, key=lambda hit: (-hit.score, hit.entry.id))[:limit]


def words(text: str) -> list[str]:
    """Words of a text in lower case, without endings; the ranking weighs those that every text has next to nothing."""
    return [_stem(word) for word in _WORD.findall(text.lower().replace("_", " "))]


def _stem(word: str) -> str:
    """A word without its ending, so that `norms` finds `norm` and `scaled` finds `scaling`."""
    for suffix in _SUFFIXES:
        if word.endswith(suffix) and len(word) - len(suffix) >= 3:
            word = word.removesuffix(suffix)
            break
    return word.removesuffix("e") if len(word) > 4 else word


def _rarity(n_with: int, n: int) -> float:
    return math.log(1 + (n - n_with + 0.5) / (n_with + 0.5))


@cache
def _index() -> tuple[Mapping[str, Counter[str]], Counter[str]]:
    """Weighted word counts by entry, and the number of entries that have a word."""
    counted: dict[str, Counter[str]] = {}
    for name, item in entries().items():
        counts: Counter[str] = Counter()
        for field, weight in _WEIGHTS.items():
            for word in words(getattr(item, field)):
                counts[word] += weight
        for word in words(" ".join(item.findings)):
            counts[word] += 2
        counted[name] = counts
    frequency: Counter[str] = Counter(word for counts in counted.values() for word in counts)
    return counted, frequency
