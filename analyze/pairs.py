"""What a mapping says: pairs of sites, reference sites without one, and choices that were refused."""

from __future__ import annotations

from dataclasses import dataclass

from .ranks import Columns
from .sites import Site

EXCLUDED, NOT_INCLUDED = "excluded by the user", "not among the sites the user asked for"
STATISTICS_ONLY, INCOMPLETE = "the reference holds statistics only", "of the reference,"


@dataclass(frozen=True)
class Pair:
    """A reference site and its counterpart.

    Attributes:
        reference: the reference site.
        target: the target site.
        columns: ranges `(start, stop)` of the target's features that belong to the reference site, in the
            reference's order; None means all.
        score: how sure the mapping is, from 0 to 1.
        reason: why the two belong together.
        reference_columns: the reference's features that the target site holds; None means all.
        expert: where the target holds values of every token's chosen experts, the one that is meant.
    """

    reference: Site
    target: Site
    columns: Columns | None
    score: float
    reason: str
    reference_columns: Columns | None = None
    expert: int | None = None

    @property
    def transform(self) -> str:
        """How the target's values become the reference's.

        `identity`; `slice`: the target holds more than the reference site; `reorder`: its features come in another
        order; `part`: the reference site holds more than the target; `expert`: its values of one expert.
        """
        if self.expert is not None:
            return "expert"
        if self.reference_columns is not None:
            return "part"
        if self.columns is None:
            return "identity"
        return "slice" if len(self.columns) == 1 else "reorder"

    @property
    def transform_spec(self) -> dict[str, object] | None:
        """Parameters of the transform, JSON-ready: `start` and `stop` of a slice, else the ranges; None if identity."""
        if self.expert is not None:
            return {"expert": self.expert}
        if self.reference_columns is None and self.columns is None:
            return None
        if self.transform == "slice" and self.columns is not None:
            return {"axis": -1, "start": self.columns[0][0], "stop": self.columns[0][1]}
        spec: dict[str, object] = {"axis": -1}
        if self.columns is not None:
            spec["target"] = [list(span) for span in self.columns]
        if self.reference_columns is not None:
            spec["reference"] = [list(span) for span in self.reference_columns]
        return spec


@dataclass(frozen=True)
class Gap:
    """A reference site that is not compared.

    Attributes:
        site: the reference site.
        status: `unmatched` (a hole) or `skipped` (accounted for).
        reason: why.
    """

    site: Site
    status: str
    reason: str

    @property
    def final(self) -> bool:
        """Nothing in the target can close it: it was filtered out, or the reference itself lacks the values."""
        return self.reason in (EXCLUDED, NOT_INCLUDED, STATISTICS_ONLY) or self.reason.startswith(INCOMPLETE)


@dataclass(frozen=True)
class Ambiguity:
    """A reference site for which more than one target site speaks.

    Attributes:
        site: the reference site.
        candidates: the target sites, the likeliest first.
        reason: what speaks for which; says whether the site is compared nonetheless.
    """

    site: Site
    candidates: tuple[Site, ...]
    reason: str


@dataclass(frozen=True)
class SiteMapping:
    """Every reference site, either paired or accounted for.

    A reference site has a pair for every module of the target that computes the same values: the fused projection and
    the split that follows it are told apart that way. Pairs are in dataflow order: of the reference, then of the
    target.

    Attributes:
        pairs: what is compared.
        gaps: what is not.
        ambiguous: where a choice had to be refused, or where values contradict a name.
        origin: `auto`, or the file that overrides it.
    """

    pairs: tuple[Pair, ...]
    gaps: tuple[Gap, ...]
    ambiguous: tuple[Ambiguity, ...] = ()
    origin: str = "auto"
