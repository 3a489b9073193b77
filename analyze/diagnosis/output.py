"""The two ends of a model: the softcap on logits, and embeddings of a vocabulary that is split over ranks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.optimize import minimize_scalar

from .hypothesis import INHERITED, Prediction
from .inputs import best_view, find_source, sources
from .linear import PARTS
from .runs import FloatArray
from .scene import Scene

_CAPS = (30.0, 50.0, 20.0, 15.0)
#: How many times as much a usual cap must leave for another to be preferred.
_CLEARLY = 1.1


def _capped(x: FloatArray, cap: float) -> FloatArray:
    return np.asarray(cap * np.tanh(x / cap))


def softcap(scene: Scene) -> Iterator[Prediction]:
    """c tanh(x / c) on the logits, missing or extra."""
    name = scene.site.module.rpartition(".")[2]
    if name not in ("", "lm_head", "model", "output") or scene.site.port != "output":
        return
    remedy = "apply final_logit_softcapping of the config to the logits, in float32, where the model has one"
    told = scene.runs.config.number("final_logit_softcapping", "output_softcap")
    if told:
        source = find_source(scene, sources(scene, scene.features, sums=False, own=False), lambda x: _capped(x, told))
        x = None if source is None else source.rows(best_view(scene, [source]))
        if x is not None:
            yield Prediction(INHERITED, _capped(x, told), "the softcap is right; the logits are not", "")
            yield Prediction("output_softcap", x, f"the softcap of {told:g} on the logits is missing", remedy)
            yield Prediction(
                "output_softcap", _capped(_capped(x, told), told), "the softcap on the logits is applied twice", remedy
            )
            return
    cap = _fitted_cap(scene)
    yield Prediction(
        "output_softcap",
        _capped(scene.expected, cap),
        f"a softcap of {cap:.4g} is applied to the logits",
        remedy,
        fitted=1,
        parameters={"softcap": cap},
    )


def _fitted_cap(scene: Scene) -> float:
    """The cap that explains the target best: a usual one, or any other where it fits clearly better."""

    def misfit(log_cap: float) -> float:
        return float(np.linalg.norm(_capped(scene.expected, float(np.exp(log_cap))) - scene.target))

    largest = float(np.abs(scene.target).max())
    bounds = (np.log(max(largest, 1e-3)), np.log(max(1e3, 2 * largest)))
    fitted = float(minimize_scalar(misfit, bounds=bounds, method="bounded", options={"xatol": 1e-4}).x)
    usual = min(_CAPS, key=lambda cap: misfit(np.log(cap)))
    return usual if misfit(np.log(usual)) <= _CLEARLY * misfit(fitted) else float(np.exp(fitted))


def embedding_shards(scene: Scene) -> Iterator[Prediction]:
    """Only the ids of one rank's part of the vocabulary are looked up; the others are zero, or read a wrong row."""
    size = scene.runs.config.number("vocab_size")
    if not size or "embed" not in scene.site.module.lower() or not (scene.positions >= 0).all():
        return
    ids = _ids(scene)
    if ids is None:
        return
    table = scene.runs.parameters.get((scene.site.module, "weight"))
    remedy = "take the rank from a tensor (SPMDRank, rank_util.rank = arange(tp)), not from Python while tracing"
    yield from _one_range(scene, ids, remedy)
    for parts in (parts for parts in PARTS if size % parts == 0):
        width = int(size) // parts
        for rank in range(min(parts, 8)):
            inside = (ids // width == rank)[:, None]
            if inside.all():
                continue
            facts = {"rank": rank, "parts": parts}
            summary = f"only ids of part {rank} of {parts} of the vocabulary are looked up; the others are zero"
            yield Prediction(
                "embedding_shard", np.where(inside, scene.reference, 0.0), summary, remedy, parameters=facts
            )
        if table is not None and table.shape == (size, scene.features):
            scale = _scale(scene, table, ids)
            summary = f"ids beyond part 0 of {parts} of the vocabulary read a row of part 0"
            yield Prediction(
                "embedding_shard", scale * table[ids % width], summary, remedy, parameters={"parts": parts}
            )


def _one_range(scene: Scene, ids: np.ndarray, remedy: str) -> Iterator[Prediction]:
    """Ids of one range are looked up and all others are zero: a shard of any size, as of a padded vocabulary."""
    zero = np.asarray(~scene.target.any(axis=1) & scene.reference.any(axis=1))
    if zero.all() or not zero.any():
        return
    first, last = int(ids[~zero].min()), int(ids[~zero].max())
    if ((ids >= first) & (ids <= last))[zero].any():
        return
    yield Prediction(
        "embedding_shard",
        np.where(zero[:, None], 0.0, scene.reference),
        f"only ids from {first} to {last} are looked up; the others, {zero.mean():.0%} of the tokens, are zero",
        remedy,
        fitted=2,
        parameters={"first_id": first, "last_id": last, "share_zero": float(zero.mean())},
    )


def _ids(scene: Scene) -> np.ndarray | None:
    """Token ids of the rows, None when nobody recorded them."""
    found = []
    for prompt, position in zip(scene.rows.prompts, scene.positions, strict=True):
        tokens = scene.runs.tokens(int(prompt))
        if position >= len(tokens):
            return None
        found.append(tokens[int(position)])
    return np.asarray(found)


def _scale(scene: Scene, table: FloatArray, ids: np.ndarray) -> float:
    """The factor that the reference applies to its embeddings."""
    rows = table[ids]
    square = float(np.square(rows).sum())
    return float((rows * scene.reference).sum()) / square if square else 1.0


FAMILIES = (softcap, embedding_shards)
