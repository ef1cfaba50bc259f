"""Text: a document becomes one sequence, or several windows of `max_length` tokens, that carry loss throughout.

The document is [BOS, where the tokenizer adds one] text EOS. A longer one is split into windows rather than cut:
- with BOS, every window is BOS and the next `max_length - 1` tokens;
- without, every window begins with the last token of the one before, which carries no loss there.
Either way every token is supervised exactly once, but for the very first of the sequence, which nothing stands before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from luthier.data.template import Renderer
from luthier.tasks.defaults import WithoutClasses
from luthier.tasks.fit import too_long
from luthier.tasks.shapes import require_text
from luthier.tasks.task import Marks, Probabilities, Truncation
from luthier.tasks.text.schema import Document, TextConfig
from luthier.types import Example, Objective, Prompt


@dataclass(frozen=True)
class TextTask(WithoutClasses):
    """`task: text`. See `luthier.tasks.task.Task` for the verbs."""

    config: TextConfig = field(default_factory=TextConfig)
    name: str = "text"
    objective: Objective = "language_modelling"
    generates: bool = False
    needs: tuple[str, ...] = ()

    def parse(self, row: Mapping[str, Any]) -> Document:
        return Document(require_text(row.get("text"), "text"))

    def parse_query(self, row: Mapping[str, Any]) -> Document:
        return self.parse(row)

    def from_json(self, value: Mapping[str, Any]) -> Document:
        return Document.from_json(value)

    def examples(
        self, record: Document, renderer: Renderer, max_length: int, truncation: Truncation = "end", row: int = 0
    ) -> list[Example]:
        """The document's windows. `truncation` "end" and "start" both keep all of it; "error" and "drop" hold."""
        ids = renderer.encode(record.text)
        bos = [] if renderer.bos_id is None else [renderer.bos_id]
        body = ids[1:] if bos and ids[:1] == bos else ids
        if body[-1:] != [renderer.require_eos_id()]:
            body = [*body, renderer.require_eos_id()]
        num_tokens = len(bos) + len(body)
        if num_tokens > max_length and truncation == "error":
            raise too_long(num_tokens, max_length)
        if num_tokens > max_length and truncation == "drop":
            return []
        return [_window(tokens, row) for tokens in split_windows(body, bos, max_length)]

    def prompts(
        self, record: Document, renderer: Renderer, shots: Sequence[Document] = (), row: int = 0
    ) -> list[Prompt]:
        return []

    def queries(self, record: Document, renderer: Renderer, max_length: int, row: int = 0) -> list[Example]:
        """The document's windows: what is predicted of a document is its perplexity."""
        return self.examples(record, renderer, max_length, "end", row)

    def read(self, record: Document, renderer: Renderer, max_length: int, given: Sequence[Probabilities]) -> Any:
        raise TypeError("a document has no head to read")

    def mark(self, record: Document, prediction: Any, reference: str = "") -> Marks:
        raise TypeError("a document is judged by its loss alone")

    def present(self, record: Document, prediction: Mapping[str, float]) -> dict[str, Any]:
        """`prediction` holds the document's loss, perplexity and number of tokens."""
        return dict(prediction)

    def signatures(self, records: Sequence[Document]) -> dict[str, str]:
        return {}


def split_windows(body: Sequence[int], bos: Sequence[int], max_length: int) -> list[list[int]]:
    """Token ids of each window; see the top of this file.

    Args:
        body: The document's tokens without BOS.
        bos: [BOS], or empty where the tokenizer adds none.
        max_length: Most tokens in a window, at least 2.
    """
    step = max_length - 1
    if bos:
        return [[*bos, *body[start : start + step]] for start in range(0, len(body), step)]
    # The last token of a window is the first of the next; a window of that token alone would have nothing to learn.
    return [list(body[start : start + max_length]) for start in range(0, max(len(body) - 1, 1), step)]


def _window(tokens: Sequence[int], row: int) -> Example:
    weights = np.ones(len(tokens), dtype=np.float32)
    weights[0] = 0.0
    return Example(np.asarray(tokens, dtype=np.int32), weights, row=row)
