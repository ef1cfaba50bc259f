"""Classification: the records (a text and its label, or its labels) and the task's options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from luthier.strict import Strict
from luthier.types import DEFAULT_THRESHOLD


class ClassificationConfig(Strict):
    """Learn to name the class of a text, or any number of labels."""

    type: Literal["classification"] = "classification"
    labels: list[str] | None = None
    """The classes in order; null takes those found in the training rows, sorted."""
    multiple: bool = False
    """Whether a text has any number of labels, none included, each decided by itself; its label is then a list."""
    threshold: float = Field(default=DEFAULT_THRESHOLD, gt=0, lt=1)
    """With `multiple`: the probability from which on a label is given."""

    head: Literal["linear", "words"] = "linear"
    """`linear`: a new layer on the hidden state of the text's last token, or on an encoder its own head on the first.
    `words`: the language model itself, which
    learns to write the label and is asked how likely it finds each."""
    instruction: str = "Which label fits the text?"
    """With `head: words`: stands before the text; `{labels}` in it stands for all labels."""
    words: dict[str, str] = Field(default_factory=dict)
    """With `head: words`: a label -> the words that stand for it, where they differ, as in {card_lost: a lost card}."""
    calibration: Literal["none", "prior"] = "none"
    """With `head: words`: `prior` takes off each label's likelihood after a text that says nothing, which helps an
    untuned base."""

    @model_validator(mode="after")
    def _holds(self) -> Self:
        least, words = (1, "one or more") if self.multiple else (2, "two or more")
        if self.labels is not None and (len(self.labels) < least or len(set(self.labels)) != len(self.labels)):
            raise ValueError(f"labels: {words} different labels are needed")
        if not self.multiple and self.threshold != DEFAULT_THRESHOLD:
            raise ValueError(
                "threshold goes with multiple: true; of classes that exclude each other the likeliest is taken"
            )
        if self.head == "words" and self.multiple:
            raise ValueError("head: words names one label of a text; multiple goes with head: linear")
        plain = type(self).model_construct()
        for name in ("instruction", "words", "calibration"):
            if self.head == "linear" and getattr(self, name) != getattr(plain, name):
                raise ValueError(f"{name} goes with head: words")
        return self


@dataclass(frozen=True, slots=True)
class LabelledText:
    """A text and the name of its class."""

    text: str
    label: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"text": self.text, "label": self.label}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LabelledText:
        """The labelled text that `to_json` wrote."""
        return cls(value["text"], value["label"])


@dataclass(frozen=True, slots=True)
class TextWithLabels:
    """A text and the names of all its labels, sorted."""

    text: str
    labels: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"text": self.text, "label": list(self.labels)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TextWithLabels:
        """The text with labels that `to_json` wrote."""
        return cls(value["text"], tuple(value["label"]))
