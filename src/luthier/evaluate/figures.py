"""The report's pictures, as inline SVG that follows the page's light or dark colours.

matplotlib draws with stand-in colours; `_to_svg` replaces each with a CSS variable of the page, and takes out every
address. Text stays text, so that it is sharp, selectable and in the page's own font.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, ScalarFormatter
from numpy.typing import NDArray

Array = NDArray[np.float64]

INK, MUTED, GRID, ACCENT, SECOND, GOOD = "#010203", "#010204", "#010205", "#010206", "#010207", "#010208"
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line", ACCENT: "--accent", SECOND: "--second", GOOD: "--right"}

MAX_POINTS = 800
"""A curve with more steps is averaged into this many points: a screen shows no more."""

MAX_SCALE = 1.45
"""CSS pixels a point at most: 10-point text is then as large as the page's own."""

LOG_SCALE_FROM_RATIO = 8.0

MAX_MATRIX_CLASSES = 30
_COUNTS_UP_TO_CLASSES = 16  # beyond, the cells are too small to print in

_STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 10,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": True,
}


def loss_curves(
    steps: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
    best_step: int | None = None,
    unit: str = "nats a token",
) -> str | None:
    """Training loss (raw and smoothed), validation loss and the kept checkpoint; None without a finite loss."""
    at, loss = _series(steps, "loss")
    at_held, held = _series(evaluations, "loss")
    if not loss.size and not held.size:
        return None
    with mpl.rc_context(_STYLE):
        figure, axes = _new(10.0, 3.7)
        if loss.size:
            axes.plot(at, loss, color=ACCENT, alpha=0.28, linewidth=1.0)
            axes.plot(at, smooth(loss), color=ACCENT, linewidth=2.0, label="training (smoothed)")
        if held.size:
            axes.plot(at_held, held, color=SECOND, linewidth=2.0, marker="o", markersize=4.5, label="validation")
        is_log = _scale_loss(axes, loss, held)
        if best_step is not None:
            _mark_kept(axes, best_step, at_held, held)
        axes.set_xlabel("step")
        axes.set_ylabel(f"loss, {unit}" + (" (log scale)" if is_log else ""))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="upper right", ncols=3, borderaxespad=0.0)
        return _to_svg(figure, "Loss over steps, in training and in validation")


def small_curve(steps: Sequence[Mapping[str, Any]], name: str, title: str) -> str | None:
    """One quantity of the steps, small; None where no step has it."""
    at, values = _series(steps, name)
    if not values.size:
        return None
    with mpl.rc_context(_STYLE):
        figure, axes = _new(5.0, 1.9)
        axes.plot(at, values, color=ACCENT, linewidth=1.6)
        axes.set_ylim(bottom=0.0, top=float(values.max()) * 1.08 or 1.0)
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
        _keep_exponent_in_ticks(axes)
        return _to_svg(figure, f"{title} over steps")


def histogram(edges: Sequence[float], counts: Sequence[float], xlabel: str) -> str | None:
    """Bars between `edges` (one more than `counts`); None where there is nothing to draw."""
    if len(edges) != len(counts) + 1 or not sum(counts):
        return None
    with mpl.rc_context(_STYLE):
        figure, axes = _new(5.0, 2.2)
        left, width = np.asarray(edges[:-1], dtype=float), np.diff(np.asarray(edges, dtype=float))
        axes.bar(left + 0.04 * width, counts, width=0.92 * width, align="edge", color=ACCENT, alpha=0.75)
        axes.set_xlabel(xlabel)
        axes.set_ylabel("rows")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
        return _to_svg(figure, f"Histogram of {xlabel}")


def confusion_matrix(matrix_CC: NDArray[np.int64], names: Sequence[str]) -> str:
    """A square of cells, rows the truth and columns the prediction, shaded by the share of the row.

    Args:
        matrix_CC: int64 [C, C] counts, C at most `MAX_MATRIX_CLASSES`.
        names: The classes in order. They are user data: printed as they are, never read as mathematics or markup.
    """
    num_classes = len(names)
    side = min(9.0, 1.6 + max(0.34, 0.62 - 0.02 * num_classes) * num_classes)
    with mpl.rc_context({**_STYLE, "axes.grid": False, "axes.spines.bottom": False}):
        figure, axes = _new(side + 1.2, side)
        totals = matrix_CC.sum(axis=1)
        for truth, predicted in np.argwhere(matrix_CC > 0):
            count = int(matrix_CC[truth, predicted])
            color = GOOD if truth == predicted else SECOND
            shade = 0.12 + 0.68 * count / int(totals[truth])
            axes.add_patch(
                Rectangle((predicted - 0.48, truth - 0.48), 0.96, 0.96, facecolor=color, alpha=shade, linewidth=0)
            )
            if num_classes <= _COUNTS_UP_TO_CLASSES:
                axes.text(predicted, truth, str(count), ha="center", va="center", fontsize=9, color=INK)
        axes.set_xlim(-0.5, num_classes - 0.5)
        axes.set_ylim(num_classes - 0.5, -0.5)
        axes.set_aspect("equal")
        shown = [_shorten(name, 24) for name in names]
        axes.set_xticks(range(num_classes), shown, rotation=45, ha="right", rotation_mode="anchor", parse_math=False)
        axes.set_yticks(range(num_classes), shown, parse_math=False)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        return _to_svg(figure, "Confusion matrix: true class by row, predicted class by column")


