"""Piano rolls as SVG: time to the right, pitch upwards, a line a bar; bars that do not fit their metre are tinted."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from html import escape

from luthier.tasks.music.metrics import fitting_bars
from luthier.tasks.music.notation import NotationError, Tune

WIDTH, ROLL_HEIGHT, LEFT, HEAD = 1000, 120, 46, 24
MAX_BARS = 48
"""Shown of a tune."""
_LEAST_SEMITONES = 12
_NAMES = ("C", "C♯", "D", "E♭", "E", "F", "F♯", "G", "A♭", "A", "B♭", "B")
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#3b4250}.who{font-weight:600;font-size:13px}"
    ".faint{fill:#8a93a3;font-size:10px}"
    ".note{fill:#2f6fed}.fault{fill:#c33131}.wrong{fill:#f6d5d2}"
    ".bar{stroke:#c9ced8}.strong{stroke:#3b4250}.grid{stroke:#eceef2}"
)


def piano_rolls(tunes: Mapping[str, Tune | NotationError]) -> str:
    """One picture of several tunes under one another, on the same scale of time and pitch.

    Args:
        tunes: Name -> a tune, or why there is none.
    """
    read = [tune for tune in tunes.values() if isinstance(tune, Tune)]
    pitches = [pitch for tune in read for bar in tune.bars for note in bar.notes for pitch in note.pitches] or [60, 72]
    middle, spread = (min(pitches) + max(pitches)) / 2, max(max(pitches) - min(pitches), _LEAST_SEMITONES)
    low, high = middle - spread / 2 - 1, middle + spread / 2 + 1
    longest = max((float(_length(tune)) for tune in read), default=1.0)
    parts, top = [], 0
    for who, tune in tunes.items():
        parts.append(f'<text class="who" x="2" y="{top + 15}">{escape(who)}</text>')
        if isinstance(tune, Tune):
            parts += _roll(tune, top, low, high, (WIDTH - LEFT - 8) / longest)
            top += HEAD + ROLL_HEIGHT + 10
        else:
            parts.append(
                f'<text class="fault" x="{LEFT + 40}" y="{top + 15}">cannot be read: {escape(_cut(str(tune)))}</text>'
            )
            top += HEAD + 10
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" width="{WIDTH}" height="{top}">'
        f'<style>{_STYLE}</style><rect width="{WIDTH}" height="{top}" fill="#fff"/>{"".join(parts)}</svg>'
    )


def _roll(tune: Tune, top: int, low: float, high: float, scale: float) -> list[str]:
    bars = tune.bars[:MAX_BARS]
    fits = fitting_bars(tune.bars)
    above, below = top + HEAD, top + HEAD + ROLL_HEIGHT
    per_semitone = ROLL_HEIGHT / (high - low)

    def y_of(pitch: float) -> float:
        return below - (pitch - low) * per_semitone

    judged = [fit for fit in fits if fit is not None]
    told = [f"K:{tune.fields['K']}"] if tune.fields.get("K") else []
    told += [f"M:{tune.fields['M']}"] if tune.fields.get("M") else []
    told.append(f"{sum(judged)} of {len(judged)} bars fit" if judged else f"{len(tune.bars)} bars")
    told += [f"the first {MAX_BARS} bars are shown"] if len(tune.bars) > MAX_BARS else []
    parts = [f'<text x="{LEFT + 40}" y="{top + 15}">{escape(_cut(", ".join(told)))}</text>']
    notes = []
    lines = []
    now = Fraction(0)
    for n, bar in enumerate(bars):
        left, width = LEFT + float(now) * scale, float(bar.length) * scale
        if fits[n] is False:
            parts.append(_rect("wrong", left, above, width, ROLL_HEIGHT))
        for note in bar.notes:
            start = left + float(note.start) * scale
            notes += [
                _rect(
                    "note",
                    start,
                    y_of(pitch) - per_semitone / 2,
                    max(float(note.length) * scale - 0.6, 0.8),
                    per_semitone,
                )
                for pitch in note.pitches
            ]
        now += bar.length
        strength = "strong" if ":" in bar.closing or "]" in bar.closing or "||" in bar.closing else "bar"
        lines.append(_line(strength, left + width, above, left + width, below))
    right = LEFT + float(now) * scale
    for pitch in range(int(low), int(high) + 1):
        if pitch % 12 in (0, 7) and low < pitch < high:
            parts.append(_line("grid", LEFT, y_of(pitch), right, y_of(pitch)))
            name = f"{_NAMES[pitch % 12]}{pitch // 12 - 1}"
            parts.append(
                f'<text class="faint" x="{LEFT - 6}" y="{y_of(pitch) + 3:.1f}" text-anchor="end">{name}</text>'
            )
    return [*parts, _line("bar", LEFT, above, LEFT, below), *lines, *notes]


def _length(tune: Tune) -> Fraction:
    return sum((bar.length for bar in tune.bars[:MAX_BARS]), Fraction(0))


def _rect(kind: str, x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/>'


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _cut(text: str) -> str:
    return text if len(text) <= 110 else text[:109] + "…"
