"""Completion: a prompt and its continuation become one sequence.

    [BOS, where the tokenizer adds one] prompt completion EOS

The prompt is tokenized alone, as it is when the model is served, so its tokens are exactly the beginning of the
training sequence. A space between the two is best put at the completion's beginning: most tokenizers have tokens for
" word", so a prompt that ends in a space leaves the model before an unusual token, in training and in serving alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from luthier.data.template import Renderer
from luthier.tasks.completion.schema import Completion, CompletionConfig
from luthier.tasks.defaults import WithoutClasses, Writes
from luthier.tasks.fit import fit
from luthier.tasks.shapes import require_text
from luthier.tasks.task import Truncation
from luthier.types import Example, Objective, Prompt


@dataclass(frozen=True)
class CompletionTask(WithoutClasses, Writes):
    """`task: completion`. See `luthier.tasks.task.Task` for the verbs."""

    config: CompletionConfig = field(default_factory=CompletionConfig)
    name: str = "completion"
    objective: Objective = "language_modelling"
    generates: bool = True

    def parse(self, row: Mapping[str, Any]) -> Completion:
        return Completion(
            require_text(row.get("prompt"), "prompt"),
            require_text(row.get("completion"), "completion"),
        )

    def parse_query(self, row: Mapping[str, Any]) -> Completion:
        return Completion(require_text(row.get("prompt"), "prompt"), "")

    def from_json(self, value: Mapping[str, Any]) -> Completion:
        return Completion.from_json(value)

    def examples(
        self, record: Completion, renderer: Renderer, max_length: int, truncation: Truncation = "end", row: int = 0
    ) -> list[Example]:
        """One example; the completion and its EOS carry loss, and the prompt too if `train_on_prompt`."""
        prompt_ids = renderer.encode(record.prompt)
        reply_ids = renderer.continuation(record.prompt, prompt_ids, record.completion)
        eos_id = renderer.require_eos_id()
        if reply_ids[-1:] != [eos_id]:
            reply_ids = [*reply_ids, eos_id]
        context = renderer.with_bos(prompt_ids)
        tokens = np.asarray(context + reply_ids, dtype=np.int32)
        weights = np.ones(tokens.shape, dtype=np.float32)
        if not self.config.train_on_prompt:
            weights[: len(context)] = 0.0
        weights[:1] = 0.0
        return fit([(tokens, weights)], renderer, max_length, truncation, row)

    def prompts(
        self, record: Completion, renderer: Renderer, shots: Sequence[Completion] = (), row: int = 0
    ) -> list[Prompt]:
        """The prompt; `shots` stand in front as whole texts, a blank line after each."""
        text = "".join(f"{shot.prompt}{shot.completion}\n\n" for shot in shots) + record.prompt
        ids = renderer.with_bos(renderer.encode(text))
        return [Prompt(np.asarray(ids, dtype=np.int32), record.completion, text, row)]

    def present(self, record: Completion, prediction: str) -> dict[str, Any]:
        return {"completion": prediction}
