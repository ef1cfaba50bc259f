"""Question answering: instruction, text and question are the question of an exchange, the answer is its answer.

    instruction

    text

    Question: ...

The question stands last, next to where the answer begins. A text that is too long is cut, never the question or answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from luthier.data.rows import RowError, preview
from luthier.data.template import Renderer
from luthier.errors import nearest
from luthier.tasks.defaults import WithoutClasses, Writes
from luthier.tasks.exchange import answer_in, prompt, sequence
from luthier.tasks.fit import too_long
from luthier.tasks.qa.metrics import exact_match, f1, normalize
from luthier.tasks.qa.schema import QaConfig, Question
from luthier.tasks.shapes import require_text, unpack_json
from luthier.tasks.task import Marks, Truncation
from luthier.types import NO_CLASS, Example, Objective, Prompt


@dataclass(frozen=True)
class QaTask(WithoutClasses, Writes):
    """`task: qa`. See `luthier.tasks.task.Task` for the verbs."""

    config: QaConfig = field(default_factory=QaConfig)
    name: str = "qa"
    objective: Objective = "language_modelling"
    generates: bool = True

    def parse(self, row: Mapping[str, Any]) -> Question:
        return self._parse(row, _parse_answers(row.get("answers")))

    def parse_query(self, row: Mapping[str, Any]) -> Question:
        return self._parse(row, ())

    def from_json(self, value: Mapping[str, Any]) -> Question:
        return Question.from_json(value)

    def examples(
        self, record: Question, renderer: Renderer, max_length: int, truncation: Truncation = "end", row: int = 0
    ) -> list[Example]:
        """One example; the answer and its end carry loss. Of several answers the first is learnt.

        A text that is too long loses its end, or with `truncation: start` its beginning. Where all the answers that
        stood in it are lost, the row is refused: it would teach to make answers up.
        """
        answer = self._answer(record)
        tokens, weights = sequence(self._question(record, record.context), answer, renderer)
        if len(tokens) > max_length:
            if truncation == "error":
                raise too_long(len(tokens), max_length)
            if truncation == "drop":
                return []
            context = self._cut(record, answer, renderer, max_length, truncation)
            tokens, weights = sequence(self._question(record, context), answer, renderer)
        return [Example(np.asarray(tokens, dtype=np.int32), weights, row=row)]

    def prompts(
        self, record: Question, renderer: Renderer, shots: Sequence[Question] = (), row: int = 0
    ) -> list[Prompt]:
        """The question as it was trained on; `shots` stand in front, answered."""
        shown = [(self._question(shot, shot.context), self._answer(shot)) for shot in shots]
        question = self._question(record, record.context)
        choices = self.config.choices or ()
        return [prompt(question, self._answer(record), renderer, shots=shown, choices=choices, row=row)]

    def mark(self, record: Question, prediction: str, reference: str = "") -> Marks:
        """SQuAD's exact match and F1; with `choices` also a class, for accuracy and macro-F1."""
        answer = self._said(prediction)
        is_exact = exact_match(answer, record.answers)
        choices = [normalize(choice) for choice in self.config.choices or ()]
        right = normalize(record.answers[0]) if record.answers else ""
        guess = normalize(answer_in(prediction))
        return Marks(
            reply=prediction,
            reference=" | ".join(record.answers) or self.config.no_answer,
            is_right=is_exact,
            is_exact=is_exact,
            class_index=choices.index(right) if right in choices else NO_CLASS,
            # A reply that is none of the choices, which the base may give without being held to them, is a class too.
            predicted_class=choices.index(guess) if guess in choices else len(choices),
            ratios={"f1": (f1(answer, record.answers), 1.0)},
            group="answered in the text" if record.answers else "not answered in the text",
        )

    def present(self, record: Question, prediction: str) -> dict[str, Any]:
        answer = self._said(prediction)
        return {"answer": answer or None}

    def _parse(self, row: Mapping[str, Any], answers: tuple[str, ...]) -> Question:
        choices = self.config.choices
        unknown = [answer for answer in answers if choices is not None and answer not in choices]
        if unknown and choices is not None:
            raise RowError(
                "answers",
                f"{unknown[0]!r} is not one of the choices{nearest(unknown[0], choices)}",
                f"one of {', '.join(choices)}",
                "correct the answer, or add it under task.choices",
                kind="label",
            )
        if choices is not None and "answers" in row and row["answers"] is not None and not answers:
            raise RowError("answers", "is empty", f"one of {', '.join(choices)}", kind="label")
        context = require_text(row.get("context"), "context")
        return Question(context, require_text(row.get("question"), "question"), answers)

    def _question(self, record: Question, context: str) -> str:
        parts = [self.config.instruction, context, f"Question: {record.question}"]
        return "\n\n".join(part for part in parts if part.strip())

    def _answer(self, record: Question) -> str:
        """What the model is to write."""
        return record.answers[0] if record.answers else self.config.no_answer

    def _said(self, prediction: str) -> str:
        """The answer of a reply: empty where it says that there is none."""
        answer = answer_in(prediction)
        return "" if normalize(answer) == normalize(self.config.no_answer) else answer

    def _cut(self, record: Question, answer: str, renderer: Renderer, max_length: int, truncation: Truncation) -> str:
        """The longest part of the text with which the exchange fits."""
        context = record.context

        def part(size: int) -> str:
            return context[-size:] if truncation == "start" else context[:size]

        low, high = 0, len(context)
        while high - low > 1:
            middle = (low + high) // 2
            tokens, _ = sequence(self._question(record, part(middle)), answer, renderer)
            low, high = (middle, high) if len(tokens) <= max_length else (low, middle)
        kept = part(low) if low else ""
        tokens, _ = sequence(self._question(record, kept), answer, renderer)
        is_lost = [a for a in record.answers if a in context and a not in kept]
        if len(tokens) > max_length or (is_lost and len(is_lost) == sum(a in context for a in record.answers)):
            raise RowError(
                "context",
                f"is cut to {len(kept):,} of {len(context):,} characters, and the answer with it"
                if len(tokens) <= max_length
                else f"has no room beside question and answer of {len(tokens):,} tokens",
                "a text whose answer stands within train.max_length",
                "raise train.max_length, or shorten the text around its answer",
                kind="truncated",
            )
        return kept


def _parse_answers(value: Any) -> tuple[str, ...]:
    """A text, a list of texts, or SQuAD's {"text": [...], "answer_start": [...]}; none for an unanswerable question."""
    value = unpack_json(value)
    if isinstance(value, Mapping):
        value = value.get("text")
    if isinstance(value, str):
        value = [value] if value.strip() else []
    if not isinstance(value, list | tuple):
        raise RowError(
            "answers",
            f"is {preview(value)}",
            "a text, or a list of texts; an empty list for a question that the text does not answer",
        )
    return tuple(dict.fromkeys(require_text(answer, f"answers[{i}]").strip() for i, answer in enumerate(value)))
