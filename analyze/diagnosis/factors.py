"""Elementwise hypotheses: a factor or an offset for the whole site, for each feature or for each token."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .hypothesis import DESCRIPTION, LAW, NUMBER, PATTERN, Prediction
from .scene import Scene

#: Factors nearer to 1 than this are not worth a name.
_TRIVIAL = 1e-3
#: Share of elements at one extreme from which on values count as clipped.
_CLIPPED = 1e-3


def multiplier(scene: Scene) -> Iterator[Prediction]:
    """t = c r: a factor left out, applied twice or put in; named where the config has the number."""
    r, t = scene.expected, scene.target
    square = float(np.square(r).sum())
    if square == 0.0:
        return
    factor = float((r * t).sum()) / square
    if abs(factor - 1) < _TRIVIAL or abs(factor) < _TRIVIAL:
        return
    error = float(np.linalg.norm(t - factor * r)) / np.sqrt(square)
    tolerance = float(np.clip(3 * error / np.sqrt(r.size) / abs(factor), 1e-5, 1e-2))
    if scene.runs.target_dtype != "float32":
        tolerance = max(tolerance, 2e-3)
    names = scene.runs.config.name_factor(factor, tolerance)
    called = f", which is {' or '.join(names)}" if names else ""
    ranks = scene.runs.target_ranks
    if ranks > 1 and abs(factor / ranks - 1) <= tolerance:
        yield Prediction(
            "doubled_all_reduce",
            ranks * r,
            f"the target is {ranks} times what it should be, once for every tensor-parallel rank",
            "reduce once: the layer already does it, or its input is not sharded",
            parameters={"ranks": ranks},
        )
    yield Prediction(
        "multiplier",
        factor * r,
        f"the target is {factor:.4g} times what it should be{called}",
        f"look for {names[0].removeprefix('1 / ')} in the port's code: the reference applies it elsewhere or not at all"
        if names
        else "look for a factor that one of the two models applies here and the other does not",
        NUMBER,
        1,
        {"factor": factor, "inverse": 1 / factor, "equals": names},
    )


def bias(scene: Scene) -> Iterator[Prediction]:
    """t = r + d with one d per feature: a bias missing (d = -bias), doubled (d = bias) or not this one."""
    stored = scene.runs.parameters.get((scene.site.module, "bias"))
    if stored is not None and stored.size == scene.features and np.any(stored):
        ranks = scene.runs.target_ranks
        every = [("doubled_bias", ranks - 1.0, f"is added once on each of {ranks} ranks")] if ranks > 2 else []
        for cause, factor, what in (
            ("missing_bias", -1.0, "is not added"),
            ("doubled_bias", 1.0, "is added twice"),
            *every,
        ):
            yield Prediction(
                cause,
                scene.expected + factor * stored.reshape(-1),
                f"the bias of {scene.site.module} {what}",
                "load the bias (many checkpoint converters drop it) and enable it in the port's layer"
                if factor < 0
                else "add the bias on one rank only, or after the all-reduce",
            )
    if len(scene.target) < 4:
        return
    offset = (scene.target - scene.expected).mean(axis=0)
    yield Prediction(
        "feature_offset",
        scene.expected + offset,
        "every feature is off by a constant of its own",
        "compare the bias of this module, or of what it adds, with the checkpoint",
        DESCRIPTION,
        scene.features,
        {"rms_offset": float(np.sqrt(np.square(offset).mean()))},
    )


def feature_gain(scene: Scene) -> Iterator[Prediction]:
    """t = r g with one g per feature: a norm weight or a per-channel scale that is not the checkpoint's."""
    r, t = scene.expected, scene.target
    if len(t) < 4:
        return
    square = np.square(r).sum(axis=0)
    gain = np.where(square > 0, (r * t).sum(axis=0) / np.maximum(square, 1e-300), 1.0)
    yield Prediction(
        "feature_gain",
        r * gain,
        f"every feature is scaled by a factor of its own, from {gain.min():.3g} to {gain.max():.3g}",
        "compare the weight of the norm, or the per-channel scales, with the checkpoint",
        DESCRIPTION,
        scene.features,
        {"lowest": float(gain.min()), "highest": float(gain.max())},
    )


def token_factor(scene: Scene) -> Iterator[Prediction]:
    """t = s r with one s per token: a normalisation over the features, or a routing weight, is off."""
    r, t = scene.expected, scene.target
    if scene.features < 4:
        return
    square = np.square(r).sum(axis=1)
    factor = np.where(square > 0, (r * t).sum(axis=1) / np.maximum(square, 1e-300), 1.0)
    yield Prediction(
        "token_factor",
        r * factor[:, None],
        f"every token is scaled by a factor of its own, from {factor.min():.3g} to {factor.max():.3g}",
        "look at what is computed once per token: the statistics of a norm, a routing weight, a position's scale",
        DESCRIPTION,
        len(t),
        {"lowest": float(factor.min()), "highest": float(factor.max())},
    )


def clipped(scene: Scene) -> Iterator[Prediction]:
    """t = clip(r): values saturate, as in FP8 or FP16, or a limit was put in."""
    r, t = scene.expected, scene.target
    low, high = float(t.min()), float(t.max())
    tops = float((t == high).mean()) + float((t == low).mean())
    beyond = float(((r > high) | (r < low)).mean())
    if tops < _CLIPPED or beyond < _CLIPPED / 2 or low == high:
        return
    yield Prediction(
        "clipped_values",
        np.clip(r, low, high),
        f"values are cut off at {low:.4g} and {high:.4g}; {beyond:.2%} of the reference's lie beyond",
        "look for a clamp, or a dtype of too small a range (FP8 ends at 448 or 240, FP16 at 65504)",
        NUMBER,
        2,
        {"low": low, "high": high, "share_beyond": beyond},
    )


def lost_parts(scene: Scene) -> Iterator[Prediction]:
    """Features that are zero, or blocks of features that repeat the first: shards lost or the same on every rank."""
    r, t = scene.expected, scene.target
    zero = ~t.any(axis=0) & r.any(axis=0)
    if zero.any() and not zero.all():
        first, last = np.flatnonzero(zero)[[0, -1]]
        yield Prediction(
            "lost_shard",
            np.where(zero, 0.0, r),
            f"{int(zero.sum())} of {zero.size} features, between {first} and {last}, are zero",
            "a rank's part is not loaded or not gathered: check the sharding of this module's weight",
            PATTERN,
            0,
            {"features": int(zero.sum()), "first": int(first), "last": int(last)},
        )
    for parts in (2, 4, 8, 16, 32, 64):
        if scene.features % parts:
            break
        width = scene.features // parts
        blocks = t.reshape(len(t), parts, width)
        if np.array_equal(blocks[:, 0], blocks[:, 1]) and (blocks == blocks[:, :1]).all():
            yield Prediction(
                "same_shard_everywhere",
                np.tile(r[:, :width], parts),
                f"all {parts} parts of {width} features are the first one",
                "every rank uses rank 0's shard: take the rank from a tensor (SPMDRank), not from Python while tracing",
                LAW,
                0,
                {"parts": parts},
            )


FAMILIES = (multiplier, bias, feature_gain, token_factor, clipped, lost_parts)
