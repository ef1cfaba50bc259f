"""Art: the record (a description and a drawing as SVG) and the task's options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from luthier.strict import Strict


class ArtConfig(Strict):
    """Learn to draw as SVG."""

    type: Literal["art"] = "art"
    instruction: str = "Draw this as SVG:"
    """What the model is told before a row's `description`; a row's `prompt` or `instruction` stands alone."""
    resolution: int = Field(default=64, ge=16, le=512)
    """Pixels a side of the rasters that are compared."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """What asks for a drawing, and the drawing that is right; empty in a row to predict for."""

    prompt: str
    svg: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"prompt": self.prompt, "svg": self.svg}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Drawing:
        """The drawing that `to_json` wrote."""
        return cls(value["prompt"], value["svg"])
