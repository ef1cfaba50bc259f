"""What the fields M:, L: and K: of an ABC tune mean: lengths as parts of a whole note, keys as altered letters.

The ABC standard 2.1 (abcnotation.com/wiki/abc:standard:v2.1), sections 3.1.6 to 3.1.14.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

LETTERS = "CDEFGAB"
SEMITONES = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
ALTERATIONS = {"^^": 2, "^": 1, "=": 0, "_": -1, "__": -2}

_FIFTHS = {"F": -1, "C": 0, "G": 1, "D": 2, "A": 3, "E": 4, "B": 5}
_MODES = {"maj": 0, "ion": 0, "mix": -1, "dor": -2, "min": -3, "aeo": -3, "m": -3, "phr": -4, "loc": -5, "lyd": 1}
_MINOR = -3
_SHARPS = "FCGDAEB"
_KEY = re.compile(r"([A-G])([#b]?)\s*([A-Za-z]*)((?:\s*(?:\^{1,2}|_{1,2}|=)[A-Ga-g])*)(?:\s.*)?")
_PIPES = {"HP": {}, "Hp": {"F": 1, "C": 1}}
_METRE = re.compile(r"\(?(\d{1,3}(?:\s*\+\s*\d{1,3})*)\)?\s*/\s*(\d{1,3})")
_COMPOUND = (6, 9, 12)


@dataclass(frozen=True, slots=True)
class Metre:
    """A time signature.

    Attributes:
        length: Of a whole bar; None for free metre.
        is_compound: Whether beats fall in threes, as in 6/8: tuplets of 5, 7 and 9 then fill three units, not two.
    """

    length: Fraction | None = None
    is_compound: bool = False

    @classmethod
    def parse(cls, text: str) -> Metre:
        """Read the content of an M: field.

        Raises:
            ValueError: saying what was expected.
        """
        text = text.strip()
        if text in ("C", "C|"):
            return cls(Fraction(1))
        if text in ("", "none"):
            return cls()
        match = _METRE.fullmatch(text)
        above = sum(int(part) for part in match[1].split("+")) if match else 0
        if match is None or above == 0 or int(match[2]) == 0:
            raise ValueError("a metre such as 4/4, 6/8, C or none")
        return cls(Fraction(above, int(match[2])), above in _COMPOUND and "+" not in match[1])

    @property
    def default_unit(self) -> Fraction:
        """The length of a note without a number where no L: field says it."""
        return Fraction(1, 16) if self.length is not None and self.length < Fraction(3, 4) else Fraction(1, 8)


def parse_unit(text: str) -> Fraction:
    """Read the content of an L: field.

    Raises:
        ValueError: saying what was expected.
    """
    match = re.fullmatch(r"\s*(\d{1,3})(?:\s*/\s*(\d{1,3}))?\s*", text)
    if match is None or int(match[1]) == 0 or int(match[2] or 1) == 0:
        raise ValueError("a length such as 1/8")
    return Fraction(int(match[1]), int(match[2] or 1))


@dataclass(frozen=True)
class Key:
    """A key signature.

    Attributes:
        alterations: Letter -> semitones that the signature moves it by.
        scale: The pitch classes, 0 for C, that belong to the key; empty where no key is stated.
    """

    alterations: dict[str, int]
    scale: frozenset[int]

    @classmethod
    def parse(cls, text: str) -> Key:
        """Read the content of a K: field.

        The scale holds the notes of the signature; in minor keys also the raised sixth and seventh degrees of the
        melodic and harmonic minor.

        Raises:
            ValueError: saying what was expected.
        """
        text = text.strip()
        if text.split(" ")[0] in ("", "none") or "=" in text.split(" ")[0]:  # none, or a clef alone
            return cls({}, frozenset())
        if text.split(" ")[0] in _PIPES:
            return cls._of(dict(_PIPES[text.split(" ")[0]]))
        match = _KEY.fullmatch(text)
        mode = match[3].lower() if match else ""
        if match is None or not (mode in ("", "m", "exp") or (len(mode) >= 3 and mode[:3] in _MODES)):
            raise ValueError("a key such as D, Bb, F#m, Ador or none")
        tonic, accidental, named = match[1], match[2], match[4]
        shift = 0 if mode in ("", "exp") else _MODES[mode if mode == "m" else mode[:3]]
        fifths = 0 if mode == "exp" else _FIFTHS[tonic] + {"#": 7, "b": -7, "": 0}[accidental] + shift
        if abs(fifths) > 7:
            raise ValueError("a key of at most seven sharps or flats")
        altered = dict.fromkeys(_SHARPS[:fifths], 1) if fifths > 0 else {}
        if fifths < 0:
            altered = dict.fromkeys(_SHARPS[fifths:], -1)
        for sign, letter in re.findall(r"(\^{1,2}|_{1,2}|=)([A-Ga-g])", named):
            altered[letter.upper()] = ALTERATIONS[sign]
        key = cls._of(altered)
        if shift != _MINOR:
            return key
        root = SEMITONES[tonic] + {"#": 1, "b": -1, "": 0}[accidental]
        return cls(key.alterations, key.scale | {(root + 9) % 12, (root + 11) % 12})

    @classmethod
    def _of(cls, alterations: dict[str, int]) -> Key:
        return cls(alterations, frozenset((SEMITONES[a] + alterations.get(a, 0)) % 12 for a in LETTERS))
