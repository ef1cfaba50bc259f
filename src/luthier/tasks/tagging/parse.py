"""Checking a tagging row: words with BIO tags, or a text with spans of characters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from luthier.data.rows import RowError, preview
from luthier.errors import nearest
from luthier.tasks.shapes import require_text, unpack_json
from luthier.tasks.tagging.bio import OUTSIDE, spans_of, split_words
from luthier.tasks.tagging.schema import Span, TaggedText


def parse_tagged(row: Mapping[str, Any], labels: Sequence[str], is_query: bool = False) -> TaggedText:
    """Check a row {tokens, tags} or {text, spans} and make it a record.

    Args:
        labels: The types there are; empty where they are not settled.
        is_query: The row is to be predicted for, and its tags or spans are passed over.

    Raises:
        RowError: for a wrong type or number of tags, a tag that is none of BIO, or a span that does not fit its text.
    """
    if "tokens" in row:
        words = _parse_tokens(row.get("tokens"))
        text = " ".join(words)
        bounds, start = [], 0
        for word in words:
            bounds.append((start, start + len(word)))
            start += len(word) + 1
        tags = [OUTSIDE] * len(words) if is_query else _parse_tags(row.get("tags"), len(words), labels)
        return TaggedText(text, tuple(bounds), spans_of(bounds, tags))
    text = require_text(row.get("text"), "text")
    found = split_words(text)
    return TaggedText(text, found, () if is_query else _parse_spans(row.get("spans"), text, found, labels))


def _parse_tokens(value: Any) -> list[str]:
    tokens = unpack_json(value)
    if not isinstance(tokens, list | tuple):
        raise RowError("tokens", f"is {preview(tokens)}", "a list of words")
    if not tokens:
        raise RowError("tokens", "is an empty list", "at least one word", kind="empty")
    return [require_text(token, f"tokens[{i}]") for i, token in enumerate(tokens)]


def _parse_tags(value: Any, num_words: int, labels: Sequence[str]) -> list[str]:
    tags = unpack_json(value)
    if not isinstance(tags, list | tuple):
        raise RowError("tags", f"is {preview(tags)}", "a list of BIO tags, as in [O, B-person, I-person]")
    if len(tags) != num_words:
        raise RowError("tags", f"holds {len(tags)} tags for {num_words} tokens", "one tag a token")
    return [_parse_tag(tag, f"tags[{i}]", labels) for i, tag in enumerate(tags)]


def _parse_tag(tag: Any, where: str, labels: Sequence[str]) -> str:
    if isinstance(tag, str) and (tag == OUTSIDE or (tag[:2] in ("B-", "I-") and tag[2:].strip())):
        if tag != OUTSIDE:
            _check_label(tag[2:], where, labels)
        return tag
    fix = "write the names of the tags in place of their numbers" if isinstance(tag, int) else "correct the tag"
    if isinstance(tag, str) and tag[:2] in ("L-", "U-", "E-", "S-"):
        fix = "turn BIOES or BILOU into BIO: E and L become I, S and U become B"
    raise RowError(where, f"is {preview(tag)}", "O, B-type or I-type", fix)


def _parse_spans(value: Any, text: str, words: Sequence[tuple[int, int]], labels: Sequence[str]) -> tuple[Span, ...]:
    values = unpack_json(value)
    if not isinstance(values, list | tuple):
        raise RowError("spans", f"is {preview(values)}", "a list of {start, end, label}, empty for a text without")
    spans = sorted(
        (_parse_span(item, f"spans[{i}]", text, words, labels) for i, item in enumerate(values)),
        key=lambda span: (span.start, span.end),
    )
    for earlier, later in pairwise(spans):
        if later.start < earlier.end:
            raise RowError(
                "spans",
                f"{_shown(earlier, text)} and {_shown(later, text)} lie over each other",
                "entities that lie apart",
                "keep one of the two",
            )
    return tuple(spans)


def _parse_span(item: Any, where: str, text: str, words: Sequence[tuple[int, int]], labels: Sequence[str]) -> Span:
    if isinstance(item, Mapping):
        parts: list[Any] = [item.get("start"), item.get("end"), item.get("label")]
    else:
        parts = list(item) if isinstance(item, list | tuple) else []
    is_whole = len(parts) == 3 and all(isinstance(n, int) and not isinstance(n, bool) for n in parts[:2])
    if not is_whole or not isinstance(parts[2], str) or not parts[2].strip():
        raise RowError(where, f"is {preview(item)}", '{"start": 0, "end": 5, "label": "person"}, in characters')
    start, end, label = parts
    if not 0 <= start < end <= len(text):
        raise RowError(
            where, f"covers characters {start} to {end} of a text of {len(text)}", "a start before its end, in the text"
        )
    # White space at the ends belongs to no word.
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    span = Span(start, end, label.strip())
    _check_label(span.label, where, labels)
    cut = [text[a:b] for a, b in words if (a < start < b) or (a < end < b)]
    if cut or start == end:
        raise RowError(
            where,
            f"{_shown(span, text)} cuts the word {cut[0]!r}" if cut else "covers nothing but white space",
            "whole words",
            "move its start or end to the end of the word; both count characters from 0, and `end` is the first behind",
        )
    return span


def _check_label(label: str, where: str, labels: Sequence[str]) -> None:
    if labels and label not in labels:
        raise RowError(
            where,
            f"{label!r} is not one of the {len(labels)} types{nearest(label, labels)}",
            f"one of {', '.join(labels[:10])}",
            "correct it, add training rows with it, or name it under task.labels",
            kind="label",
        )


def _shown(span: Span, text: str) -> str:
    return f"{preview(text[span.start : span.end], 40)} ({span.start} to {span.end})"
