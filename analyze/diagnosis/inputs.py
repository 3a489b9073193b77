"""What a site was computed from: recorded inputs, earlier outputs or their sums; recomputing the reference tells."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Protocol, TypeVar

import numpy as np

from ..routed_tokens import Expert
from ..sites import Site, SiteInfo
from .runs import FloatArray, IntArray
from .scene import REFERENCE, TARGET, Scene, View

#: Earlier sites of the right width that are tried, and rows on which.
_CANDIDATES, _ROWS = 10, 48
#: A law is believed when it recomputes the reference to this relative error (float32 kernels round and reorder), or to
#: this share of the baseline's error.
_EXACT, _OF_NOISE = 2e-5, 0.25


@dataclass(frozen=True)
class InputVariant:
    """An input that is wrong in one way: `[tokens, features]`, and what that would mean."""

    cause: str
    rows: FloatArray
    summary: str
    remedy: str
    parameters: dict[str, Any] = field(default_factory=dict)


class Source(Protocol):
    """Where an input comes from."""

    @property
    def name(self) -> str:
        """How it is written."""

    def rows(self, view: View) -> FloatArray | None:
        """Its values on the scene's tokens, None when something is missing."""

    def variants(self, view: View) -> Iterator[InputVariant]:
        """The same with one mistake each."""


@dataclass(frozen=True)
class SiteSum:
    """The sum of the values of some sites (of one, mostly)."""

    sites: tuple[Site, ...]

    @property
    def name(self) -> str:
        """How it is written."""
        return " + ".join(site.name for site in self.sites)

    def rows(self, view: View) -> FloatArray | None:
        """Its values on the scene's tokens, None when one is missing."""
        parts = [view.rows(site) for site in self.sites]
        total: FloatArray | None = None
        for part in parts:
            if part is None:
                return None
            total = part if total is None else total + part
        return total

    def variants(self, view: View) -> Iterator[InputVariant]:
        """Features in another order, as heads and halves are confused."""
        x = self.rows(view)
        if x is not None:
            yield from reordered(x, view.scene.runs.config.head_dim)


def reordered(x: FloatArray, head: int | None) -> Iterator[InputVariant]:
    """An input whose heads come in another order."""
    if not head or x.shape[1] % head or x.shape[1] == head:
        return
    heads = x.reshape(len(x), -1, head)
    for what, moved in (
        ("heads and head dimension are transposed", heads.swapaxes(1, 2)),
        ("the halves are exchanged", np.roll(x, x.shape[1] // 2, axis=1)),
        ("the order of heads is reversed", heads[:, ::-1]),
    ):
        yield InputVariant(
            "input_order",
            moved.reshape(x.shape),
            f"the input's features come in another order: {what}",
            "transpose heads and positions back before flattening, and check the columns of this weight",
        )


AnySource = TypeVar("AnySource", bound=Source)


def _expert(site: Site) -> tuple[str, int] | None:
    """The expert that a site lies in, None outside of experts."""
    expert = Expert.of(site.module)
    return None if expert is None else (expert.block, expert.number)


def earlier(scene: Scene, width: int | None = None) -> list[SiteInfo]:
    """Sites of the reference before the suspect, the nearest first, each content once; inputs of modules count too.

    Experts see some tokens only, so what lies within one is nobody's input outside of it.
    """
    found: dict[str, SiteInfo] = {}
    block = _expert(scene.site)
    before = [
        info
        for info in scene.runs.sites.values()
        if info.exec_order < scene.info.exec_order
        and info.positioned
        and info.site.port in ("output", "input")
        and _expert(info.site) in (None, block)
    ]
    for info in sorted(before, key=lambda info: -info.exec_order):
        if width in (None, info.features) and info.features:
            found.setdefault(info.content, info)
    return list(found.values())


def sources(scene: Scene, width: int, *, sums: bool, own: bool = True) -> Iterator[SiteSum]:
    """What an input of this width may be: recorded inputs (with `own`), earlier outputs, then sums of two of them."""
    for info in scene.runs.sites.values() if own else ():
        if info.site.port == "input" and info.site.module == scene.site.module and info.features == width:
            yield SiteSum((info.site,))
    near = earlier(scene, width)[:_CANDIDATES]
    yield from (SiteSum((info.site,)) for info in near)
    if sums:
        yield from (SiteSum((one.site, other.site)) for one, other in combinations(near, 2))


def stream_after(scene: Scene, total: SiteSum) -> FloatArray | None:
    """A sum that no site holds, in the target: what a later site holds less what was added to it in between.

    Args:
        scene: the suspect, which the sum enters.
        total: the sum, as the reference makes it.

    Returns:
        `[tokens, features]`; None when no two later sites give the sum in the reference, or the target lacks them.
    """
    view = scene.view(REFERENCE)
    expected = total.rows(view)
    if expected is None:
        return None
    later = [
        info
        for info in scene.runs.sites.values()
        if info.exec_order > scene.info.exec_order
        and info.positioned
        and info.site.port == "output"
        and info.features == expected.shape[1]
    ]
    for block, stream in combinations(sorted(later, key=lambda info: info.exec_order)[:_CANDIDATES], 2):
        one, other = view.rows(stream.site), view.rows(block.site)
        if one is None or other is None or np.linalg.norm(one - other - expected) > _EXACT * np.linalg.norm(one):
            continue
        given, added = (scene.view(TARGET).rows(info.site) for info in (stream, block))
        return None if given is None or added is None else given - added
    return None


def find_source(
    scene: Scene, candidates: Iterable[AnySource], recompute: Callable[[FloatArray], FloatArray | None]
) -> AnySource | None:
    """The first source from which a law recomputes the reference.

    Args:
        scene: the suspect.
        candidates: what to try.
        recompute: the law, from input rows to output rows.
    """
    view, rows = scene.view(REFERENCE), _spread(len(scene.reference))
    for source in candidates:
        values = source.rows(view)
        computed = None if values is None else recompute(values[rows])
        if computed is not None and agrees(scene, computed, scene.reference[rows]):
            return source
    return None


def _spread(n: int) -> IntArray:
    """Some rows out of n, evenly."""
    return np.unique(np.linspace(0, n - 1, min(n, _ROWS)).astype(np.int64))


def agrees(scene: Scene, computed: FloatArray, expected: FloatArray) -> bool:
    """Whether recomputed values are the reference's, to well within the noise."""
    if computed.shape != expected.shape or not np.isfinite(computed).all():
        return False
    error = float(np.linalg.norm(computed - expected)) / max(float(np.linalg.norm(expected)), 1e-300)
    return error <= max(_EXACT, _OF_NOISE * scene.noise)


def best_view(scene: Scene, needed: Sequence[Source]) -> View:
    """The target's view when it holds every input, else the reference's."""
    view = scene.view(TARGET)
    return view if all(source.rows(view) is not None for source in needed) else scene.view(REFERENCE)
