"""Tags of words and spans of characters, one into the other, in the scheme BIO (IOB2).

B-x begins an entity of type x, I-x goes on with it, O is outside of all. An I-x behind anything but B-x or I-x begins
an entity, as conlleval and seqeval read it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from luthier.tasks.tagging.schema import Span

OUTSIDE = "O"
Words = Sequence[tuple[int, int]]

_WORD = re.compile("[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]|[^\\W_]+|_+|[^\\w\\s]")
_UNSPACED = re.compile("([\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])")


def tag_names(labels: Sequence[str]) -> tuple[str, ...]:
    """All tags of these types, in the order of the head's classes: O first."""
    return (OUTSIDE, *(f"{prefix}-{label}" for label in labels for prefix in "BI"))


def split_words(text: str) -> tuple[tuple[int, int], ...]:
    """Characters [start, end) of the words of a plain text.

    A word is a run of letters and digits, or a single other visible character. Thai, Lao, kana and Han, which are
    written without spaces, give a word a character.
    """
    words: list[tuple[int, int]] = []
    for match in _WORD.finditer(text):
        start = match.start()
        # A run of letters may hold characters of those scripts behind its first.
        for piece in _UNSPACED.split(match.group()):
            if piece:
                words.append((start, start + len(piece)))
                start += len(piece)
    return tuple(words)


def tags_of(words: Words, spans: Sequence[Span]) -> tuple[str, ...]:
    """The tag of each word. Spans are in order and of whole words."""
    tags = [OUTSIDE] * len(words)
    for span in spans:
        inside = [k for k, (start, end) in enumerate(words) if span.start <= start and end <= span.end]
        for place, k in enumerate(inside):
            tags[k] = f"{'I' if place else 'B'}-{span.label}"
    return tuple(tags)


def spans_of(words: Words, tags: Sequence[str]) -> tuple[Span, ...]:
    """The entities that tags name."""
    spans: list[Span] = []
    before = OUTSIDE
    for (start, end), tag in zip(words, tags, strict=True):
        label = tag[2:]
        if tag != OUTSIDE:
            goes_on = tag.startswith("I-") and before != OUTSIDE and before[2:] == label
            begin = spans.pop().start if goes_on else start
            spans.append(Span(begin, end, label))
        before = tag
    return tuple(spans)