def smooth(values: Array) -> Array:
    """An exponential moving average whose span grows with the curve, unbiased at its start.

    The bias correction is Adam's (Kingma & Ba, arXiv:1412.6980, section 3): divide by 1 - decay^t.
    """
    decay = 1.0 - 2.0 / (max(3.0, values.size / 30.0) + 1.0)
    smoothed, average = np.empty_like(values), 0.0
    for place, value in enumerate(values):
        average = decay * average + (1.0 - decay) * value
        smoothed[place] = average / (1.0 - decay ** (place + 1))
    return smoothed


def _series(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[Array, Array]:
    """Steps and values of a quantity where it is a finite number, averaged down to `MAX_POINTS`."""
    pairs = [
        (float(line["step"]), float(line[name]))
        for line in lines
        if isinstance(line.get(name), int | float) and math.isfinite(line[name])
    ]
    points = np.asarray(pairs, dtype=np.float64).reshape(-1, 2)
    if len(points) > MAX_POINTS:
        points = np.stack([part.mean(axis=0) for part in np.array_split(points, MAX_POINTS)])
    return points[:, 0], points[:, 1]


def _scale_loss(axes: Axes, loss: Array, held: Array) -> bool:
    """Choose a logarithmic scale where the loss falls far, so that the end stays legible, and say whether.

    Single spikes may leave the picture rather than press the curve flat.
    """
    both = np.concatenate([smooth(loss) if loss.size else loss, held])
    top = max(both.max(), np.percentile(loss, 99) if loss.size else 0.0)
    bottom = min(both.min(), np.percentile(loss, 1) if loss.size else np.inf)
    if bottom > 0 and top / bottom > LOG_SCALE_FROM_RATIO:
        axes.set_yscale("log")
        axes.set_ylim(bottom / 1.25, top * 1.6)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        return True
    axes.set_ylim(min(0.0, bottom), top * 1.15 or 1.0)
    return False


def _mark_kept(axes: Axes, best_step: int, at_held: Array, held: Array) -> None:
    axes.axvline(best_step, ymax=0.86, color=GOOD, linewidth=1.2, linestyle=(0, (4, 3)), alpha=0.9)
    beside = np.flatnonzero(at_held == best_step)
    if beside.size:
        axes.plot([best_step], [held[beside[0]]], marker="o", markersize=8, color=GOOD, linestyle="none")
    left, right = axes.get_xlim()
    is_late = best_step > left + 0.8 * (right - left)
    axes.annotate(
        f"kept: step {best_step}",
        (best_step, 0.80),
        xycoords=("data", "axes fraction"),
        xytext=(-6 if is_late else 6, 0),
        textcoords="offset points",
        ha="right" if is_late else "left",
        color=GOOD,
    )


def _keep_exponent_in_ticks(axes: Axes) -> None:
    """Print small values in full; an offset such as 1e-4 in a corner is easily missed."""
    formatter = ScalarFormatter(useOffset=False)
    formatter.set_scientific(False)
    axes.yaxis.set_major_formatter(formatter)


def _shorten(name: str, num_characters: int) -> str:
    return name if len(name) <= num_characters else name[: num_characters - 1] + "…"


def _new(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")  # no pyplot: no global list of figures
    return figure, figure.add_subplot()


def _to_svg(figure: Figure, description: str) -> str:
    buffer = io.StringIO()
    # The salt names the clip paths: equal pictures get equal bytes, different ones on a page do not collide.
    with mpl.rc_context({"svg.hashsalt": description}), warnings.catch_warnings():
        # Text stays text, and whoever shows the page has a font for it: that matplotlib has none is no news.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style type=\"text/css\">.*?</style>", "", svg, flags=re.DOTALL)
    view_box = re.search(r'viewBox="([^"]+)"', svg)
    assert view_box is not None  # matplotlib always writes one
    width = round(float(view_box[1].split()[2]) * MAX_SCALE)
    attributes = f'class="figure" viewBox="{view_box[1]}" style="max-width: {width}px" role="img"'
    svg = re.sub(r"<svg[^>]*>", f'<svg {attributes} aria-label="{description}">', svg, count=1)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same in every picture; nothing refers to them
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    return re.sub(r"(fill|stroke): (#0102\d\d)", lambda match: f"{match[1]}: var({_VARIABLES[match[2]]})", svg)
