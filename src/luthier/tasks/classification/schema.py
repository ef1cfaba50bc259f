"""Classification: the record (a text and its label) and the task's options."""

from __future__ import annotations

from typing import Literal

from luthier.strict import Strict


class ClassificationConfig(Strict):
    """Learn to name the class of a text with a linear head on the hidden state of the text's last token."""

    type: Literal["classification"] = "classification"
    labels: list[str] | None = None
    """The classes in order; null takes those found in the training rows, sorted."""
