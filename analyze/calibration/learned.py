"""What known-good comparisons teach: limits, and a null for comparisons without replicates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..verdict import Thresholds
from .null import Null

#: Name of the null that serves kinds of sites which the known-good comparisons lack.
ANY_KIND = ""


@dataclass(frozen=True)
class KindNull:
    """Student's t for log R at one kind of site in one phase, from known-good comparisons.

    Attributes:
        centre: expected log R.
        scale: its scale, the uncertainty of the centre included.
        freedom: degrees of freedom.
        n: observations.
    """

    centre: float
    scale: float
    freedom: float
    n: int


@dataclass(frozen=True)
class Calibration:
    """Limits learnt from known-good comparisons.

    Attributes:
        name: its name.
        thresholds: the limits.
        nulls: by phase and kind of site, as `kinds.kind_in_phase` writes them; `ANY_KIND` for all others.
        sources: what it came from: comparisons, runs with fingerprints, counts, versions.
        created_at: ISO 8601, UTC.
    """

    name: str
    thresholds: Thresholds
    nulls: Mapping[str, KindNull]
    sources: Mapping[str, Any]
    created_at: str

    def null_of(self, kinds: Sequence[str]) -> Null:
        """The null of every site, by its kind in its phase."""
        found = [self.nulls.get(kind) or self.nulls.get(ANY_KIND) for kind in kinds]
        nothing = float("nan")
        values = [(n.centre, n.scale, n.freedom) if n else (nothing, nothing, nothing) for n in found]
        return Null(*np.array(values, np.float64).reshape(-1, 3).T)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Calibration:
        """Read what `as_dict` wrote.

        Raises:
            KeyError, TypeError: a field is missing or of another type.
        """
        return cls(
            str(fields["name"]),
            Thresholds(**fields["thresholds"]),
            {kind: KindNull(**null) for kind, null in fields["nulls"].items()},
            dict(fields["sources"]),
            str(fields["created_at"]),
        )
