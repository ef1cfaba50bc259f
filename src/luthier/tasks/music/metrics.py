"""Judging tunes: whether bars fill their metre, and whether notes belong to their key."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from luthier.tasks.music.notation import Bar, Tune, is_double


def fitting_bars(bars: Sequence[Bar]) -> list[bool | None]:
    """For each bar whether its length fits its metre; None where it has no metre.

    A bar fits if it is full. A shorter one fits where a musician would count it as a part of one: it stands at an edge
    (the tune's ends, a repeat sign, a double bar, the beginning of an ending), and another such bar that follows it or
    goes before it in playing completes it. So an upbeat fits if the last bar of its part, of the part before or of the
    tune lacks exactly the upbeat; so do the two halves of a bar that a repeat sign divides, and the last bar of a first
    and of a second ending. An upbeat alone before a repeat sign leads into it, and needs no other.
    """
    fits: list[bool | None] = [None if bar.metre.length is None else bar.length == _wanted(bar) for bar in bars]
    for last, first in _joints(bars):
        wanted = bars[first].metre.length
        if wanted is None or fits[last] is None:
            continue
        pieces = bars[last].length, bars[first].length
        if all(piece < wanted for piece in pieces) and sum(pieces) == wanted:
            fits[last] = fits[first] = True
    for n in range(len(bars) - 1):
        if fits[n] is False and bars[n].length < _wanted(bars[n]) and _leads_in(bars, n):
            fits[n] = True
    return fits


def _leads_in(bars: Sequence[Bar], n: int) -> bool:
    """Whether a bar stands alone between an edge and the beginning of a repeat."""
    return (n == 0 or is_double(bars[n].opening)) and bars[n + 1].opening.endswith("|:") and ":" not in bars[n].opening


def _wanted(bar: Bar) -> Fraction:
    return (bar.metre.length or Fraction(0)) * max(1, bar.num_rests)


def _joints(bars: Sequence[Bar]) -> list[tuple[int, int]]:
    """(bar at the end of something, bar at a beginning that may follow it in playing)."""
    joints: list[tuple[int, int]] = []
    part = 0
    common: int | None = None  # the bar before the first of several endings
    for n in range(len(bars)):
        is_end = n + 1 == len(bars)
        next_bar = None if is_end else bars[n + 1]
        starts_ending = next_bar is not None and next_bar.starts_ending
        if not (is_end or starts_ending or (next_bar is not None and is_double(next_bar.opening))):
            continue
        joints += [(n, part), (n, 0)]
        if is_end:
            continue
        joints.append((n, n + 1))
        if starts_ending:
            if not bars[n].endings:
                common = n
            if common is not None:
                joints.append((common, n + 1))
        else:
            part, common = n + 1, None
    return joints


def notes_in_key(tune: Tune) -> tuple[int, int]:
    """(notes whose pitch class is in the scale of the key in force, notes in a stated key).

    The notes of a chord count each; a tied note counts once for each time it is written; grace notes do not count.
    `theory.Key.parse` says which notes a key has.
    """
    notes = [(note.scale, pitch) for bar in tune.bars for note in bar.notes for pitch in note.pitches if note.scale]
    return sum(pitch % 12 in scale for scale, pitch in notes), len(notes)
