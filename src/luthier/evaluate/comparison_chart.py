"""A comparison of methods as one picture: a panel a quantity, a bar a method, scores as points with their intervals."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from luthier.evaluate.comparison import MethodRow, common_metric
from luthier.evaluate.summary import format_bytes, format_count, format_value, is_share, label, score_of

INK, MUTED, GRID, ACCENT, SECOND = "#1c1f24", "#5c6470", "#e3e6ea", "#2f6fb0", "#c0702a"

ROOM_FOR_VALUE = 1.42
"""A panel is this much wider than its longest bar, for the number behind it."""

DOTS_PER_INCH = 130

_STYLE: Any = {
    "font.size": 9.5,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.bottom": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "xtick.color": MUTED,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
}


def comparison_chart(rows: Sequence[MethodRow]) -> bytes:
    """The picture as a PNG: trainable parameters, bytes saved, peak memory, tokens/s, and the common score.

    Parameters and bytes span orders of magnitude, so that their bars are on a logarithmic scale. A method that failed
    has a line without bars.
    """
    metric = common_metric(rows)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(13.0, 1.3 + 0.36 * len(rows)), layout="constrained")  # no pyplot: no global state
        widths = [1.0, 1.0, 1.0, 0.8] + [1.6] * bool(metric)
        panels = figure.subplots(1, len(widths), sharey=True, gridspec_kw={"width_ratios": widths}, squeeze=False)[0]
        trainable = [row.num_trainable_parameters for row in rows]
        _bars(panels[0], "trainable parameters (log)", trainable, format_count, is_log=True)
        _bars(panels[1], "saved (log)", [row.saved_bytes for row in rows], format_bytes, is_log=True)
        _bars(panels[2], "peak memory", [row.peak_memory_bytes for row in rows], format_bytes)
        _bars(panels[3], "tokens/s", [row.tokens_per_second for row in rows], lambda value: f"{value:,.0f}")
        if metric:
            _scores(panels[4], rows, metric)
        names = [row.method + (" (failed)" if row.problem else "") for row in rows]
        panels[0].set_yticks(range(len(rows)), names, parse_math=False)
        panels[0].set_ylim(len(rows) - 0.5, -0.5)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return picture.getvalue()


def _bars(axes: Axes, title: str, values: Sequence[float | None], say: Any, *, is_log: bool = False) -> None:
    axes.set_title(title)
    axes.set_xticks([])
    known = [value for value in values if value]
    if not known:
        return
    left = min(known) / 4 if is_log else 0.0
    if is_log:
        axes.set_xscale("log")
        axes.set_xticks([], minor=True)
        axes.set_xticks([])
        right = left * (max(known) / left) ** ROOM_FOR_VALUE
    else:
        right = max(known) * ROOM_FOR_VALUE
    axes.set_xlim(left, right)
    for place, value in enumerate(values):
        if value:
            axes.barh(place, value - left, left=left, height=0.62, color=ACCENT, alpha=0.8)
            axes.annotate(say(value), (value, place), (4, 0), textcoords="offset points", va="center")


def _scores(axes: Axes, rows: Sequence[MethodRow], metric: str) -> None:
    """Base and tuned value of each method, with their intervals."""
    axes.set_title(f"{label(metric).lower()} (95% intervals)")
    for who, color, shift in (("base", SECOND, 0.16), ("tuned", ACCENT, -0.16)):
        is_named = False
        for place, row in enumerate(rows):
            score = score_of(row.evaluation, who, metric)
            if row.problem or score is None or score["value"] is None:
                continue
            value = score["value"]
            low, high = (value if score[end] is None else score[end] for end in ("low", "high"))
            axes.errorbar(
                value,
                place + shift,
                xerr=[[value - low], [high - value]],
                color=color,
                marker="o",
                markersize=5,
                elinewidth=1.6,
                capsize=2.5,
                label="" if is_named else who,
            )
            is_named = True
    if is_share(metric):
        axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_value(metric, value, digits=0)))
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), handletextpad=0.3, borderaxespad=0.2)
