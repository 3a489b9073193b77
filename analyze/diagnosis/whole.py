"""What can be said without recomputing anything: values that are not finite, shapes that do not fit."""

from __future__ import annotations

import numpy as np

from .origins import Origin
from .ranking import UNKNOWN, Decision, stated
from .runs import ComparedRuns
from .scene import Scene

_LARGEST = {"float16": 65504.0, "bfloat16": 3.3895e38, "float32": 3.4028e38}


def unreadable(runs: ComparedRuns, origin: Origin) -> Decision:
    """A suspect whose values cannot be aligned: its size differs, or depends on the data."""
    known = runs.sites.get(origin.site), runs.target_sites.get(origin.target_site)
    if None in known or origin.state != "shape_mismatch":
        return Decision(UNKNOWN, None, None, 0.0, "its values cannot be aligned or were not recorded")
    ours, theirs = (info.features if info is not None else None for info in known)
    if ours is None or theirs is None or ours == theirs:
        reason = "the size of its tensors depends on the data (routed tokens, a mask): look at the sites before it"
        return Decision(UNKNOWN, None, None, 0.0, reason)
    return stated(
        "shape_mismatch",
        f"the target holds {theirs} elements per token, the reference {ours}",
        "check sharding, padding and transposition of this module, or say in a mapping file how the two correspond",
        {"reference": ours, "target": theirs},
    )


def broken(scene: Scene) -> Decision | None:
    """NaN or infinities that the target alone has; None when everything is finite."""
    if scene.finite:
        return None
    bad = ~np.isfinite(scene.target) & np.isfinite(scene.reference)
    if not bad.any():
        return Decision(UNKNOWN, None, None, 0.0, "the reference or the baseline itself holds NaN or infinities")
    largest = _LARGEST.get(scene.runs.target_dtype, np.inf)
    beyond = np.abs(scene.reference) > largest
    n_nan = int(np.isnan(scene.target[bad]).sum())
    facts = {"n": int(bad.sum()), "n_nan": n_nan, "n_inf": int(bad.sum()) - n_nan}
    if (beyond & bad).sum() >= 0.9 * bad.sum():
        return stated(
            "overflow",
            f"the reference's values exceed the largest {scene.runs.target_dtype}, {largest:.5g}",
            "run this module in bfloat16 or float32, or rescale what enters it",
            {**facts, "largest": float(np.abs(scene.reference).max())},
        )
    rows = bad.any(axis=1)
    whole_rows = bool(bad[rows].all())
    return stated(
        "nonfinite",
        f"{int(bad.sum())} values are NaN or infinite here first, in {rows.mean():.0%} of the tokens"
        + (" (all features of a token)" if whole_rows else ""),
        "look at divisions, square roots, masks with every key hidden, and uninitialised memory in this module",
        {**facts, "whole_tokens": whole_rows},
    )
