"""A tune as a MIDI file, repeats and endings played."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from fractions import Fraction

from luthier.tasks.music.notation import Bar, Tune

TICKS_PER_QUARTER = 480
QUARTERS_PER_MINUTE = 120
VELOCITY = 80
MAX_BARS = 2000
"""Played; a tune that repeats itself beyond this breaks off."""


def midi_file(tune: Tune) -> bytes:
    """The tune as a MIDI file of type 0 at 120 quarter notes a minute, without chord symbols and grace notes."""
    import mido

    track = mido.MidiTrack()
    track.append(
        mido.MetaMessage("track_name", name=tune.fields.get("T", "").encode("latin-1", "replace").decode("latin-1"))
    )
    track.append(mido.MetaMessage("set_tempo", tempo=mido.bpm2tempo(QUARTERS_PER_MINUTE)))
    now = 0
    for at, kind, pitch in _events(tune):
        track.append(mido.Message(kind, note=pitch, velocity=VELOCITY, time=at - now))
        now = at
    file = mido.MidiFile(type=0, ticks_per_beat=TICKS_PER_QUARTER)
    file.tracks.append(track)
    content = io.BytesIO()
    file.save(file=content)
    return content.getvalue()


def played_bars(bars: Sequence[Bar]) -> list[Bar]:
    """The bars in the order in which they are played: a part between repeat signs twice, or once for each ending."""
    played: list[Bar] = []
    start, number, at = 0, 1, 0
    while at < len(bars) and len(played) < MAX_BARS:
        bar = bars[at]
        if at != start and bar.opening.endswith(":"):
            start, number = at, 1
        if not bar.endings or number in bar.endings:
            played.append(bar)
            closes = bar.closing.split(" ")[0].startswith((":", ".:")) or " :" in bar.closing
            if closes and number < _num_passes(bars, start):
                number, at = number + 1, start
                continue
            if closes:
                start, number = at + 1, 1
        at += 1
    return played


def _num_passes(bars: Sequence[Bar], start: int) -> int:
    """How often the part that begins at `start` is played: as often as its endings say, at least twice."""
    passes = 2
    for n in range(start, len(bars)):
        if n > start and bars[n].opening.endswith(":"):
            break
        passes = max(passes, *bars[n].endings, 2)
    return passes


def _events(tune: Tune) -> list[tuple[int, str, int]]:
    """(tick, "note_on" or "note_off", pitch) in order; a note ends before the next of its pitch begins."""
    events: list[tuple[int, str, int]] = []
    begun: dict[int, Fraction] = {}
    now = Fraction(0)
    for bar in played_bars(tune.bars):
        for note in bar.notes:
            start = now + note.start
            for pitch in note.pitches:
                first = begun.pop(pitch, start)
                if note.is_tied:
                    begun[pitch] = first
                else:
                    events.append((_ticks(first), "note_on", pitch))
                    events.append((_ticks(start + note.length), "note_off", pitch))
        now += bar.length
    return sorted(events, key=lambda event: (event[0], event[1] == "note_on"))


def _ticks(time: Fraction) -> int:
    return math.floor(time * 4 * TICKS_PER_QUARTER)
