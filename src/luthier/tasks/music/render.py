"""Music: what asks for a tune is the question of an exchange, the tune or its music is the answer.

Write a tune in ABC notation.        the row's own prompt, where it has one

X:1                                  with `given: header`
T:The Kesh
M:6/8
K:G
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from luthier.data.template import Renderer
from luthier.tasks.defaults import WithoutClasses, Writes
from luthier.tasks.exchange import answer_in, prompt, sequence
from luthier.tasks.fit import fit
from luthier.tasks.music.metrics import fitting_bars, notes_in_key
from luthier.tasks.music.notation import NotationError, Tune, read_or_fault
from luthier.tasks.music.parse import parse_tune
from luthier.tasks.music.schema import AbcTune, MusicConfig
from luthier.tasks.task import Marks, Truncation
from luthier.types import Example, Objective, Prompt

_WORDS = {"T": "Title", "R": "Rhythm", "M": "Metre", "K": "Key"}
Ratios = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class MusicTask(WithoutClasses, Writes):
    """`task: music`. See `luthier.tasks.task.Task` for the verbs."""

    config: MusicConfig = field(default_factory=MusicConfig)
    name: str = "music"
    objective: Objective = "language_modelling"
    generates: bool = True
    needs: tuple[str, ...] = ("mido",)

    def parse(self, row: Mapping[str, Any]) -> AbcTune:
        return parse_tune(row, is_query=False, needs_header=self._gives_header)

    def parse_query(self, row: Mapping[str, Any]) -> AbcTune:
        return parse_tune(row, is_query=True, needs_header=self._gives_header)

    def from_json(self, value: Mapping[str, Any]) -> AbcTune:
        return AbcTune.from_json(value)

    def examples(
        self, record: AbcTune, renderer: Renderer, max_length: int, truncation: Truncation = "end", row: int = 0
    ) -> list[Example]:
        """One example; the tune and its end carry loss. A tune that is cut at its end never teaches to stop there."""
        pair = sequence(self._question(record), self.reference(record), renderer)
        return fit([pair], renderer, max_length, truncation, row)

    def prompts(self, record: AbcTune, renderer: Renderer, shots: Sequence[AbcTune] = (), row: int = 0) -> list[Prompt]:
        """The question as it was trained on; `shots` stand in front, answered."""
        shown = [(self._question(shot), self.reference(shot)) for shot in shots]
        return [prompt(self._question(record), self.reference(record), renderer, shots=shown, row=row)]

    def mark(self, record: AbcTune, prediction: str, reference: str = "") -> Marks:
        """Whether it is a tune, its bars that fit and its notes in key; a tune that cannot be read has none of them.

        What cannot be read weighs as many bars and notes as the reference has.
        """
        wanted = _ratios(read_or_fault(self.whole_tune(record, self.reference(record))), {})
        return Marks(
            reply=prediction,
            reference=self.reference(record),
            ratios=_ratios(read_or_fault(self.whole_tune(record, prediction)), wanted),
            reference_ratios=wanted,
        )

    def present(self, record: AbcTune, prediction: str) -> dict[str, Any]:
        abc = self.whole_tune(record, prediction)
        tune = read_or_fault(abc)
        if isinstance(tune, NotationError):
            return {"abc": abc, "valid": False, "problem": str(tune)}
        num_fitting, num_bars = _ratios(tune, {})["bars_fit"]
        return {"abc": abc, "valid": True, "bars": int(num_bars), "fitting_bars": int(num_fitting)}

    def whole_tune(self, record: AbcTune, answer: str) -> str:
        """The tune that an answer to a record makes, header and music."""
        answer = answer_in(answer)
        return f"{record.header}\n{answer}" if self._gives_header else answer

    @property
    def _gives_header(self) -> bool:
        return self.config.given == "header"

    def _question(self, record: AbcTune) -> str:
        words = record.prompt or self.config.instruction
        if self._gives_header:
            return f"{words}\n\n{record.header}".strip()
        if record.prompt:
            return words
        fields = [line.partition(":") for line in record.header.split("\n")]
        told = [f"{_WORDS[name]}: {value.strip()}" for name, _, value in fields if name in _WORDS]
        return "\n".join([words, *told]).strip()

    def reference(self, record: AbcTune) -> str:
        """What the model is to write."""
        if self._gives_header or not record.body:
            return record.body
        return f"{record.header}\n{record.body}"


def _ratios(tune: Tune | NotationError, wanted: Ratios) -> Ratios:
    """Metric -> (above, below). Where there is nothing to judge, nothing is right of what the reference has."""
    is_valid = isinstance(tune, Tune)
    ratios: Ratios = {"valid": (float(is_valid), 1.0)}
    bars = [fits for fits in fitting_bars(tune.bars) if fits is not None] if isinstance(tune, Tune) else []
    in_key = notes_in_key(tune) if isinstance(tune, Tune) else (0, 0)
    for name, (above, below) in (("bars_fit", (sum(bars), len(bars))), ("key_agreement", in_key)):
        lost = wanted.get(name, (0.0, 0.0 if is_valid else 1.0))[1]
        ratios[name] = (float(above), float(below)) if below else (0.0, lost)
    return ratios
