"""How often each number raises an alarm, by kind and size of what is wrong: docs/operating-curves.md and its picture.

Baseline and target errors are drawn anew for every trial, 16 tokens of 64 features or 64 tokens of 256; every rule sees
the same draws. R, its interval and the QQ numbers come from `measure`, as in any comparison.

    python benchmarks/operating_curves.py [--trials N]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tensorsleuth.analyze.measure import Measurement, Triple, measure

Array = npt.NDArray[np.float64]
DOCS = Path(__file__).parent.parent / "docs"
SIZES = ((16, 64), (64, 256))
#: Limits of the QQ numbers. A clean site of 1024 errors stays within them 99 times in 100 or more.
SLOPE, W1, KS = 1.2, 0.15, 0.08


@dataclass(frozen=True)
class Scenario:
    """One way to be wrong.

    Attributes:
        name: what is varied.
        sizes: how much, from nothing to a lot.
        draw: baseline and target errors of a size, from a generator and a shape.
    """

    name: str
    sizes: tuple[float, ...]
    draw: Callable[[np.random.Generator, tuple[int, int], float], tuple[Array, Array]]


def _inflated(rng: np.random.Generator, shape: tuple[int, int], factor: float) -> tuple[Array, Array]:
    return rng.standard_normal(shape), factor * rng.standard_normal(shape)


def _biased(rng: np.random.Generator, shape: tuple[int, int], shift: float) -> tuple[Array, Array]:
    return rng.standard_normal(shape), rng.standard_normal(shape) + shift


def _heavy(rng: np.random.Generator, shape: tuple[int, int], share: float) -> tuple[Array, Array]:
    """A share of the target's errors is ten times as large."""
    target = rng.standard_normal(shape)
    return rng.standard_normal(shape), np.where(rng.random(shape) < share, 10 * target, target)


def _reshaped(rng: np.random.Generator, shape: tuple[int, int], share: float) -> tuple[Array, Array]:
    """The same energy, but a share of the target's errors is gone and the others are larger."""
    target = np.where(rng.random(shape) < share, 0.0, rng.standard_normal(shape))
    return rng.standard_normal(shape), target / np.sqrt(1.0 - share)


def _one_outlier(rng: np.random.Generator, shape: tuple[int, int], size: float) -> tuple[Array, Array]:
    baseline, target = _inflated(rng, shape, 1.0)
    target[0, 0] += size
    return baseline, target


def _hidden(rng: np.random.Generator, shape: tuple[int, int], factor: float) -> tuple[Array, Array]:
    """An inflation, and one outlier of 1000 standard deviations that baseline and target share."""
    baseline, target = _inflated(rng, shape, factor)
    baseline[0, 0] = target[0, 0] = 1000.0
    return baseline, target


SCENARIOS = (
    Scenario("error inflated by a factor", (1.0, 1.05, 1.1, 1.2, 1.3, 1.5, 2.0, 3.0), _inflated),
    Scenario("bias, in standard deviations", (0.0, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0), _biased),
    Scenario("share of errors ten times as large", (0.0, 0.001, 0.003, 0.01, 0.03, 0.1), _heavy),
    Scenario("share of errors exactly zero, energy kept", (0.0, 0.1, 0.2, 0.3, 0.5, 0.8), _reshaped),
    Scenario("one outlier of the target, in standard deviations", (0.0, 3.0, 10.0, 30.0, 100.0, 1000.0), _one_outlier),
    Scenario("inflation beside a shared outlier of 1000", (1.0, 1.2, 1.5, 2.0, 3.0, 5.0), _hidden),
)


def bhattacharyya(baseline: Array, target: Array) -> float:
    """Overlap of two histograms of 100 equal bins over the joint range, as the published gate takes it."""
    span = (min(baseline.min(), target.min()), max(baseline.max(), target.max()))
    p, q = (np.histogram(values, 100, span)[0] / values.size for values in (baseline, target))
    return float(np.sqrt(p * q).sum())


