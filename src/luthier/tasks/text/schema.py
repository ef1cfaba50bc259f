"""Text: the record (a document) and the task's options."""

from __future__ import annotations

from typing import Literal

from luthier.strict import Strict


class TextConfig(Strict):
    """Learn to continue documents: domain adaptation."""

    type: Literal["text"] = "text"
