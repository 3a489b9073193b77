"""Sums of two or three earlier sites: a residual connection that is lost, doubled, has another sign or a factor."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np

from .hypothesis import INHERITED, NUMBER, Prediction
from .inputs import SiteSum, best_view, earlier, find_source, sources
from .runs import FloatArray
from .scene import Scene

#: Factors nearer than this to one that has a name of its own are left to it.
_NEAR = 1e-3
#: Nearest sites of which three are summed.
_SUMMANDS = 7
#: Words in the names of those numbers of a config that belong on a branch.
_OF_BRANCHES = ("residual", "depth", "layers", "routed")


def residual(scene: Scene) -> Iterator[Prediction]:
    """A container's output that is a sum of sites, with one of them missing, counted twice or scaled."""
    if scene.site.port == "output" and (scene.site.module, "weight") in scene.runs.parameters:
        return
    source = find_source(scene, _sums(scene), lambda x: x)
    if source is None:
        return
    view = best_view(scene, [source])
    total = source.rows(view)
    if total is None:
        return
    yield Prediction(INHERITED, total, "the sum is right; what is added is not", "")
    for site in source.sites:
        kept, lost = SiteSum(tuple(other for other in source.sites if other != site)), SiteSum((site,))
        kept_rows, lost_rows = kept.rows(view), lost.rows(view)
        if kept_rows is None or lost_rows is None:
            continue
        yield Prediction(
            "missing_residual",
            kept_rows,
            f"{lost.name} is not added to {kept.name}",
            "add the residual in the layer, and return the sum",
            parameters={"lacks": lost.name},
        )
        yield Prediction(
            "doubled_residual",
            kept_rows + 2 * lost_rows,
            f"{lost.name} is added twice",
            "add the residual once: some norms of the port already return it",
            parameters={"twice": lost.name},
        )
        yield Prediction(
            "residual_sign",
            kept_rows - lost_rows,
            f"{lost.name} is subtracted instead of added",
            "add the residual",
            parameters={"subtracted": lost.name},
        )
        factor = scene.runs.config.number("residual_multiplier")
        if factor and factor != 1.0:
            yield Prediction(
                "residual_multiplier",
                kept_rows + lost_rows / factor,
                f"residual_multiplier ({factor:g}) is not applied to {lost.name}",
                "multiply a block's output by residual_multiplier of the config before it is added",
                parameters={"factor": factor},
            )
        yield from _factor(scene, kept_rows, lost_rows, lost.name)


def _sums(scene: Scene) -> Iterator[SiteSum]:
    """Sums of two earlier sites, then of three: a layer adds two blocks to what it is given."""
    for source in sources(scene, scene.features, sums=True, own=False):
        if len(source.sites) == 2:
            yield source
    near = [info.site for info in earlier(scene, scene.features)[:_SUMMANDS]]
    yield from (SiteSum(sites) for sites in combinations(near, 3))


def _factor(scene: Scene, kept: FloatArray, scaled: FloatArray, name: str) -> Iterator[Prediction]:
    """One of the summands has a factor, by least squares."""
    square = float(np.square(scaled).sum())
    factor = float((scaled * (scene.target - kept)).sum()) / square if square else 1.0
    if min(abs(factor - plain) for plain in (-1.0, 0.0, 1.0, 2.0)) < _NEAR:
        return
    known = scene.runs.config.name_factor(factor, 1e-2)
    names = [name for name in known if any(word in name for word in _OF_BRANCHES)]
    called = f", which is {' or '.join(names)}" if names else ""
    yield Prediction(
        "residual_multiplier",
        kept + factor * scaled,
        f"{name} is multiplied by {factor:.4g}{called} before it is added",
        "add all summands as they are, or with residual_multiplier where the config has one",
        NUMBER,
        1,
        {"factor": factor, "of": name, "equals": names},
    )


FAMILIES = (residual,)
