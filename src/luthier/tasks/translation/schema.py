"""Translation: the record and the task's options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from luthier.strict import Strict


class TranslationConfig(Strict):
    """Learn to translate."""

    type: Literal["translation"] = "translation"
    source_lang: str | None = None
    """Language of rows without a `source_lang`: a code such as en or deu, or a name."""
    target_lang: str | None = None
    """Language of rows without a `target_lang`."""
    instruction: str = "Translate from {source_lang} to {target_lang}:"
    """What the model is told before the source; the languages' English names are put in."""


@dataclass(frozen=True, slots=True)
class Translation:
    """A text and its translations, each of them right; the first is learnt. Languages as the rows name them."""

    source: str
    targets: tuple[str, ...]
    source_lang: str | None = None
    target_lang: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "source": self.source,
            "targets": list(self.targets),
            "source_lang": self.source_lang,
            "target_lang": self.target_lang,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Translation:
        """The translation that `to_json` wrote."""
        return cls(value["source"], tuple(value["targets"]), value["source_lang"], value["target_lang"])
