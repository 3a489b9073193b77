"""Inputs that say where to look rather than hold activations: attention masks, positions, indices.

How a mask is written (boolean or additive, over which keys, with which large number) depends on padding, chunking and
the attention that reads it, and no distance between two of them means anything. Where runs agree bit for bit, they are
compared; elsewhere they are left out: a wrong mask shows in the attention's output, a wrong position in the rotation,
a wrong index in what is looked up.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import numpy as np

from ..store.trace import Trace
from .align import AlignedSite
from .pairs import Gap, SiteMapping
from .sites import Site

REASON = "a mask or indices, no activations, and not the same in the runs; what follows from it is compared"

#: An additive mask hides a key with a number that no softmax survives; the least that implementations use is 1e4.
_HIDING = -1e4

# Statistics are of finite values: an additive mask is 0 where it is not its minimum, or infinite.
_MASKS = """
SELECT module, port, slot, call
FROM (
    SELECT *, list_product(shape)::BIGINT AS n, dtype = 'bool' OR dtype LIKE 'int%' OR dtype LIKE 'uint%' AS whole
    FROM tensors WHERE run = ? AND port = 'input' AND phase <> 'static'
)
GROUP BY ALL
HAVING bool_and(whole) OR (
    bool_and(n_nan = 0 AND (n_zero + n_inf = n OR (
        max <= 0 AND min <= $hiding AND abs(mean * (n - n_inf) - min * (n - n_inf - n_zero)) <= 1e-3 * abs(min)
    ))) AND bool_or(n_inf > 0 OR min <= $hiding)
)
"""


def masks_of(trace: Trace, run: str) -> frozenset[Site]:
    """Inputs of a run that are boolean, integer, or an additive mask: nothing but 0 and one very negative number."""
    statement = _MASKS.replace("$hiding", repr(_HIDING))
    rows = trace.query(statement, [run]).to_pylist()
    return frozenset(Site(row["module"], row["port"], row["slot"], row["call"]) for row in rows)


def accounted(mapping: SiteMapping, masks: Collection[Site], compared: Collection[Site]) -> SiteMapping:
    """Skip the masks that were not compared, also those that the target has no counterpart of."""
    pairs = tuple(pair for pair in mapping.pairs if pair.reference not in masks or pair.reference in compared)
    open_masks = {gap.site for gap in mapping.gaps if gap.site in masks and gap.status == "unmatched" and not gap.final}
    left_out = dict.fromkeys([*open_masks, *(pair.reference for pair in mapping.pairs if pair not in pairs)])
    gaps = [gap for gap in mapping.gaps if gap.site not in left_out]
    return replace(mapping, pairs=pairs, gaps=(*gaps, *(Gap(site, "skipped", REASON) for site in left_out)))


def agree(aligned: Mapping[str, Mapping[int, AlignedSite]]) -> bool:
    """Whether the target holds, bit for bit, what the reference or the baseline holds, at all shared positions."""
    return bool(aligned) and all(_equal(site) for sites in aligned.values() for site in sites.values())


def _equal(site: AlignedSite) -> bool:
    if site.clash():
        return False
    others: Iterable[bool] = (
        np.array_equal(triple.target, triple.reference)
        or (triple.baseline is not None and np.array_equal(triple.target, triple.baseline))
        for triple in site
    )
    return all(others)
