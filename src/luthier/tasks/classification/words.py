"""Classification by the language model's own words: an exchange whose answer is the label's words.

    instruction

    text

The answer ends as any answer does, and its end belongs to the label: so the labels exclude each other, even where one
begins with another ("card", "card lost").

A prediction is the label with the largest

    log p(words | text) - prior,    prior = log p(words | "N/A") with `calibration: prior`, else 0

and the probabilities are those scores' softmax. The correction takes off what a label is worth whatever the text says:
contextual calibration (Zhao et al. 2021, arXiv:2102.09690), as a difference of log-likelihoods the domain-conditional
PMI of Holtzman et al. 2021 (arXiv:2104.08315).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from luthier.data.rows import RowError
from luthier.data.template import Renderer
from luthier.errors import DataError
from luthier.tasks.classification.render import ClassificationTask
from luthier.tasks.classification.schema import LabelledText
from luthier.tasks.classification.text import unknown_label
from luthier.tasks.exchange import as_written, prompt, sequence
from luthier.tasks.fit import too_long
from luthier.tasks.task import Task, Truncation
from luthier.types import Example, Objective, Prompt

NOTHING = "N/A"
"""The text without content, one of those that Zhao et al. use."""


@dataclass(frozen=True)
class WordsTask(ClassificationTask):
    """`task: {type: classification, head: words}`. See `luthier.tasks.task.Task` for the verbs."""

    objective: Objective = "language_modelling"
    chooses: bool = True

    @property
    def outputs(self) -> tuple[str, ...]:
        return ()

    def with_labels(self, labels: Sequence[str]) -> Task:
        """The same task with its classes settled, in this order.

        Raises:
            DataError: for fewer than two classes, one named twice, words of no label, or two labels of equal words.
        """
        task = replace(self, labels=tuple(super().with_labels(labels).labels))
        stray = sorted(set(self.config.words) - set(labels))
        if stray:
            raise DataError(
                f"task.words names {stray[0]!r}, which is none of the {len(labels)} labels",
                "words for labels that there are",
                "correct the label, or take it out of task.words",
            )
        words = [task.words_of(label) for label in labels]
        if not all(word.strip() for word in words) or len(set(words)) != len(words):
            raise DataError(
                "task.words gives a label no words, or two labels the same",
                "other words for each label",
                "correct task.words",
            )
        return task

    def words_of(self, label: str) -> str:
        """What the model writes for a label."""
        return self.config.words.get(label, label)

    def examples(
        self, record: LabelledText, renderer: Renderer, max_length: int, truncation: Truncation = "end", row: int = 0
    ) -> list[Example]:
        """One example; the label's words and their end carry loss. A text that is too long loses its end, or with
        `truncation: start` its beginning; never the label."""
        if record.label not in self.labels:
            raise unknown_label(record.label, self.labels, in_training=False)
        answer = self.words_of(record.label)

        def of(text: str) -> Example:
            tokens, weights = sequence(self._question(text), answer, renderer)
            return Example(np.asarray(tokens, dtype=np.int32), weights, row=row)

        example = of(record.text)
        if example.num_tokens <= max_length:
            return [example]
        if truncation == "error":
            raise too_long(example.num_tokens, max_length)
        if truncation == "drop":
            return []
        low, high = 0, len(record.text)  # the most characters with which it fits
        while high - low > 1:
            middle = (low + high) // 2
            fits = of(_part(record.text, middle, truncation)).num_tokens <= max_length
            low, high = (middle, high) if fits else (low, middle)
        if low == 0:
            raise RowError(
                "text",
                f"has no room beside the instruction and the label {record.label!r}",
                "room for some of the text within train.max_length",
                "raise train.max_length, or shorten task.instruction",
                kind="truncated",
            )
        return [of(_part(record.text, low, truncation))]

    def prompts(
        self, record: LabelledText, renderer: Renderer, shots: Sequence[LabelledText] = (), row: int = 0
    ) -> list[Prompt]:
        """The text as it was trained on; `shots` stand in front, answered. `answers` has what is chosen from."""
        shown = [(self._question(shot.text), self.words_of(shot.label)) for shot in shots]
        return [prompt(self._question(record.text), self.words_of(record.label), renderer, shots=shown, row=row)]

    def answers(
        self, record: LabelledText, renderer: Renderer, shots: Sequence[LabelledText] = ()
    ) -> tuple[NDArray[np.int32], tuple[tuple[int, ...], ...]]:
        """The prompt's tokens, and for each label what the model learns to write there, its end included."""
        shown = [(self._question(shot.text), self.words_of(shot.label)) for shot in shots]
        question, words = self._question(record.text), [self.words_of(label) for label in self.labels]
        tokens = prompt(question, "", renderer, shots=shown).tokens
        return tokens, as_written(question, words, renderer, shots=shown)

    def queries(self, record: LabelledText, renderer: Renderer, max_length: int, row: int = 0) -> list[Example]:
        return []

    def blank(self) -> LabelledText:
        """The record whose labels' likelihoods are the prior."""
        return LabelledText(NOTHING, "")

    def signatures(self, records: Sequence[LabelledText]) -> dict[str, str]:
        less = f", less that after the text {NOTHING!r}" if self.config.calibration == "prior" else ""
        return {"label chosen": f"by the log-likelihood of its words and their end{less} (task.calibration)"}

    def _question(self, text: str) -> str:
        listed = ", ".join(map(self.words_of, self.labels))
        instruction = self.config.instruction.replace("{labels}", listed)
        return f"{instruction}\n\n{text}" if instruction.strip() else text


def _part(text: str, size: int, truncation: Truncation) -> str:
    return text[-size:] if truncation == "start" else text[:size]
