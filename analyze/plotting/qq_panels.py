"""The two panels of the QQ picture."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from scipy.special import ndtri

from .figure import BASELINE, FAIL, FAINT, GRID, INK, MINUS, SIGMA, SMALL, plain, style

if TYPE_CHECKING:
    from .qq import Distributions

#: Beyond this many standard deviations an axis is linear only near 0.
_LINEAR_UP_TO = 12.0
_BULK = (0.01, 0.99)
_SHARES = (1e-6, 1e-4, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.9999, 1 - 1e-6)
_NAMES = ("10⁻⁶", "10⁻⁴", "1 %", "10 %", "25 %", "50 %", "75 %", "90 %", "99 %", f"1{MINUS}10⁻⁴", f"1{MINUS}10⁻⁶")
#: How far beyond the last resolved probability the extremes are drawn, in normal deviates.
_BEYOND = 0.45


def draw_scatter(axes: Any, source: Distributions, unit: float) -> None:
    """Target quantiles against baseline quantiles, on equal axes."""
    x, y = source.baseline / unit, source.target / unit
    bulk = (source.probability >= _BULK[0]) & (source.probability <= _BULK[1])
    style(axes)
    reach, scaled = _reach(source, unit)
    if scaled:
        axes.set_xscale("asinh", linear_width=1.0)
        axes.set_yscale("asinh", linear_width=1.0)
        _label_powers(axes.xaxis, reach)
        _label_powers(axes.yaxis, reach)
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", adjustable="box")
    line = _along(reach, scaled)
    axes.plot(line, line, color=INK, linewidth=1.0, linestyle=(0, (5, 3)), label="equal distributions", zorder=2)
    if source.slope is not None and source.intercept is not None and source.sigma:
        robust = source.slope * line + source.intercept * source.sigma / unit
        label = f"robust line through the bulk: {_equation(source.slope, source.intercept)}"
        axes.plot(line, robust, color=FAIL, linewidth=1.3, label=label, zorder=2.5)
    axes.scatter(x[~bulk], y[~bulk], s=20, facecolors="white", edgecolors=BASELINE, linewidths=1.0,
                 label="tails: beyond 1 % and 99 %", zorder=4)  # fmt: skip
    axes.scatter(x[bulk], y[bulk], s=14, color=BASELINE, linewidths=0, label="bulk: every percent", zorder=3)
    axes.grid(True, color=GRID, linewidth=0.7)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False, fontsize=SMALL)


def draw_quantiles(axes: Any, source: Distributions, unit: float) -> None:
    """Both quantile functions; a normal distribution would be a straight line on a linear vertical axis."""
    at = _deviates(source.probability)
    style(axes)
    reach, scaled = _reach(source, unit)
    if scaled:
        axes.set_yscale("asinh", linear_width=1.0)
        _label_powers(axes.yaxis, reach)
    names = [plain(name or "", 34) for name in (source.comparison.baseline, source.comparison.target)]
    for values, color, name, dashes in (
        (source.baseline, BASELINE, f"baseline: {names[0]}", "-"),
        (source.target, FAIL, f"target: {names[1]}", (0, (4, 1.5))),
    ):
        axes.plot(at[1:-1], values[1:-1] / unit, color=color, linewidth=1.6, linestyle=dashes, label=name, zorder=3)
        ends = [0, -1]
        axes.scatter(at[ends], values[ends] / unit, s=26, color=color, marker="_", linewidths=2.0, zorder=3)
    axes.set_ylim(-reach, reach)
    axes.axvspan(ndtri(_BULK[0]), ndtri(_BULK[1]), color=GRID, alpha=0.4, linewidth=0, zorder=0)
    _label_shares(axes, at)
    axes.grid(True, color=GRID, linewidth=0.7)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False, fontsize=SMALL)


def _deviates(probability: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Normal deviates; the extremes (probabilities 0 and 1) a little beyond the last ones."""
    inner = ndtri(probability[1:-1])
    first, last = (inner[0], inner[-1]) if len(inner) else (-1.0, 1.0)
    return np.concatenate([[first - _BEYOND], inner, [last + _BEYOND]])


def _label_shares(axes: Any, at: npt.NDArray[np.float64]) -> None:
    span = at[-1] - at[0]
    ticks = [(float(at[0]), "min"), (float(at[-1]), "max")]
    for share, name in zip(_SHARES, _NAMES, strict=True):
        x = float(ndtri(share))
        if at[1] <= x <= at[-2] and all(abs(x - other) > 0.055 * span for other, _ in ticks):
            ticks.append((x, name))
    axes.set_xticks([x for x, _ in ticks], [name for _, name in ticks])
    axes.set_xlim(at[0] - 0.03 * span, at[-1] + 0.03 * span)
    for x, _ in ticks[:2]:
        axes.axvline(x, color=FAINT, linewidth=0.7, linestyle=":", zorder=1)


def _reach(source: Distributions, unit: float) -> tuple[float, bool]:
    """How far the axes go, and whether tails are so long that axes are linear within 1 and logarithmic beyond."""
    extreme = float(max(np.abs(source.baseline).max(), np.abs(source.target).max())) / unit
    scaled = extreme > _LINEAR_UP_TO
    return extreme * (1.5 if scaled else 1.1), scaled


def _label_powers(axis: Any, reach: float) -> None:
    """Ticks at 0, 1 and powers of ten, at most some five on either side."""
    last = math.floor(math.log10(reach))
    powers = [10.0**exponent for exponent in range(0, last + 1, max(1, math.ceil(last / 4)))]
    ticks = [-power for power in reversed(powers)] + [0.0, *powers]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}".replace("-", MINUS)))


def _along(reach: float, scaled: bool) -> npt.NDArray[np.float64]:
    """Points of a line, dense where the axes bend it."""
    return np.sinh(np.linspace(-1.0, 1.0, 401) * np.arcsinh(reach)) if scaled else np.array([-reach, reach])


def _equation(slope: float, intercept: float) -> str:
    return f"{slope:.3g} x {MINUS if intercept < 0 else '+'} {abs(intercept):.2g} {SIGMA}"
