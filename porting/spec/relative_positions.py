"""Explaining what is added to scores by where a key stands: a table read at the bucket of a distance."""

from __future__ import annotations

import math

import torch

from .encoder_decoder_facts import RelativePositions
from .expressions import Expressions
from .observation import Call, Observation, source_line
from .sources import Sources
from .wiring import same

_BUCKETS = ("config.relative_attention_num_buckets",)
_MAX_DISTANCE = "config.relative_attention_max_distance"
#: Relative to the scores: a bias below this is rounding.
_NONE = 1e-5


def bias_by_distance(
    products: torch.Tensor, scores: torch.Tensor, visible: torch.Tensor
) -> tuple[float, torch.Tensor] | None:
    """The factor s and the bias b with scores = s * products + b[head, key - query], None when there are none.

    Least squares: within one head and one distance the bias is a constant, so that deviations from the means of such a
    group depend on the factor alone.

    Args:
        products: queries times keys, (batch, heads, length, length).
        scores: what the softmax is taken of, same shape.
        visible: which scores are not masked, (length, length).

    Returns:
        The factor, and the bias as (heads, 2 * length - 1), the distance -(length - 1) first; NaN where no score has
        that distance.
    """
    x, y = products.double(), scores.double()
    length = x.shape[-1]
    distances = torch.arange(length)[None] - torch.arange(length)[:, None] + length - 1
    groups = torch.nn.functional.one_hot(distances[visible], 2 * length - 1).double()
    counts = groups.sum(0)
    x, y = x[..., visible], y[..., visible]
    n = counts * x.shape[0]
    x_mean, y_mean = ((v @ groups).sum(0) / n for v in (x, y))
    kept = counts > 0
    x_rest, y_rest = (v - m[:, kept] @ groups[:, kept].T for v, m in ((x, x_mean), (y, y_mean)))
    factor = float((x_rest * y_rest).sum() / (x_rest * x_rest).sum())
    if (y_rest - factor * x_rest).norm() > 1e-5 * y.norm():
        return None
    return factor, y_mean - factor * x_mean


def buckets_of(distances: torch.Tensor, buckets: int, max_distance: int, bidirectional: bool) -> torch.Tensor:
    """The bucket of every distance key - query; see `RelativePositions`. In float32, as models compute it."""
    if bidirectional:
        buckets //= 2
        first = (distances > 0).long() * buckets
        size = distances.abs()
    else:
        first = torch.zeros_like(distances)
        size = (-distances).clamp(min=0)
    exact = buckets // 2
    logarithm = torch.log(size.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (logarithm * (buckets - exact)).long()).clamp(max=buckets - 1)
    return first + torch.where(size < exact, size, far)


def is_nothing(bias: torch.Tensor, scores: torch.Tensor) -> bool:
    """Whether a bias is rounding only."""
    return bool(bias.nan_to_num().abs().max() <= _NONE * scores.abs().max())


def find_positions(
    seen: Observation, attention: str, tables: list[Call], bias: torch.Tensor, numbers: Expressions, sources: Sources
) -> RelativePositions | None:
    """Which table, read at which buckets, is the bias of an attention.

    Args:
        seen: the observed model.
        attention: path of the attention whose child the table is.
        tables: calls of embedding tables inside it.
        bias: as `bias_by_distance` gives it.
        numbers: expressions over the configuration.
        sources: receives where fields come from.

    Returns:
        The positions, `shared`; None when no table gives the bias.
    """
    length = (bias.shape[1] + 1) // 2
    distances = torch.arange(-(length - 1), length)
    known = ~bias.isnan().any(0)
    line = source_line(seen.model.get_submodule(attention), "def compute_bias")
    for call in tables:
        weight = call.module.weight
        rows = numbers.find(weight.shape[0], _BUCKETS, only=True)
        limit = getattr(numbers.small, _MAX_DISTANCE.removeprefix("config."), None)
        if rows is None or not isinstance(limit, int):
            continue
        for bidirectional in (False, True):
            found = weight[buckets_of(distances, weight.shape[0], limit, bidirectional)].T.double()
            if same(found[:, known], bias[:, known]):
                number = numbers.number(_MAX_DISTANCE)
                sources.measured("positions.module", "what is added to scores, by head and distance", line)
                sources.measured("positions.bidirectional", "buckets of keys after the query", line)
                sources.number("positions.buckets", rows)
                sources.number("positions.max_distance", number)
                name = call.path.removeprefix(f"{attention}.")
                return RelativePositions(name, rows, number, bidirectional, shared=True)
    return None
