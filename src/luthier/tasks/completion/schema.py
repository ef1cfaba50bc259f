"""Completion: the record (a prompt and its continuation) and the task's options."""

from __future__ import annotations

from typing import Literal

from luthier.strict import Strict


class CompletionConfig(Strict):
    """Learn to continue a prompt, without any chat template."""

    type: Literal["completion"] = "completion"
    train_on_prompt: bool = False
    """Let the prompt carry loss too."""