def _gate_alarm(found: Measurement, baseline: Array, target: Array) -> bool:
    """The published gate: overlap of 0.99 or an RMS ratio of at most 1, Linf ratio below 5, L2 ratio below 3."""
    rms = float(np.sqrt((target**2).mean() / (baseline**2).mean()))
    similar = bhattacharyya(baseline, target) >= 0.99 or rms <= 1.0
    return not (similar and found.linf_ratio < 5.0 and found.r_ratio < 3.0)


RULES: dict[str, Callable[[Measurement, Array, Array], bool]] = {
    "R > 1.2": lambda found, *_: found.r_ratio > 1.2,
    "R > 1.2, interval above 1": lambda found, *_: found.r_ratio > 1.2 and found.r_low > 1.0,
    f"QQ slope beyond {SLOPE}": lambda found, *_: not 1 / SLOPE <= found.qq_slope <= SLOPE,
    f"W1 > {W1}": lambda found, *_: found.qq_w1 > W1,
    f"KS > {KS}": lambda found, *_: found.ks > KS,
    "BC gate": _gate_alarm,
}


def alarms(scenario: Scenario, size: float, shape: tuple[int, int], trials: int, seed: int = 0) -> dict[str, float]:
    """Share of trials in which each rule raises an alarm."""
    counts = dict.fromkeys(RULES, 0)
    rng = np.random.default_rng([seed, *shape, int(size * 1e6)])
    for _ in range(trials):
        reference = 100.0 * rng.standard_normal(shape)
        baseline, target = scenario.draw(rng, shape, size)
        triple = Triple(reference, reference + baseline, reference + target, np.arange(shape[0]))
        found = measure({0: [triple]})[None]
        for name, rule in RULES.items():
            counts[name] += rule(found, baseline, target)
    return {name: count / trials for name, count in counts.items()}


Curves = dict[tuple[str, tuple[int, int]], list[dict[str, float]]]


def all_curves(trials: int) -> Curves:
    """Every scenario at every size, by scenario and shape."""
    return {
        (scenario.name, shape): [alarms(scenario, size, shape, trials) for size in scenario.sizes]
        for scenario in SCENARIOS
        for shape in SIZES
    }


def table(scenario: Scenario, rows: Sequence[dict[str, float]]) -> str:
    """Percent of alarms as a Markdown table; the first column of numbers is the false alarms."""
    head = f"| alarms, % | {' | '.join(f'{size:g}' for size in scenario.sizes)} |"
    rule = "|---|" + "---:|" * len(scenario.sizes)
    lines = [f"| {name} | {' | '.join(f'{100 * row[name]:.0f}' for row in rows)} |" for name in RULES]
    return "\n".join([head, rule, *lines])


def draw(curves: Curves, path: Path) -> None:
    """One panel per scenario at the larger size, one line per rule."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, scenario in zip(figure.subplots(2, 3).flat, SCENARIOS, strict=True):
        rows = curves[scenario.name, SIZES[-1]]
        for (name, marker), width in zip(zip(RULES, "osd^vx", strict=True), (4, 2, 2, 2, 2, 2), strict=True):
            place = range(len(rows))
            panel.plot(place, [100 * row[name] for row in rows], marker=marker, lw=width, alpha=0.75, label=name)
        panel.set_xticks(range(len(scenario.sizes)), [f"{size:g}" for size in scenario.sizes])
        panel.set_xlabel(scenario.name)
        panel.set_ylabel("alarms, %")
        panel.set_ylim(-4, 104)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    """Simulate, draw the picture and replace the tables of the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    arguments = parser.parse_args()
    curves = all_curves(arguments.trials)
    draw(curves, DOCS / "images" / "operating-curves.png")
    page = DOCS / "operating-curves.md"
    text = page.read_text(encoding="utf-8").partition("## Tables")[0]
    parts = [f"{text}## Tables\n\n{arguments.trials} trials each; the leftmost numbers are false alarms."]
    for scenario in SCENARIOS:
        for shape in SIZES:
            parts.append(f"### {scenario.name.capitalize()}: {shape[0]} tokens of {shape[1]} features")
            parts.append(table(scenario, curves[scenario.name, shape]))
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
