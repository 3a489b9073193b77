"""Where in a tensor the error sits: tokens, features, heads; and whether weights agree."""

from __future__ import annotations

from typing import Any

import numpy as np

from .scene import Scene

#: A token, feature or head counts as affected when its error is this many times the noise.
_AFFECTED = 3.0


def where(scene: Scene) -> dict[str, Any]:
    """Shares of tokens, features and heads whose error is beyond the noise, and the first such token position."""
    r, t = scene.reference, scene.target
    with np.errstate(invalid="ignore", over="ignore"):
        error, size = np.square(t - r), np.square(r)
    bound = (_AFFECTED * scene.noise) ** 2
    tokens = ~(error.sum(axis=1) <= bound * np.maximum(size.sum(axis=1), 1e-300))
    features = ~(error.sum(axis=0) <= bound * np.maximum(size.sum(axis=0), size.sum() / max(r.shape[1], 1)))
    facts: dict[str, Any] = {"tokens": float(tokens.mean()), "features": float(features.mean())}
    if tokens.any():
        facts["first_position"] = int(scene.positions[tokens].min())
        facts["last_good_position"] = int(scene.positions[~tokens].max()) if not tokens.all() else None
    head = scene.runs.config.head_dim
    if head and r.shape[1] % head == 0 and r.shape[1] > head:
        by_head = error.reshape(len(r), -1, head).sum(axis=(0, 2))
        heads = ~(by_head <= bound * size.reshape(len(r), -1, head).sum(axis=(0, 2)))
        facts["heads"] = float(heads.mean())
        if 0 < heads.sum() <= min(8, heads.size - 1):
            facts["which_heads"] = [int(head) for head in np.flatnonzero(heads)]
    return facts


def weights(scene: Scene) -> str:
    """Whether the target's recorded weight is the reference's: `same`, how much it differs, or `not recorded`."""
    ours = scene.runs.parameters.get((scene.site.module, "weight"))
    theirs = scene.runs.target_parameters.get((scene.counterpart.site.module, "weight"))
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return "not recorded"
    apart = float(np.linalg.norm(theirs - ours) / max(np.linalg.norm(ours), 1e-300))
    return "same" if apart <= 2 * 2.0**-8 else f"differs by {apart:.3g} (relative L2)"
