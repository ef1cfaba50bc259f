"""Tagging: a text becomes one sequence, or several windows, in which each word's last token has a tag.

    once:   [BOS, where the tokenizer adds one] text
    twice:  [BOS, where the tokenizer adds one] text "\n" text     with tags in the second copy alone
    of an encoder:  [CLS] text [SEP]

The text is tokenized as a whole, as it is when the tuned model is used elsewhere, and a token belongs to the words
whose characters it covers. A causal model has seen the whole of a word only at its last token, so the tag is read
there; read twice, it has seen the words that follow too. An encoder sees the whole text at every token, and reads it
once. Where one token ends two words, both have its tag: the first word's, or if that is O the second's.

A text that is too long is split into windows at the ends of words, each read by itself; no word is lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from luthier.data.rows import RowError, preview
from luthier.data.template import Renderer
from luthier.errors import DataError
from luthier.tasks.fit import too_long
from luthier.tasks.tagging.bio import OUTSIDE, spans_of, tag_names, tags_of
from luthier.tasks.tagging.metrics import entities, ratios, ratios_by_type
from luthier.tasks.tagging.parse import parse_tagged
from luthier.tasks.tagging.schema import Span, TaggedText, TaggingConfig, Tags
from luthier.tasks.task import Marks, Probabilities, Task, Truncation
from luthier.types import NO_CLASS, Example, Objective, Prompt

SEPARATOR = "\n"
"""Between the two copies of a text that is read twice."""


@dataclass(frozen=True, slots=True)
class _Window:
    """Some of a text's tokens, and for each place where a tag is read the words that it is for."""

    ids: list[int]
    readings: dict[int, list[int]]


@dataclass(frozen=True)
class TaggingTask:
    """`task: tagging`. See `luthier.tasks.task.Task` for the verbs."""

    config: TaggingConfig = field(default_factory=TaggingConfig)
    name: str = "tagging"
    objective: Objective = "token_head"
    generates: bool = False
    chooses: bool = False
    labels: tuple[str, ...] = ()
    threshold: float | None = None
    needs: tuple[str, ...] = ("seqeval",)

    @property
    def outputs(self) -> tuple[str, ...]:
        return tag_names(self.labels) if self.labels else ()

    def with_labels(self, labels: Sequence[str]) -> Task:
        """The same task with its types of entities settled, in this order.

        Raises:
            DataError: for none, or one named twice.
        """
        if not labels or len(set(labels)) != len(labels):
            raise DataError(
                f"the types of entities are {', '.join(map(repr, labels)) or 'none'}",
                "one type or more, each once",
                "add rows with entities",
            )
        return replace(self, labels=tuple(labels))

    def parse(self, row: Mapping[str, Any]) -> TaggedText:
        return parse_tagged(row, self.labels)

    def parse_query(self, row: Mapping[str, Any]) -> TaggedText:
        return parse_tagged(row, (), is_query=True)

    def from_json(self, value: Mapping[str, Any]) -> TaggedText:
        return TaggedText.from_json(value)

    def labels_of(self, record: TaggedText) -> tuple[str, ...]:
        return tuple(span.label for span in record.spans)

    def examples(
        self, record: TaggedText, renderer: Renderer, max_length: int, truncation: Truncation = "end", row: int = 0
    ) -> list[Example]:
        """The text's windows with their tags. `truncation` "end" and "start" both keep all of it."""
        windows = self._windows(record, renderer, max_length)
        if len(windows) > 1 and truncation in ("error", "drop"):
            if truncation == "drop":
                return []
            raise too_long(sum(len(window.ids) for window in windows), max_length)
        for span in record.spans:
            if span.label not in self.labels:
                raise self._unknown(span)
        index = {tag: k for k, tag in enumerate(self.outputs)}
        tags = tags_of(record.words, record.spans)
        return [_example(window, [index[tag] for tag in tags], row) for window in windows]

    def queries(self, record: TaggedText, renderer: Renderer, max_length: int, row: int = 0) -> list[Example]:
        outside = [0] * len(record.words)
        return [_example(window, outside, row) for window in self._windows(record, renderer, max_length)]

    def read(self, record: TaggedText, renderer: Renderer, max_length: int, given: Sequence[Probabilities]) -> Tags:
        """The likeliest tag of each word; O for a word that no token stands for."""
        tags, probabilities = [OUTSIDE] * len(record.words), [1.0] * len(record.words)
        for window, probabilities_CK in zip(self._windows(record, renderer, max_length), given, strict=True):
            for words, own_K in zip(window.readings.values(), probabilities_CK, strict=True):
                best = int(own_K.argmax())
                for word in words:
                    tags[word], probabilities[word] = self.outputs[best], float(own_K[best])
        return Tags(tuple(tags), tuple(probabilities))

    def prompts(
        self, record: TaggedText, renderer: Renderer, shots: Sequence[TaggedText] = (), row: int = 0
    ) -> list[Prompt]:
        return []

    def mark(self, record: TaggedText, prediction: Tags, reference: str = "") -> Marks:
        """Entities that are right, predicted and true, of all types and of each."""
        true = entities(tags_of(record.words, record.spans))
        found = entities(prediction.tags)
        return Marks(
            reply=_listed(record.text, spans_of(record.words, prediction.tags)),
            reference=_listed(record.text, record.spans),
            is_right=found == true,
            ratios=dict(ratios(found, true)),
            parts=ratios_by_type(found, true),
        )

    def present(self, record: TaggedText, prediction: Tags) -> dict[str, Any]:
        """The entities as spans of characters, each with the least probable of its tags, and the tag of each word."""
        spans = []
        for span in spans_of(record.words, prediction.tags):
            inside = [
                p
                for (start, end), p in zip(record.words, prediction.probabilities, strict=True)
                if span.start <= start and end <= span.end
            ]
            text = record.text[span.start : span.end]
            probability = round(min(inside), 6)
            spans.append(
                {"start": span.start, "end": span.end, "label": span.label, "text": text, "probability": probability}
            )
        return {
            "text": record.text,
            "spans": spans,
            "tokens": [record.text[start:end] for start, end in record.words],
            "tags": list(prediction.tags),
        }

    def signatures(self, records: Sequence[TaggedText]) -> dict[str, str]:
        return {}

    def _unknown(self, span: Span) -> RowError:
        return RowError(
            "tags",
            f"{span.label!r} does not occur in the training rows",
            f"one of {', '.join(self.labels[:10])}",
            "add training rows with this type, correct it, or name it under task.labels",
            kind="label",
        )

    def _windows(self, record: TaggedText, renderer: Renderer, max_length: int) -> list[_Window]:
        """The text's tokens in windows of at most `max_length`, each with the words that are read in it."""
        ids, bounds = renderer.encode_with_bounds(record.text)
        readings = _last_tokens(record.words, bounds)
        if not readings:
            raise RowError("text", f"{preview(record.text)} has no tokens of its own", "some words", kind="empty")
        bos = [] if renderer.bos_id is None or ids[:1] == [renderer.bos_id] else [renderer.bos_id]
        is_encoder = renderer.sep_id is not None
        copies = 2 if self.config.reads == "twice" or (self.config.reads == "auto" and not is_encoder) else 1
        between = renderer.encode(SEPARATOR) if copies == 2 else []
        around = 2 if is_encoder else len(bos)
        room = (renderer.longest(max_length) - around - len(between)) // copies
        windows = []
        for start, end in _cuts(sorted(readings), len(ids), max(room, 1)):
            inside = {at: words for at, words in readings.items() if start <= at < end}
            behind: list[int] = []
            if renderer.sep_id is not None:
                bos = [renderer.bos_id] if renderer.bos_id not in (None, ids[start]) else []
                behind = [renderer.sep_id] if ids[end - 1] != renderer.sep_id else []
            head = [*bos, *ids[start:end], *between] if copies == 2 else bos
            if inside:
                moved = {len(head) + at - start: words for at, words in sorted(inside.items())}
                windows.append(_Window([*head, *ids[start:end], *behind], moved))
        return windows


