"""Music: the record (a tune in ABC notation) and the task's options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from luthier.strict import Strict


class MusicConfig(Strict):
    """Learn to write tunes in ABC notation."""

    type: Literal["music"] = "music"
    instruction: str = "Write a tune in ABC notation."
    """What the model is told where a row has no `prompt` of its own."""
    given: Literal["header", "nothing"] = "header"
    """What of the tune stands in the prompt: its header (title, metre, key and so on), which the model goes on from, or
    nothing, so that it writes the whole tune."""


@dataclass(frozen=True, slots=True)
class AbcTune:
    """A tune, and what asks for it.

    Attributes:
        prompt: The row's own words; empty where it has none.
        header: The lines up to the K: field, and it.
        body: The music; empty in a row to predict for.
    """

    prompt: str
    header: str
    body: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"prompt": self.prompt, "header": self.header, "body": self.body}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> AbcTune:
        """The tune that `to_json` wrote."""
        return cls(value["prompt"], value["header"], value["body"])
