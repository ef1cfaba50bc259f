"""Art: the description is the question of an exchange, the drawing is its answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from luthier.data.rows import RowError
from luthier.data.template import Renderer
from luthier.tasks.art.guard import DrawingError
from luthier.tasks.art.raster import ink_of, iou
from luthier.tasks.art.schema import ArtConfig, Drawing
from luthier.tasks.defaults import WithoutClasses, Writes
from luthier.tasks.exchange import answer_in, prompt, sequence
from luthier.tasks.fit import fit
from luthier.tasks.shapes import require_text
from luthier.tasks.task import Marks, Truncation
from luthier.types import Example, Objective, Prompt

PROMPTS = ("prompt", "instruction", "description")
"""Columns that may say what is to be drawn; the first that a row has counts, and the last follows the task's words."""


@dataclass(frozen=True)
class ArtTask(WithoutClasses, Writes):
    """`task: art`. See `luthier.tasks.task.Task` for the verbs."""

    config: ArtConfig = field(default_factory=ArtConfig)
    name: str = "art"
    objective: Objective = "language_modelling"
    generates: bool = True
    needs: tuple[str, ...] = ("defusedxml", "resvg_py")

    def parse(self, row: Mapping[str, Any]) -> Drawing:
        svg = require_text(row.get("svg"), "svg").strip()
        if "<svg" not in svg:
            raise RowError("svg", "holds no <svg> element", "a drawing as SVG")
        return Drawing(self._prompt_of(row), svg)

    def parse_query(self, row: Mapping[str, Any]) -> Drawing:
        return Drawing(self._prompt_of(row), "")

    def from_json(self, value: Mapping[str, Any]) -> Drawing:
        return Drawing.from_json(value)

    def examples(
        self, record: Drawing, renderer: Renderer, max_length: int, truncation: Truncation = "end", row: int = 0
    ) -> list[Example]:
        """One example; the drawing and its end carry loss. One that is cut at its end never teaches to stop there."""
        return fit([sequence(record.prompt, record.svg, renderer)], renderer, max_length, truncation, row)

    def prompts(self, record: Drawing, renderer: Renderer, shots: Sequence[Drawing] = (), row: int = 0) -> list[Prompt]:
        """The description as it was trained on; `shots` stand in front, drawn."""
        shown = [(shot.prompt, shot.svg) for shot in shots]
        return [prompt(record.prompt, record.svg, renderer, shots=shown, row=row)]

    def mark(self, record: Drawing, prediction: str, reference: str = "") -> Marks:
        """Whether it is a drawing that is safe to render, and how much of its ink is the reference's."""
        wanted, found = self._ink(record.svg), self._ink(prediction)
        is_wanted, is_found = (not isinstance(ink, DrawingError) for ink in (wanted, found))
        overlap = 0.0 if isinstance(wanted, DrawingError) or isinstance(found, DrawingError) else iou(found, wanted)
        return Marks(
            reply=prediction,
            reference=record.svg,
            ratios={"valid": (float(is_found), 1.0), "iou": (overlap, 1.0)},
            reference_ratios={"valid": (float(is_wanted), 1.0)},
        )

    def present(self, record: Drawing, prediction: str) -> dict[str, Any]:
        found = self._ink(prediction)
        problem = {"problem": str(found)} if isinstance(found, DrawingError) else {}
        return {"svg": answer_in(prediction), "valid": not problem, **problem}

    def signatures(self, records: Sequence[Drawing]) -> dict[str, str]:
        return {"iou": f"of inked pixels, {self.config.resolution} by {self.config.resolution}"}

    def _ink(self, svg: str) -> Any:
        return ink_of(answer_in(svg), self.config.resolution)

    def _prompt_of(self, row: Mapping[str, Any]) -> str:
        name = next((name for name in PROMPTS if row.get(name) is not None), None)
        if name is None:
            raise RowError(
                "prompt",
                "is missing",
                f"what is to be drawn, in a column {', '.join(PROMPTS[:-1])} or {PROMPTS[-1]}",
                "add the column, or map another onto it with `data.fields`",
            )
        text = require_text(row[name], name)
        is_told = name == "description" and self.config.instruction.strip()
        return f"{self.config.instruction}\n\n{text}" if is_told else text
