"""Hypotheses that move values: features in another order, another site's values, another token's."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
from scipy.spatial import cKDTree

from ..layout_search import as_ranges, find_features
from .hypothesis import LAW, PATTERN, Prediction
from .runs import FloatArray, IntArray
from .scene import REFERENCE, Scene

#: Rows on which a rearrangement is searched, and sites of the same width that are tried.
_SEARCH_ROWS, _OTHERS = 64, 48
_LAYER = re.compile(r"(?<=layers\.)\d+|(?<=\bh\.)\d+")
_SHIFTS = (-1, 1, -2, 2, -3, 3)
_HEADS = ("lm_head", "embed_out", "output")
#: Blocks that a tensor is taken to consist of at most.
_MOST_PARTS = 64
#: A rearrangement is believed to be one when it leaves no more than this many times the noise.
_NEAR = 4.0
#: Rows from which features are told apart, and features among which any order is searched.
_TELLING_ROWS, _MOST_SCATTERED = 16, 8192


def permuted(scene: Scene) -> Iterator[Prediction]:
    """The target's features are the reference's in another order: heads, interleaved pairs, shards."""
    found = _regular_order(scene) or _any_order(scene)
    if found is None:
        return
    what, order = found
    columns = as_ranges(order)
    head = scene.runs.config.head_dim
    by_heads = bool(head and all((stop - start) % head == 0 for start, stop in columns))
    cause = "head_order" if by_heads and scene.site.module.rpartition(".")[2] not in _HEADS else "feature_order"
    if scene.site.module.rpartition(".")[2] in _HEADS:
        cause = "vocabulary_shards"
    yield Prediction(
        cause,
        scene.expected[:, order],
        f"all values are there, in another order: {what}",
        "gather the shards in rank order, and check how the weight was split before sharding"
        if cause == "vocabulary_shards"
        else "reorder the rows of this module's weight while converting the checkpoint (heads, interleaving, shards)",
        PATTERN,
        0,
        {"order": what, "ranges": [list(span) for span in columns[:16]], "n_ranges": len(columns)},
    )


def _regular_order(scene: Scene) -> tuple[str, IntArray] | None:
    """The order that explains the target best among those that a program makes; None when none comes near."""
    rows = slice(0, _SEARCH_ROWS)
    r, t = scene.expected[rows], scene.target[rows]
    size = float(np.linalg.norm(t))
    best: tuple[float, str, IntArray] | None = None
    for what, order in _orders(scene.features, scene.runs.config.head_dim):
        left = float(np.linalg.norm(t - r[:, order]))
        if left <= _NEAR * scene.noise * size and (best is None or left < best[0]):
            best = left, what, order
    return None if best is None else best[1:]


def _orders(size: int, head: int | None) -> Iterator[tuple[str, IntArray]]:
    """Blocks rotated, reversed or exchanged in pairs; two factors transposed, of the whole or within each head."""
    plain = np.arange(size)
    for parts in (parts for parts in range(2, min(size, _MOST_PARTS) + 1) if size % parts == 0):
        blocks = plain.reshape(parts, -1)
        width = size // parts
        yield f"{parts} blocks of {width} in reverse order", blocks[::-1].reshape(-1)
        if parts > 2:
            yield f"{parts} blocks of {width} rotated by one", np.roll(blocks, 1, axis=0).reshape(-1)
            yield f"{parts} blocks of {width} rotated back by one", np.roll(blocks, -1, axis=0).reshape(-1)
        if parts % 2 == 0 and parts > 2:
            yield f"neighbouring blocks of {width} exchanged", blocks.reshape(-1, 2, width)[:, ::-1].reshape(-1)
        if width > 1:
            yield f"[{parts}, {width}] transposed", blocks.T.reshape(-1)
        if width > _MOST_PARTS:
            yield f"[{width}, {parts}] transposed", plain.reshape(width, parts).T.reshape(-1)
    if head and size % head == 0 and size > head and head % 2 == 0:
        heads = plain.reshape(-1, head)
        yield "halves of each head interleaved", heads.reshape(-1, 2, head // 2).swapaxes(1, 2).reshape(-1)
        yield "pairs of each head separated", heads.reshape(-1, head // 2, 2).swapaxes(1, 2).reshape(-1)


def _any_order(scene: Scene) -> tuple[str, IntArray] | None:
    """Any rearrangement of runs of features, found by values."""
    r, t = scene.expected[:_SEARCH_ROWS], scene.target[:_SEARCH_ROWS]
    tolerance = min(_NEAR * scene.noise, 0.25)
    found = find_features(t, r, tolerance=tolerance)
    if found is None or found.columns is None:
        return _scattered(r, t, tolerance)
    listed = ", ".join(f"{start}:{stop}" for start, stop in found.columns[:6])
    what = f"features {listed}{', ...' if len(found.columns) > 6 else ''}"
    return what, np.concatenate([np.arange(*span) for span in found.columns])


def _scattered(r: FloatArray, t: FloatArray, tolerance: float) -> tuple[str, IntArray] | None:
    """An order without any rule, if every feature is found exactly once; some quantisers sort them by importance."""
    if len(r) < _TELLING_ROWS or r.shape[1] > _MOST_SCATTERED or not (np.isfinite(r).all() and np.isfinite(t).all()):
        return None
    order: IntArray = cKDTree(r.T).query(t.T)[1].astype(np.int64)
    if len(np.unique(order)) < len(order) or (order == np.arange(len(order))).all():
        return None
    if np.linalg.norm(r[:, order] - t) > tolerance * np.linalg.norm(t):
        return None
    return f"no rule is seen in it, {int((order != np.arange(len(order))).sum())} of {len(order)} are elsewhere", order


def other_site(scene: Scene) -> Iterator[Prediction]:
    """The target holds what another site of the reference holds: siblings exchanged, outputs in another order."""
    layer = _LAYER.search(scene.site.module)
    parent, _, leaf = scene.site.module.rpartition(".")
    near = {
        name: info
        for name, info in scene.runs.sites.items()
        if info.features == scene.features and info.positioned and name != scene.site.name
    }
    siblings = [name for name, info in near.items() if info.site.module.rpartition(".")[0] == parent]
    same = [name for name, info in near.items() if info.site.module.rpartition(".")[2] == leaf and name not in siblings]
    view = scene.view(REFERENCE)
    head = slice(0, _SEARCH_ROWS)
    for name in (*siblings, *same)[:_OTHERS]:
        values = view.rows(near[name].site)
        if values is None or np.linalg.norm((values - scene.target)[head]) > 0.5 * np.linalg.norm(values[head]):
            continue
        if np.linalg.norm((values - scene.reference)[head]) <= scene.noise * np.linalg.norm(values[head]):
            continue
        module = near[name].site.module
        where = "sibling" if name in siblings else "layer" if layer else "module"
        yield Prediction(
            "exchanged_projections" if name in siblings else "another_weight",
            values,
            f"the target holds the values of {name}",
            f"{leaf} and {module.rpartition('.')[2]} are exchanged: check the names in the checkpoint conversion, "
            "and the order in which a fused projection is split"
            if where == "sibling"
            else f"this module computes with what belongs to {module}: check the layer numbers of the conversion",
            LAW,
            0,
            {"holds": name},
        )


def other_token(scene: Scene) -> Iterator[Prediction]:
    """The target holds what belongs to a token some positions before or after."""
    if "rotary" in scene.site.module.lower():  # there a token is its position, which `rotary` tests
        return
    sequences = scene.view(REFERENCE).sequences(scene.site)
    if sequences is None or (scene.positions < 0).any():
        return
    for shift in _SHIFTS:
        values = np.empty_like(scene.target)
        moved = 0
        for prompt, sequence in sequences.items():
            span = scene.rows.of_prompt(prompt)
            wanted = scene.positions[span] + shift
            inside = (wanted >= 0) & (wanted < len(sequence))
            values[span] = np.where(
                inside[:, None], sequence[np.clip(wanted, 0, len(sequence) - 1)], scene.reference[span]
            )
            moved += int(inside.sum())
        if moved < max(1, len(values) // 2):
            continue
        yield Prediction(
            "token_shift",
            values,
            f"the target holds the values of the token {abs(shift)} {'before' if shift < 0 else 'after'}",
            "check the index of the last real token (padding side, off by one) or the shift of the positions",
            LAW,
            0,
            {"shift": shift},
        )


FAMILIES = (permuted, other_site, other_token)
