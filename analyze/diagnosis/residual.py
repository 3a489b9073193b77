"""Sums of two earlier sites: a residual connection that is lost, doubled or has another sign."""

from __future__ import annotations

from collections.abc import Iterator

from .hypothesis import INHERITED, Prediction
from .inputs import SiteSum, best_view, find_source, sources
from .scene import Scene


def residual(scene: Scene) -> Iterator[Prediction]:
    """A container's output that is the sum of two sites, with one of them missing or counted twice."""
    if scene.site.port == "output" and (scene.site.module, "weight") in scene.runs.parameters:
        return
    pairs = (source for source in sources(scene, scene.features, sums=True, own=False) if len(source.sites) == 2)
    source = find_source(scene, pairs, lambda x: x)
    if source is None:
        return
    view = best_view(scene, [source])
    one, other = (SiteSum((site,)) for site in source.sites)
    a, b = one.rows(view), other.rows(view)
    if a is None or b is None:
        return
    yield Prediction(INHERITED, a + b, "the sum is right; what is added is not", "")
    for kept, lost, kept_rows, lost_rows in ((one, other, a, b), (other, one, b, a)):
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


FAMILIES = (residual,)
