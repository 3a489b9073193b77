"""What a diagnosis may call each planted cause, and its class in the published table of magnitudes."""

from __future__ import annotations

#: By the benchmark's own words for a cause: names that a diagnosis may use. More than one name where several are true:
#: a missing all-reduce of two equal parts is also a wrong factor, a lost gain is another weight.
ACCEPTED: dict[str, frozenset[str]] = {}

#: Classes of the published table: R > 10 missing_algorithm, > 3 missing_multiplier, > 1.2 precision_ordering.
MULTIPLIERS = frozenset(
    {
        "attention scale",
        "embedding multiplier",
        "logits multiplier",
        "multiplier",
        "residual multiplier",
        "rope factor",
        "bias",
    }
)
PRECISION = frozenset(
    {"softmax precision", "norm precision", "rope precision", "quantised weight", "norm epsilon", "clipping"}
)


def accepted(planted: str, named: str) -> bool:
    """Whether a diagnosis has called a planted cause by a right name."""
    return named in ACCEPTED.get(planted, frozenset())


def published_class(planted: str) -> str:
    """The class that the published table should give a planted cause."""
    if planted in MULTIPLIERS:
        return "missing_multiplier"
    return "precision_ordering" if planted in PRECISION else "missing_algorithm"


def class_of_size(r_ratio: float) -> str:
    """The class that the published table gives an R."""
    if r_ratio > 10:
        return "missing_algorithm"
    return "missing_multiplier" if r_ratio > 3 else "precision_ordering"
