"""Constrained replies: JSON by a schema, any JSON object, or a tool call, through llguidance.

The library walks a grammar beside the reply and says, before each token, which tokens may come next. It works on bytes,
so a token may span what the grammar separates.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from luthier.data.template import Renderer
from luthier.engine.request import SamplingError

_WHITESPACE = {"whitespace_flexible": False}


class Grammars:
    """Makes constraints for one tokenizer.

    Args:
        renderer: Whose tokens.
        vocabulary_size: Rows of the output layer.
    """

    def __init__(self, renderer: Renderer, vocabulary_size: int) -> None:
        self._vocabulary_size = vocabulary_size
        self._tokenizer = LLTokenizer(
            renderer.tokenizer_json(),
            n_vocab=max(vocabulary_size, renderer.vocabulary_size),
            eos_token=list(renderer.stop_ids),
        )

    def constraint(self, wanted: dict[str, Any]) -> GrammarConstraint:
        """A constraint with a state of its own.

        Raises:
            SamplingError: for a schema that the library cannot follow.
        """
        grammar = _grammar(wanted)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            reason = matcher.get_error().strip().splitlines()[0]
            raise SamplingError(f"the schema cannot be followed: {reason}", "a JSON schema without what it names")
        return GrammarConstraint(matcher, self._tokenizer)


class GrammarConstraint:
    """One reply's way through a grammar: `luthier.engine.request.Constraint`."""

    def __init__(self, matcher: LLMatcher, tokenizer: LLTokenizer) -> None:
        self._matcher = matcher
        self._eos = list(tokenizer.eos_tokens)
        self._size = tokenizer.vocab_size

    def allowed_V(self) -> Tensor:
        if self._matcher.is_stopped():
            allowed_V = torch.zeros(self._size, dtype=torch.bool)
            allowed_V[self._eos] = True
            return allowed_V
        # A bit a token, the lowest bit first. (llguidance.torch would do the same, and costs a process that never
        # constrains a reply most of a second: importing it loads torch's compiler.)
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        return torch.from_numpy(np.unpackbits(bits, count=self._size, bitorder="little").astype(bool))

    def take(self, token: int) -> None:
        self._matcher.consume_token(token)


def _grammar(wanted: dict[str, Any]) -> str:
    if "json_schema" in wanted:
        return str(LLMatcher.grammar_from_json_schema(wanted["json_schema"], defaults=_WHITESPACE))  # type: ignore[arg-type]
    if wanted.get("json_object"):
        return str(LLMatcher.grammar_from_json_schema({"type": "object"}, defaults=_WHITESPACE))  # type: ignore[arg-type]
    calls = [_call_schema(function) for function in wanted["tools"]]
    schema = json.dumps({"anyOf": calls, "x-guidance": _WHITESPACE})
    return str(LLMatcher.grammar_from_lark(f'start: "<tool_call>" call "</tool_call>"\ncall: %json {schema}\n'))


def _call_schema(function: dict[str, Any]) -> dict[str, Any]:
    arguments = function.get("parameters") or {"type": "object"}
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }
