"""A suspect as hypotheses see it: its values in three runs, the values around it, and the noise to expect."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from ...store.trace import site_name
from ..naming import MAIN_SLOTS
from ..sites import Site, SiteInfo
from .runs import ComparedRuns, Counterpart, FloatArray, IntArray, Rows

#: Elements of a suspect that are read from each run, and of a whole sequence around it.
_ELEMENTS, _SEQUENCE_ELEMENTS = 1 << 20, 1 << 23
#: Sites before a suspect whose tensors are looked up together with its own.
_NEIGHBOURS = 24
#: Unit roundoff of the dtypes a target may run in, for sites that the baseline computes without rounding.
UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
REFERENCE, TARGET = "reference", "target"


class Scene:
    """One suspect site in one phase, on a bounded number of its tokens.

    Attributes:
        expected: what the site should hold given the target's own inputs, where a law tells; else the reference's
            values. `[tokens, features]`.
    """

    def __init__(self, runs: ComparedRuns, info: SiteInfo, counterpart: Counterpart, phase: str) -> None:
        """Read the suspect's own values.

        Raises:
            LookupError: there is nothing to compare.
        """
        self.runs, self.info, self.counterpart, self.phase = runs, info, counterpart, phase
        features = max(info.features or 1, 1)
        runs.prepare(info.site, _neighbours(runs, info))
        self.prompts = runs.prompts
        rows = runs.read(info.site, counterpart, runs.prompts, max(_ELEMENTS, features), phase)
        if rows is None or rows.target is None:
            raise LookupError(info.site.name)
        self.rows, self.target = rows, rows.target
        chosen = {int(prompt) for prompt in np.unique(rows.prompts)}
        self.prompts = [pair for pair in runs.prompts if pair.prompt in chosen]
        self._read: dict[tuple[str, str], Rows | None] = {}
        self.expected = rows.reference

    @property
    def site(self) -> Site:
        """The suspect, as the reference names it."""
        return self.info.site

    @property
    def reference(self) -> FloatArray:
        """The reference's values, `[tokens, features]`."""
        return self.rows.reference

    @property
    def positions(self) -> IntArray:
        """Token positions of the rows."""
        return self.rows.positions

    @property
    def features(self) -> int:
        """Elements per token."""
        return int(self.reference.shape[1])

    @cached_property
    def finite(self) -> bool:
        """Whether everything that was read is finite."""
        sides = (self.reference, self.rows.baseline, self.target)
        return all(side is None or bool(np.isfinite(side).all()) for side in sides)

    @cached_property
    def noise(self) -> float:
        """Relative error that the target's precision alone makes here: the baseline's, or one rounding's.

        The root mean square of rounding to nearest is at most the unit roundoff over sqrt(3).
        """
        rounding = UNIT_ROUNDOFF.get(self.runs.target_dtype, 2.0**-24) / np.sqrt(3)
        if self.rows.baseline is None:
            return float(rounding)
        made = np.linalg.norm(self.rows.baseline - self.reference) / max(np.linalg.norm(self.reference), 1e-300)
        return float(made) if made > rounding / 4 else float(rounding)

    @cached_property
    def error(self) -> float:
        """||t - r||."""
        return float(np.linalg.norm(self.target - self.reference))

    @cached_property
    def inputs(self) -> tuple[FloatArray, FloatArray] | None:
        """What the suspect's module is given in the reference and in the target, `[tokens, in]`, where both tell."""
        x, given = (self.view(side).given(self.site.module) for side in (REFERENCE, TARGET))
        return None if x is None or given is None or x.shape != given.shape else (x, given)

    def view(self, side: str) -> View:
        """The values around the suspect, of one side."""
        return View(self, side, self.rows)

    @cached_property
    def everywhere(self) -> tuple[View, FloatArray]:
        """The reference alone on all positions of the scene's prompts, in all phases, and its values of the suspect."""
        rows = self.around(self.site, REFERENCE)
        if rows is None or not np.isfinite(rows.reference).all():
            return self.view(REFERENCE), self.reference
        return View(self, REFERENCE, rows), rows.reference

    def around(self, site: Site, side: str) -> Rows | None:
        """Values of another site on every position of the scene's prompts, None when that side lacks it."""
        key = (site.name, side)
        if key not in self._read:
            counterpart = None
            if side == TARGET:
                others = self.runs.counterparts.get(site.name, ())
                counterpart = others[0] if others else None
                if counterpart is None:
                    self._read[key] = None
                    return None
            self._read[key] = self.runs.read(site, counterpart, self.prompts, _SEQUENCE_ELEMENTS)
        return self._read[key]


class View:
    """Values around a suspect from one side: the reference's, or the target's where it has the site."""

    def __init__(self, scene: Scene, side: str, tokens: Rows) -> None:
        """`side` is `reference` or `target`; `tokens` are those whose values are wanted."""
        self.scene, self.side, self.tokens = scene, side, tokens

    def rows(self, site: Site) -> FloatArray | None:
        """Values of a site on the view's tokens, `[tokens, features]`; None when any token lacks them."""
        found = self.scene.around(site, self.side)
        if found is None:
            return None
        at = _find(found, self.tokens)
        values = found.reference if self.side == REFERENCE else found.target
        return None if at is None or values is None or not np.isfinite(values[at]).all() else values[at]

    def given(self, module: str) -> FloatArray | None:
        """Main input of a module on the view's tokens, `[tokens, features]`; None where it was not recorded."""
        for slot in MAIN_SLOTS:
            info = self.scene.runs.sites.get(site_name(module, "input", slot))
            values = None if info is None else self.rows(info.site)
            if values is not None:
                return values
        return None

    def sequences(self, site: Site) -> dict[int, FloatArray] | None:
        """Values of a site by prompt on positions 0, 1, ... without a hole; None when a prompt has none."""
        found = self.scene.around(site, self.side)
        values = None if found is None else found.reference if self.side == REFERENCE else found.target
        if found is None or values is None:
            return None
        sequences = {}
        for prompt in np.unique(self.tokens.prompts):
            span = found.of_prompt(int(prompt))
            positions = found.positions[span]
            last = int(self.tokens.positions[self.tokens.of_prompt(int(prompt))].max(initial=-1))
            if len(positions) <= last or positions[0] != 0 or positions[last] != last:
                return None
            sequences[int(prompt)] = values[span]
        return sequences

    def parameter(self, module: str, name: str) -> FloatArray | None:
        """A small parameter of the reference; the target's are part of what is in question."""
        return self.scene.runs.parameters.get((module, name))


def _neighbours(runs: ComparedRuns, info: SiteInfo) -> list[Site]:
    """Sites that hypotheses are likely to ask for: the last ones before the suspect, and rotary embeddings."""
    before = [other for other in runs.sites.values() if other.exec_order <= info.exec_order and other.positioned]
    near = sorted(before, key=lambda other: -other.exec_order)[:_NEIGHBOURS]
    rotary = [other for other in before if "rotary" in other.site.module.lower()]
    return [other.site for other in dict.fromkeys((*near, *rotary)) if other.site != info.site]


def _find(found: Rows, wanted: Rows) -> IntArray | None:
    """Rows of `found` that hold the tokens of `wanted`, None when one is missing."""
    if len(found.prompts) == len(wanted.prompts) and (found.positions == wanted.positions).all():
        return np.arange(len(wanted.prompts))
    width = int(max(found.positions.max(initial=0), wanted.positions.max(initial=0))) + 1
    keys, sought = found.prompts * width + found.positions, wanted.prompts * width + wanted.positions
    at = np.searchsorted(keys, sought)
    inside = at < len(keys)
    if not inside.all() or not (keys[at] == sought).all():
        return None
    return at.astype(np.int64)
