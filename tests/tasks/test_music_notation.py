"""Reading ABC: lengths and pitches against a second reader, what is refused, and which bars fit."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from luthier.tasks.music.metrics import fitting_bars, notes_in_key
from luthier.tasks.music.midi import midi_file, played_bars
from luthier.tasks.music.notation import NotationError, Tune, read_or_fault, read_tune
from luthier.tasks.music.theory import Key, Metre

HEAD = "X:1\nT:t\nM:4/4\nL:1/8\nK:"


def tune(body: str, key: str = "C", metre: str = "4/4") -> Tune:
    return read_tune(f"X:1\nM:{metre}\nL:1/8\nK:{key}\n{body}")


def lengths(body: str, metre: str = "4/4") -> list[Fraction]:
    return [note.length * 8 for bar in tune(body, metre=metre).bars for note in bar.notes]


def pitches(body: str, key: str = "C") -> list[tuple[int, ...]]:
    return [note.pitches for bar in tune(body, key).bars for note in bar.notes]


@pytest.mark.parametrize("key", ["C", "D", "Bbmaj", "F#m", "Ador", "Emix", "Gphr", "Blyd", "C#", "Ebm"])
def test_equals_a_second_reader(key: str) -> None:
    from music21 import abcFormat, pitch

    body = (
        "\"Am\"A2 B/c/ d3/2e/ | (3fga b>c d<e f>>g | [CEG]2 z2 A,,2 c''2- | c2 {g}a4 .b ~d |1 (5:4:5abcde f4 :|\n"
        "|2 _a2 =b2 ^^c2 __d2 || !trill!e2 u f2 (g2 a2) |] % the end"
    )
    text = f"{HEAD}{key}\n{body}\nw: some words"
    handler = abcFormat.ABCHandler()
    handler.process(text)
    theirs = []
    for token in handler.tokens:
        if not isinstance(token, abcFormat.ABCNote) or token.inGrace:
            continue
        length = Fraction(token.quarterLength).limit_denominator(4096) / 4
        if token.activeTuplet:
            length *= Fraction(token.activeTuplet.numberNotesNormal, token.activeTuplet.numberNotesActual)
        parts = token.subTokens if isinstance(token, abcFormat.ABCChord) else [token]
        found = () if token.isRest else tuple(pitch.Pitch(part.pitchName).midi for part in parts)
        theirs.append((found, length))
    ours = [(note.pitches, note.length) for bar in read_tune(text).bars for note in bar.notes]
    assert len(ours) > 30
    assert ours == theirs


def test_lengths() -> None:
    assert lengths("A A2 A/ A// A/4 A3/2 A3/") == [1, 2, Fraction(1, 2), Fraction(1, 4), Fraction(1, 4), 1.5, 1.5]
    assert lengths("a>b a<b a>>b a2>b2") == [1.5, 0.5, 0.5, 1.5, 1.75, 0.25, 3, 1]
    assert lengths("(3abc (2ab (3:2:1a b") == [*[Fraction(2, 3)] * 3, 1.5, 1.5, Fraction(2, 3), 1]
    assert lengths("(5abcde") == [Fraction(2, 5)] * 5
    assert lengths("(5abcde", metre="6/8") == [Fraction(3, 5)] * 5
    assert lengths("[L:1/4] a x [L:1/16] b [c2e]2") == [2, 1 * 2, 0.5, 2]
    unit = [read_tune(f"M:{m}\nK:C\na").bars[0].length for m in ("2/4", "3/4", "C|", "none")]
    assert unit == [Fraction(1, 16), Fraction(1, 8), Fraction(1, 8), Fraction(1, 8)]


def test_accidentals_last_to_the_bar_line() -> None:
    assert pitches("^f F f|f =f [K:D] f", "C") == [(78,), (66,), (78,), (77,), (77,), (78,)]
    assert pitches("F c B e, C'", "Eb") == [(65,), (72,), (70,), (63,), (72,)]


def test_keys() -> None:
    assert {letter for letter, a in Key.parse("Edor").alterations.items() if a} == {"F", "C"}
    assert Key.parse("Am").scale == frozenset({9, 11, 0, 2, 4, 5, 7, 6, 8})
    assert Key.parse("Bloc").alterations == {}
    assert Key.parse("D exp _b ^f").alterations == {"B": -1, "F": 1}
    assert Key.parse("HP").scale == Key.parse("Hp").scale - {6, 1} | {5, 0}
    assert Key.parse("none").scale == Key.parse("clef=bass").scale == frozenset()
    assert Key.parse("G clef=treble").alterations == {"F": 1}
    assert Metre.parse("2+3/8").length == Metre.parse("(2+3)/8").length == Fraction(5, 8)
    assert notes_in_key(tune("CDE^F|[CE^G]2", "C")) == (5, 7)
    assert notes_in_key(tune("ABcd e^f^ga", "Am")) == (8, 8)
    assert notes_in_key(tune("ABcd", "none")) == (0, 0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no K: field|an empty line"),
        ("X:1\nT:t\nABc", "line 3, column 1: 'ABc' in the header"),
        (f"{HEAD}Zork\nABc", "K:Zork; expected a key"),
        (f"{HEAD}G#maj\nABc", "at most seven"),
        ("X:1\nM:0/4\nK:C\nA", "M:0/4; expected a metre"),
        ("X:1\nM:four\nK:C\nA", "expected a metre"),
        ("X:1\nL:1/0\nK:C\nA", "expected a length"),
        (f"{HEAD}C\n", "no note"),
        (f"{HEAD}C\nz4|z4|", "no note"),
        (f"{HEAD}C\nABc\nThe quick brown fox", "line 7, column 2: 'he quick bro'"),
        (f"{HEAD}C\nAB 😀", "line 6, column 4"),
        (f"{HEAD}C\nA999999", "whole notes"),
        (f"{HEAD}C\nA0", "length above 0"),
        (f"{HEAD}C\nA/0", "length above 0"),
        (f"{HEAD}C\nc''''''''", "pitch"),
        (f"{HEAD}C\n[CEG", "ABC notation"),
        (f"{HEAD}C\n[C?G]", "notes of a chord"),
        (f"{HEAD}C\n{{hallo}}A", "grace notes"),
        (f'{HEAD}C\n"Am', "ABC notation"),
        (f"{HEAD}C\n>A", "a note before it"),
        (f"{HEAD}C\nA>", "ends after >"),
        (f"{HEAD}C\n(3:0:2AB", "tuplet of nothing"),
        (f"{HEAD}C\nA & B", "ABC notation"),
        (f"{HEAD}C\nV:1\nA\nV:2\nB", "second voice"),
        (f"{HEAD}C\nm: ~g = A\nB", "macro"),
        (f"{HEAD}C\nA\nX:2\nK:C\nB", "second X:"),
        (f"{HEAD}C\nA|\n\nB|", "line 7: an empty line"),
        (f"{HEAD}C\nAZ2|", "whole bars of rest"),
        ("A" * 200_000, "characters"),
    ],
)
def test_what_is_no_notation_is_refused_with_its_place(text: str, said: str) -> None:
    with pytest.raises(NotationError) as caught:
        read_tune(text)
    assert any(part in str(caught.value) for part in said.split("|")), str(caught.value)


@pytest.mark.parametrize(
    ("body", "fits"),
    [
        ("A4 B4|c8|", [1, 1]),
        ("A4 B3|c9|d8|", [0, 0, 1]),  # the first is short, the second long: neither is completed
        ("d2|A8|B6|", [1, 1, 1]),  # upbeat and last bar
        ("d2|A8|B4|", [0, 1, 0]),
        ("d2|A8|B6:|d2|A8|B6|]", [1, 1, 1, 1, 1, 1]),
        ("|:d2|A8|B6::e2|c8|c6:|", [1, 1, 1, 1, 1, 1]),
        ("|:d2|A8|B6:||:c8|c8:|", [1, 1, 1, 1, 1]),
        ("|:A8|B4:|c4|d8|]", [1, 1, 1, 1]),  # a bar that a repeat sign divides
        ("d2|:A8|B8:|", [1, 1, 1]),  # an upbeat that leads into a repeat
        ("d2|A8|B8|", [0, 1, 1]),
        ("|:d2|A8|1B6:|2B8|]", [1, 1, 1, 1]),
        ("|:d2|A8|[1 c8|B6:|[2 c8|B6|]", [1, 1, 1, 1, 1, 1]),
        ("|:A8|B4|1c4:|2d4|]", [1, 1, 1, 1]),  # endings begin within a bar
        ("d2|A8|B6||d2|A8|c6|]", [1] * 6),
        ("A8|\n|B8|\n|c3|]", [1, 1, 0]),  # a line that ends and one that begins with a bar line is no double bar
        ("Z2|A8|", [1, 1]),
        ("[M:3/4]A6|[M:2/4]A4|A5|", [1, 1, 0]),
        ("A8|[M:none]ABc|[M:4/4]B8|", [1, None, 1]),
    ],
)
def test_which_bars_fit(body: str, fits: list[int | None]) -> None:
    found = fitting_bars(tune(body).bars)
    assert found == [None if fit is None else bool(fit) for fit in fits]


def test_repeats_and_endings_are_played() -> None:
    def order(body: str) -> str:
        names = "CDEFGAB"
        return "".join(names["CDEFGAB".index("C D EF G A B".replace(" ", "")[i])] for i in firsts(body))

    def firsts(body: str) -> list[int]:
        steps = {60: 0, 62: 1, 64: 2, 65: 3, 67: 4, 69: 5, 71: 6}
        return [steps[bar.notes[0].pitches[0]] for bar in played_bars(tune(body).bars)]

    assert order("C8|D8:|E8|") == "CDCDE"
    assert order("C8|:D8|E8:|:F8:|G8") == "CDEDEFFG"
    assert order("|:C8|1D8:|2E8|]F8") == "CDCEF"
    assert order("|:C8|1,3D8:|2,4E8:|:F8:|") == "CDCECDCEFF"
    assert order("C8||D8|E8|") == "CDE"


def test_the_midi_file_reads_back() -> None:
    import io

    import mido

    content = midi_file(read_tune(f"{HEAD}C\n|:[CE]2 G2- G2 z2:|".replace("T:t", "T:Sill 露 🎵")))
    file = mido.MidiFile(file=io.BytesIO(content))
    now, sounds = 0, []
    for message in file.tracks[0]:
        now += message.time
        if message.type in ("note_on", "note_off"):
            sounds.append((now / 480, message.type == "note_on", message.note))
    once = [(0, True, 60), (0, True, 64), (1, False, 60), (1, False, 64), (1, True, 67), (3, False, 67)]
    assert sounds == once + [(at + 4, on, note) for at, on, note in once]
    assert file.length == pytest.approx(3.5)


def test_no_text_is_read_with_another_error_or_into_bars_that_do_not_add_up() -> None:
    draw = random.Random(7)
    letters = "ABCDEFGabcdefgzxZX |:[]1234567890/\\^_=,'<>(){}\"!+.~-&%HTuMLK\nw😀露"
    num_read = 0
    for n in range(400):
        text = list(f"{HEAD}D\n|:D2F2 (3ABc d>e|[M:3/4] [DFA]4 z2:|\n")
        if n % 4 == 0:
            text += draw.choices(letters, k=60)
        for _ in range(draw.randint(1, 4)):
            text[draw.randrange(len(text))] = draw.choice(letters)
        found = read_or_fault("".join(text))
        if isinstance(found, Tune):
            num_read += 1
            assert all(bar.num_rests or sum(note.length for note in bar.notes) == bar.length for bar in found.bars)
            assert len(fitting_bars(found.bars)) == len(found.bars)
            assert midi_file(found)[:4] == b"MThd"
    assert 20 < num_read < 380
