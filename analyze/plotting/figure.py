"""Figures without global state, and PNG files that are the same bytes for the same input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from ...store.errors import InputError

DPI = 120
#: Okabe and Ito's palette, "Color Universal Design" (2008): told apart with any colour vision.
FAIL, UNDECIDED, PASS, BASELINE, FIRST = "#D55E00", "#E69F00", "#7A8B99", "#0072B2", "#000000"
GRID, FAINT, INK = "#E3E6E8", "#9AA3AA", "#222222"
VERDICT_COLORS = {"pass": PASS, "fail": FAIL, "undecided": UNDECIDED}
SMALL, NORMAL, LARGE = 8.0, 9.0, 11.5
#: Written as escapes since they look like other letters.
SIGMA, MINUS = "\u03c3", "\u2212"


def new_figure(width: float, height: float) -> Figure:
    """A figure with the Agg backend, in inches."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a PNG of at most 256 colours without metadata, so that the same numbers give the same bytes.

    Raises:
        InputError: the file cannot be written.
    """
    canvas: Any = figure.canvas
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    picture = picture.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    try:
        with path.open("wb") as file:
            picture.save(file, format="PNG", optimize=True, dpi=(DPI, DPI))
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}; name another file with -o") from error


def plain(text: str, limit: int = 0) -> str:
    """Text as matplotlib should print it: one line, `$` no mathematics, shortened in the middle beyond `limit`."""
    line = " ".join(text.split())
    if limit and len(line) > limit:
        tail = (limit - 1) * 2 // 3
        line = f"{line[: limit - 1 - tail]}…{line[-tail:]}"
    return line.replace("$", r"\$")


def number(value: float | None) -> str:
    """A number of a caption."""
    if value is None:
        return "undefined"
    return "∞" if value == float("inf") else f"{value:.3g}".replace("-", MINUS)


def style(axes: Any) -> None:
    """The look of every panel: no box, quiet ticks."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    axes.tick_params(labelsize=SMALL, color=FAINT, labelcolor=INK)
    axes.set_axisbelow(True)


def words(figure: Figure, title: str, text: str) -> None:
    """A picture that says why there is no picture."""
    figure.set_size_inches(figure.get_figwidth(), 2.5)
    figure.suptitle(title, fontsize=LARGE - 1, x=0.01, ha="left", color=INK)
    axes = figure.subplots()
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, fontsize=LARGE, color=INK, ha="center", va="center", wrap=True)
