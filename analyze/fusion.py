"""Where a projection lies in a fused one, also when tensor parallelism fuses it rank by rank."""

from __future__ import annotations

from collections.abc import Sequence

from .ranks import Columns
from .sites import SiteInfo


def columns_of_part(index: int, widths: Sequence[int | None], target: SiteInfo) -> Columns | None:
    """Ranges of a fused site's features that belong to one of its parts, or None if the widths do not add up.

    On one rank the parts follow one another. A fused projection that is split over ranks is fused on each of them:
    rank 0's share of every part, then rank 1's. Parts after the first may be held by several consecutive ranks each
    (KV heads that are fewer than the ranks).

    Args:
        index: which part.
        widths: features of all parts, in order.
        target: the fused site; its `shards` are the ranks that it is split over.
    """
    known = [width for width in widths if width is not None]
    if target.features is None or len(known) < len(widths):
        return None
    ranks = target.shards
    if target.features % ranks or known[0] % ranks:
        return None
    shares = _shares(known, target.features // ranks, ranks)
    if shares is None:
        return None
    start = sum(shares[:index])
    copies = shares[index] * ranks // known[index]
    block = target.features // ranks
    spans = [(rank * block + start, rank * block + start + shares[index]) for rank in range(0, ranks, copies)]
    return _merged(spans)


def _shares(widths: Sequence[int], block: int, ranks: int) -> list[int] | None:
    """Features of every part on one rank."""
    first = widths[0] // ranks
    even = [width // ranks for width in widths]
    if sum(even) == block and all(width % ranks == 0 for width in widths):
        return even
    rest, others = block - first, widths[1:]
    if not others or len(set(others)) > 1 or rest % len(others):
        return None
    share = rest // len(others)
    copies, uneven = divmod(share * ranks, others[0])
    if uneven or copies < 1 or ranks % copies or share > others[0]:
        return None
    return [first, *[share] * len(others)]


def _merged(spans: Sequence[tuple[int, int]]) -> Columns:
    merged = [spans[0]]
    for start, stop in spans[1:]:
        if start == merged[-1][1]:
            merged[-1] = merged[-1][0], stop
        else:
            merged.append((start, stop))
    return tuple(merged)
