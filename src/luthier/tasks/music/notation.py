"""Reads a tune in ABC notation, strictly: what is no notation is a fault with its place, never passed over.

One voice of the ABC standard 2.1: notes, rests, chords, tuplets, broken rhythm, grace notes, ties and slurs, bar lines,
repeats and endings, decorations, chord symbols, fields between and within lines. What it does not read it refuses:
further voices, overlays (&) and macros.

All lengths are parts of a whole note.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fractions import Fraction

from luthier.tasks.music.theory import ALTERATIONS, SEMITONES, Key, Metre, parse_unit

MAX_CHARACTERS = 100_000
LONGEST_NOTE = 16
"""In whole notes. A longer one is a slip of the pen, and would leave no picture of the rest."""

_LENGTH = r"\d{0,4}(?:/\d{1,4}|/{0,4})"
_NOTE = rf"(\^{{1,2}}|_{{1,2}}|=)?([A-Ga-g])([,']{{0,8}})({_LENGTH})"
_TOKENS = {
    "space": r"[ \t`]+|y\d{0,4}",
    "comment": r"%.*",
    "continuation": r"\\[ \t]*(?:%.*)?$",
    "field": r"\[([A-Za-z]):([^\]\n]*)\]",
    "text": r'"[^"\n]*"',
    "decoration": r"![^!\s]{1,40}!|\+[a-z]{1,40}\+",
    "ending": r"\[([1-9]\d{0,2}(?:[,-][1-9]\d{0,2})*)",
    "bar": r"\.?(?:\[\||:*\||::+)[|\]:]*(?:[ \t]*([1-9]\d{0,2}(?:[,-][1-9]\d{0,2})*))?",
    "grace": r"\{/?([^{}\n]*)\}",
    "tuplet": r"\(([2-9])(?::(\d{0,2}))?(?::(\d{0,2}))?",
    "slur": r"\.?\(|\)",
    "tie": r"\.?-",
    "chord": rf"\[([^\[\]\n|]+)\]({_LENGTH})",
    "note": _NOTE,
    "rest": rf"[zx]({_LENGTH})",
    "bars_of_rest": r"[ZX](\d{0,3})",
    "broken": r">{1,3}|<{1,3}",
}
_PATTERN = re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in _TOKENS.items()))
_FIELD_LINE = re.compile(r"([A-Za-z+]):(?!\||:)(.*)|([A-Za-z]):(.*)")
_SHORTHANDS = frozenset("~.HLMOPSTuv")
"""Letters that stand for a decoration unless a U: field says otherwise."""
_INSIDE_CHORD = re.compile(rf"(?:![^!\s]*!|[~.HLMOPSTuv])*{_NOTE}-?")
_GRACE_NOTE = re.compile(rf"(?:{_NOTE}|\[(?:{_NOTE})+\]{_LENGTH}|[ ()\-]|[~.HLMOPSTuv])")
_FILLED = {2: 3, 3: 2, 4: 3, 6: 2, 8: 3}


class NotationError(ValueError):
    """A place that is no ABC notation: its line and column, from 1, what stands there, and what was expected."""

    def __init__(self, line: int, column: int, found: str, expected: str) -> None:
        self.line, self.column = line, column
        where = f"line {line}, column {column}" if column else f"line {line}"
        super().__init__(f"{where}: {found}; expected {expected}")


@dataclass(slots=True)
class Note:
    """A note, chord or rest within a bar.

    Attributes:
        start: From the bar's beginning.
        length: How long it sounds; 0 for a grace note, which is kept out of bars.
        pitches: MIDI numbers, 60 for middle C; empty for a rest.
        is_tied: Whether it goes on in the next note of that pitch.
        scale: The pitch classes of the key in force.
    """

    start: Fraction
    length: Fraction
    pitches: tuple[int, ...]
    is_tied: bool = False
    scale: frozenset[int] = frozenset()


@dataclass(slots=True)
class Bar:
    """What stands between two bar lines.

    Attributes:
        metre: In force at its end; its length is what the bar should fill.
        length: What it fills.
        notes: In order; empty for whole bars of rest.
        num_rests: Bars of rest that it stands for; 0 for an ordinary bar.
        opening, closing: The bar lines before and after it, as written, a space between several; empty for none.
        endings: Numbers of the passes in which it is played; empty for all.
        starts_ending: Whether one of several endings begins with it.
    """

    metre: Metre = field(default_factory=Metre)
    length: Fraction = Fraction(0)
    notes: list[Note] = field(default_factory=list)
    num_rests: int = 0
    opening: str = ""
    closing: str = ""
    endings: tuple[int, ...] = ()
    starts_ending: bool = False

    @property
    def is_empty(self) -> bool:
        return self.length == 0 and not self.num_rests


@dataclass(slots=True)
class Tune:
    """A tune as read.

    Attributes:
        fields: Letter -> content of its first field of that letter: {"T": "The Kesh", "K": "G"}.
        bars: In order, all with something in them.
    """

    fields: dict[str, str]
    bars: list[Bar]

    @property
    def num_notes(self) -> int:
        return sum(bool(note.pitches) for bar in self.bars for note in bar.notes)


def read_tune(text: str) -> Tune:
    """Read one tune: a header that ends with K:, and music.

    Raises:
        NotationError: for anything that is no ABC, a header without a key, a second tune, or a tune without a note.
    """
    if len(text) > MAX_CHARACTERS:
        raise NotationError(1, 0, f"{len(text):,} characters", f"at most {MAX_CHARACTERS:,}")
    return _Reader(text).read()


def read_or_fault(text: str) -> Tune | NotationError:
    """`read_tune`, for callers to whom the fault is a finding."""
    try:
        return read_tune(text)
    except NotationError as error:
        return error


class _Reader:
    """The state of reading one tune, line by line and token by token."""

    def __init__(self, text: str) -> None:
        self.lines = text.replace("\r\n", "\n").replace("\r", "\n").strip("\n").split("\n")
        self.number = 0
        self.fields: dict[str, str] = {}
        self.in_header = True
        self.metre, self.unit, self.key = Metre(), Fraction(0), Key({}, frozenset())
        self.has_unit = False
        self.shorthands = set(_SHORTHANDS)
        self.voice: str | None = None
        self.bars: list[Bar] = []
        self.bar = Bar()
        self.altered: dict[str, int] = {}
        self.stretch = Fraction(1)
        """What a broken rhythm does to the next note."""
        self.waits_for_note = False
        self.last: Note | None = None
        self.tuplet, self.num_in_tuplet = Fraction(1), 0

    def read(self) -> Tune:
        for line in self.lines:
            self.number += 1
            self._read_line(line.rstrip())
        if self.in_header:
            raise self._error(0, "the header has no K: field", "a header such as X: T: M: L: K:, the key last")
        if self.waits_for_note:
            raise self._error(0, "the tune ends after > or <", "a note that the broken rhythm goes on to")
        self._close("")
        tune = Tune(self.fields, self.bars)
        if not tune.num_notes:
            raise self._error(0, "the tune has no note", "music after the K: field")
        return tune

    def _error(self, column: int, found: str, expected: str) -> NotationError:
        return NotationError(max(self.number, 1), column, found, expected)

    def _read_line(self, line: str) -> None:
        if not line.strip():
            raise self._error(0, "an empty line", "one tune, which an empty line would end")
        if line.startswith("%"):
            return
        match = _FIELD_LINE.fullmatch(line)
        # "E:|" is a note before a repeat sign; in a header there are no notes.
        if match and (match[1] or self.in_header):
            self._read_field(match[1] or match[3], match[2] if match[1] else match[4], 1)
        elif self.in_header:
            raise self._error(1, f"{line[:20]!r} in the header", "a field such as T: or K:")
        else:
            self._read_music(line)

    # -- fields

    def _read_field(self, letter: str, content: str, column: int) -> None:
        content = content.split("%")[0].strip()
        if letter == "X" and "X" in self.fields:
            raise self._error(column, "a second X: field", "one tune")
        if letter == "m":
            raise self._error(column, "a macro (m:)", "notes written out")
        if letter == "V":
            voice = (content.split() or [""])[0]
            if self.voice is not None and voice != self.voice:
                raise self._error(column, f"a second voice, V:{voice}", "a tune of one voice")
            self.voice = voice
        if letter == "U" and "=" in content:
            self.shorthands.add(content[0])
        self.fields.setdefault(letter, content)
        try:
            if letter == "M":
                self.metre = Metre.parse(content)
            elif letter == "L":
                self.unit, self.has_unit = parse_unit(content), True
            elif letter == "K":
                self.key = Key.parse(content)
                self.altered = {}
                if self.in_header and not self.has_unit:
                    self.unit = self.metre.default_unit
                self.in_header = False
        except ValueError as error:
            raise self._error(column, f"{letter}:{content[:30]}", str(error)) from None

    # -- music

    def _read_music(self, line: str) -> None:
        at = 0
        while at < len(line):
            match = _PATTERN.match(line, at)
            if match is None or match.end() == at:
                if line[at] not in self.shorthands:
                    raise self._error(at + 1, repr(line[at : at + 12]), "ABC notation")
                at += 1
                continue
            kind = match.lastgroup or ""
            self._take(kind, match[0], at + 1)
            at = match.end()

    def _take(self, kind: str, text: str, column: int) -> None:
        given = re.match(_TOKENS[kind], text)
        assert given is not None
        if kind == "field":
            self._read_field(given[1], given[2], column)
        elif kind == "bar":
            self._close(text.strip("0123456789,- \t"), given[1])
        elif kind == "ending":
            self._close("", given[1])
        elif kind == "note":
            pitch = self._pitch(given[1], given[2], given[3], column)
            self._add((pitch,), self.unit * self._factor(given[4], column), column)
        elif kind == "chord":
            self._chord(given[1], given[2], column)
        elif kind == "rest":
            self._add((), self.unit * self._factor(given[1], column), column)
        elif kind == "bars_of_rest":
            self._rest_for_bars(int(given[1] or 1), column)
        elif kind == "tuplet":
            self._start_tuplet(int(given[1]), given[2], given[3], column)
        elif kind == "broken":
            self._break_rhythm(text, column)
        elif kind == "tie":
            if self.last is not None:
                self.last.is_tied = bool(self.last.pitches)
        elif kind == "grace" and not re.fullmatch(f"(?:{_GRACE_NOTE.pattern})*", given[1]):
            raise self._error(column, repr(text[:12]), "grace notes between { and }")

    def _chord(self, inside: str, length: str, column: int) -> None:
        pitches, first, at = [], Fraction(1), 0
        while at < len(inside):
            match = _INSIDE_CHORD.match(inside, at)
            if match is None:
                raise self._error(column + 1 + at, repr(inside[at : at + 12]), "the notes of a chord")
            pitches.append(self._pitch(match[1], match[2], match[3], column + 1 + at))
            if at == 0:
                first = self._factor(match[4], column)
            at = match.end()
        self._add(tuple(pitches), self.unit * first * self._factor(length, column), column)

    def _pitch(self, sign: str | None, letter: str, octave: str, column: int) -> int:
        name = letter.upper()
        if sign:
            self.altered[name] = ALTERATIONS[sign]  # for the rest of the bar, in every octave
        alteration = self.altered.get(name, self.key.alterations.get(name, 0))
        octaves = (5 if letter == name else 6) + octave.count("'") - octave.count(",")
        pitch = 12 * octaves + SEMITONES[name] + alteration
        if not 0 <= pitch <= 127:
            raise self._error(column, f"{letter}{octave}", "a pitch that an instrument has")
        return pitch

    def _factor(self, text: str, column: int) -> Fraction:
        """The multiple of the unit that a number such as 3, 3/2, /4 or // stands for."""
        above, slash, below = text.partition("/")
        num_halvings = len(text) - len(text.rstrip("/"))
        divisor = 2**num_halvings if num_halvings else int(below or 1) if slash else 1
        if divisor == 0 or above.strip("0") == "" != above:
            raise self._error(column, f"the length {text}", "a length above 0")
        return Fraction(int(above or 1), divisor)

    def _add(self, pitches: tuple[int, ...], length: Fraction, column: int) -> None:
        length *= self.stretch
        self.stretch, self.waits_for_note = Fraction(1), False
        if self.num_in_tuplet:
            length *= self.tuplet
            self.num_in_tuplet -= 1
        if length > LONGEST_NOTE:
            raise self._error(column, f"a note of {float(length):,.0f} whole notes", f"at most {LONGEST_NOTE}")
        self.last = Note(self.bar.length, length, pitches, scale=self.key.scale)
        self.bar.notes.append(self.last)
        self.bar.length += length

    def _rest_for_bars(self, number: int, column: int) -> None:
        if self.metre.length is None or not self.bar.is_empty or number == 0:
            raise self._error(column, f"Z{number}", "whole bars of rest, alone between bar lines and in a metre")
        self.bar.num_rests, self.bar.length = number, number * self.metre.length
        self.last = None

    def _start_tuplet(self, number: int, filled: str | None, reach: str | None, column: int) -> None:
        default = _FILLED.get(number, 3 if self.metre.is_compound else 2)
        time, self.num_in_tuplet = int(filled or default), int(reach or number)
        if time == 0 or self.num_in_tuplet == 0:
            raise self._error(column, "a tuplet of nothing", "as in (3 or (5:4:5")
        self.tuplet = Fraction(time, number)

    def _break_rhythm(self, text: str, column: int) -> None:
        """`a>b` takes half of b's length and gives it to a; `>>` three quarters, `>>>` seven eighths."""
        if self.last is None or self.waits_for_note:
            raise self._error(column, text, "a note before it")
        shorter = Fraction(1, 2 ** len(text))
        mine, next_ones = (2 - shorter, shorter) if text[0] == ">" else (shorter, 2 - shorter)
        change = self.last.length * (mine - 1)
        self.last.length += change
        self.bar.length += change
        self.stretch, self.waits_for_note = next_ones, True

    def _close(self, line: str, ending: str | None = None) -> None:
        """End the bar at a bar line or an ending's bracket, and begin the next."""
        if self.bar.is_empty:
            self.bar.opening = f"{self.bar.opening} {line}".strip()
            if line:
                self.bar.endings = self._goes_on(line)
                if self.bars:
                    self.bars[-1].closing = f"{self.bars[-1].closing} {line}".strip()
        else:
            self.bar.closing, self.bar.metre = line, self.metre
            self.bars.append(self.bar)
            self.bar = Bar(opening=line, endings=self._goes_on(line))
        if line:
            self.altered = {}
        self.last = None
        if ending is not None:
            self.bar.endings, self.bar.starts_ending = _passes(ending), True

    def _goes_on(self, line: str) -> tuple[int, ...]:
        """The passes of the ending before, which reaches to a repeat sign, a double bar or the next ending."""
        return () if is_double(line) else self.bar.endings


def is_double(line: str) -> bool:
    """Whether a bar line ends a part of the tune: a repeat sign, a double or a thick bar."""
    return ":" in line or "||" in line or "]" in line or "[" in line


def _passes(text: str) -> tuple[int, ...]:
    """The passes that an ending's number names: "1,3" or "1-3"; at most ten are kept."""
    passes: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        passes += range(int(first), min(int(last or first), int(first) + 9) + 1)
    return tuple(passes[:10])
