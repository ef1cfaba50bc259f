"""Translation: instruction and source are the question of an exchange, the translation is its answer.

Translate from English to German:

source
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from luthier.data.rows import RowError, preview
from luthier.data.template import Renderer
from luthier.tasks.defaults import WithoutClasses, Writes
from luthier.tasks.exchange import answer_in, prompt, sequence
from luthier.tasks.fit import too_long
from luthier.tasks.shapes import require_text, unpack_json
from luthier.tasks.task import Marks, Truncation
from luthier.tasks.translation.languages import bleu_tokenizer, language_name
from luthier.tasks.translation.metrics import sentence_statistics, signatures
from luthier.tasks.translation.schema import Translation, TranslationConfig
from luthier.types import Example, Objective, Prompt


@dataclass(frozen=True)
class TranslationTask(WithoutClasses, Writes):
    """`task: translation`. See `luthier.tasks.task.Task` for the verbs."""

    config: TranslationConfig = field(default_factory=TranslationConfig)
    name: str = "translation"
    objective: Objective = "language_modelling"
    generates: bool = True
    needs: tuple[str, ...] = ("sacrebleu",)

    def parse(self, row: Mapping[str, Any]) -> Translation:
        return self._parse(row, _parse_targets(row.get("target")))

    def parse_query(self, row: Mapping[str, Any]) -> Translation:
        return self._parse(row, ())

    def from_json(self, value: Mapping[str, Any]) -> Translation:
        return Translation.from_json(value)

    def examples(
        self, record: Translation, renderer: Renderer, max_length: int, truncation: Truncation = "end", row: int = 0
    ) -> list[Example]:
        """One example; the first translation and its end carry loss.

        Half a translation of a whole source, or the other way, would teach what is wrong: a pair that is too long is
        left out with `truncation: drop`, and refused otherwise.
        """
        tokens, weights = sequence(self._question(record), record.targets[0], renderer)
        if len(tokens) > max_length:
            if truncation == "drop":
                return []
            raise too_long(len(tokens), max_length)
        return [Example(tokens, weights, row=row)]

    def prompts(
        self, record: Translation, renderer: Renderer, shots: Sequence[Translation] = (), row: int = 0
    ) -> list[Prompt]:
        """The source as it was trained on; `shots` stand in front, translated."""
        shown = [(self._question(shot), shot.targets[0]) for shot in shots]
        reference = record.targets[0] if record.targets else ""
        return [prompt(self._question(record), reference, renderer, shots=shown, row=row)]

    def mark(self, record: Translation, prediction: str, reference: str = "") -> Marks:
        """sacrebleu's sums of the sentence; its own kind is its pair of languages."""
        languages = [language_name(code) for code in (record.source_lang, record.target_lang) if code]
        return Marks(
            reply=prediction,
            reference=" | ".join(record.targets),
            statistics=sentence_statistics(answer_in(prediction), record.targets, bleu_tokenizer(record.target_lang)),
            group=" to ".join(languages) or None,
        )

    def present(self, record: Translation, prediction: str) -> dict[str, Any]:
        return {"translation": answer_in(prediction)}

    def signatures(self, records: Sequence[Translation]) -> dict[str, str]:
        """sacrebleu's signatures, for the commonest target language and the most references of a row."""
        if not records:
            return {}
        tokenizers = Counter(bleu_tokenizer(record.target_lang) for record in records)
        return signatures(tokenizers.most_common(1)[0][0], max(len(record.targets) for record in records))

    def _parse(self, row: Mapping[str, Any], targets: tuple[str, ...]) -> Translation:
        source = require_text(row.get("source"), "source")
        languages = [
            default if row.get(name) is None else require_text(row[name], name).strip()
            for name, default in (("source_lang", self.config.source_lang), ("target_lang", self.config.target_lang))
        ]
        for name, language in zip(("source_lang", "target_lang"), languages, strict=True):
            if language is None and f"{{{name}}}" in self.config.instruction:
                raise RowError(
                    name,
                    "is missing",
                    "a language, as in de, deu or German",
                    f"add the column, or set task.{name} for all rows",
                )
        return Translation(source, targets, *languages)

    def _question(self, record: Translation) -> str:
        instruction = self.config.instruction
        for name, code in (("source_lang", record.source_lang), ("target_lang", record.target_lang)):
            instruction = instruction.replace(f"{{{name}}}", language_name(code or ""))
        return f"{instruction}\n\n{record.source}" if instruction.strip() else record.source


def _parse_targets(value: Any) -> tuple[str, ...]:
    value = unpack_json(value)
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list | tuple) or not value:
        raise RowError("target", f"is {preview(value)}", "a text, or a list of texts that are all right")
    is_one = len(value) == 1
    return tuple(require_text(text, "target" if is_one else f"target[{i}]") for i, text in enumerate(value))
