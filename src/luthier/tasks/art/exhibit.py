"""Drawings to look at: a contact sheet of base, tuned model and reference."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

from luthier.tasks.art.guard import DrawingError
from luthier.tasks.art.raster import picture_of
from luthier.tasks.art.render import ArtTask
from luthier.tasks.exchange import answer_in
from luthier.tasks.exhibit import Exhibit, Judged, spread

MAX_ROWS = 12
_SIDE, _PER_LINE, _WHO = 192, 2, ("base", "tuned", "reference")


def exhibits(task: ArtTask, rows: Sequence[Judged]) -> list[Exhibit]:
    """A contact sheet as PNG, two held-out rows a line, and the drawings on it that are valid as files."""
    chosen = spread(rows, MAX_ROWS)
    if not chosen:
        return []
    found = [Exhibit("drawings.png", contact_sheet(chosen), "Base, tuned model and reference")]
    for judged in chosen:
        for who, svg in _drawings(judged):
            if task.present(judged.record, svg)["valid"]:
                found.append(Exhibit(f"row-{judged.row}-{who}.svg", svg.strip().encode("utf-8")))
    return found


def contact_sheet(rows: Sequence[Judged]) -> bytes:
    """The sheet as PNG: a frame for each drawing, crossed out where it is not valid."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_lines = -(-len(rows) // _PER_LINE)
    num_columns = len(_WHO) * min(_PER_LINE, len(rows))
    shared = shared_beginning([judged.record.prompt for judged in rows])
    figure = Figure(figsize=(1.55 * num_columns + 0.3, 2.05 * num_lines + 0.2), dpi=120, facecolor="white")
    FigureCanvasAgg(figure)
    for at, judged in enumerate(rows):
        line, column = divmod(at, _PER_LINE)
        for place, (who, svg) in enumerate(_drawings(judged)):
            axes = figure.add_subplot(num_lines, num_columns, line * num_columns + column * len(_WHO) + place + 1)
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set(color="#17864a" if who == "reference" else "#c9ced8", linewidth=0.8)
            axes.set_xlabel(who, fontsize=8, color="#626b7a", labelpad=2)
            if place == 0:
                title = textwrap.shorten(f"{judged.row}: {judged.record.prompt[shared:]}", 62, placeholder="…")
                axes.set_title(_plain(title), fontsize=8, loc="left", pad=4, color="#1b1f27")
            try:
                axes.imshow(picture_of(svg, _SIDE), interpolation="antialiased")
            except DrawingError:
                axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", facecolor="#fceceb")
                axes.plot([0, 1], [0, 1], color="#c33131", linewidth=0.7)
                axes.plot([0, 1], [1, 0], color="#c33131", linewidth=0.7)
    figure.subplots_adjust(
        left=0.01, right=0.99, top=1 - 0.3 / figure.get_figheight(), bottom=0.03, hspace=0.35, wspace=0.06
    )
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _drawings(judged: Judged) -> list[tuple[str, str]]:
    drawn = {who: answer_in(reply) for who, reply in judged.replies.items()} | {"reference": judged.record.svg}
    return [(who, drawn.get(who, "")) for who in _WHO]


def shared_beginning(prompts: Sequence[str]) -> int:
    """How many characters all prompts begin with, up to a word: they tell no row from another."""
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)
    num_equal = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return 1 + max(first[:num_equal].rfind(space) for space in " \n")


def _plain(text: str) -> str:
    """Without what matplotlib would read as mathematics, and in letters that its own font has."""
    return "".join(c if ord(c) < 0x2C00 else "□" for c in text).replace("$", r"\$")