def _last_tokens(words: Sequence[tuple[int, int]], bounds: Sequence[tuple[int, int]]) -> dict[int, list[int]]:
    """Token -> the words that it ends. A word whose characters no token covers is left out."""
    found: dict[int, list[int]] = {}
    token = 0
    for k, (start, end) in enumerate(words):
        while token < len(bounds) and bounds[token][1] <= start:
            token += 1
        last = None
        at = token
        while at < len(bounds) and bounds[at][0] < end:
            if bounds[at][1] > start and bounds[at][1] > bounds[at][0]:
                last = at
            at += 1
        if last is not None:
            found.setdefault(last, []).append(k)
    return found


def _cuts(ends: Sequence[int], num_tokens: int, room: int) -> list[tuple[int, int]]:
    """Bounds of windows of at most `room` tokens that end where words do; a longer word is cut."""
    if num_tokens <= room:
        return [(0, num_tokens)]
    cuts, start = [], 0
    while start < num_tokens:
        if num_tokens - start <= room:
            end = num_tokens
        else:
            fitting = [at + 1 for at in ends if start < at + 1 <= start + room]
            end = fitting[-1] if fitting else start + room
        cuts.append((start, end))
        start = end
    return cuts


def _example(window: _Window, tags: Sequence[int], row: int) -> Example:
    """`tags` are those of the record's words."""
    tokens = np.asarray(window.ids, dtype=np.int32)
    targets = np.full(tokens.shape, NO_CLASS, dtype=np.int32)
    for at, words in window.readings.items():
        targets[at] = next((tags[word] for word in words if tags[word]), 0)
    return Example(tokens, np.zeros(tokens.shape, dtype=np.float32), row=row, tags=targets)


def _listed(text: str, spans: Sequence[Span]) -> str:
    """Entities as a person reads them, one a line."""
    return "\n".join(f"{text[span.start : span.end]} [{span.label}]" for span in spans)
