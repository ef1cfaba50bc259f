"""Constrained replies obey their grammar, whatever the model would rather say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.base.load import Base, load_base
from luthier.data.template import Renderer
from luthier.engine.sample import Request, Sampler, SamplingError, SamplingParams
from luthier.worker.grammar import Grammars

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 3, "maximum": 99}, "s": {"enum": ["a", "é"]}},
    "required": ["n", "s"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def base(tiny_llama: Path) -> Base:
    return load_base(tiny_llama)


@pytest.fixture(scope="module")
def renderer(tiny_llama: Path) -> Renderer:
    return Renderer.load(tiny_llama)


def sample(base: Base, renderer: Renderer, wanted: list[dict[str, Any] | None]) -> list[str]:
    grammars = Grammars(renderer, base.vocabulary_size)
    tokens = np.array(renderer.encode("red lamp"), dtype=np.int32)
    requests = []
    for seed, grammar in enumerate(wanted):
        params = SamplingParams(120, temperature=1.0, seed=seed, stop_ids=tuple(renderer.stop_ids))
        constraint = None if grammar is None else grammars.constraint(grammar)
        requests.append(Request(str(seed), tokens, params=params, constraint=constraint))
    return [reply.text for reply in Sampler(base, renderer.decode).run(requests)]


def test_replies_parse_and_neighbours_stay_free(base: Base, renderer: Renderer) -> None:
    texts = sample(base, renderer, [{"json_schema": SCHEMA}, None] * 4)
    for text in texts[::2]:
        value = json.loads(text)
        assert 3 <= value["n"] <= 99
        assert value["s"] in ("a", "é")
    assert texts[1::2] == sample(base, renderer, [None] * 8)[1::2], "a constraint changes its own row alone"


def test_a_tool_call(base: Base, renderer: Renderer) -> None:
    (text,) = sample(base, renderer, [{"tools": [{"name": "set_lamp", "parameters": SCHEMA}]}])
    inside = text.removeprefix("<tool_call>").removesuffix("</tool_call>")
    assert len(text) - len(inside) == len("<tool_call></tool_call>")
    assert json.loads(inside)["name"] == "set_lamp"


def test_a_schema_that_cannot_be_followed_is_refused(base: Base, renderer: Renderer) -> None:
    with pytest.raises(SamplingError, match="banana"):
        Grammars(renderer, base.vocabulary_size).constraint({"json_schema": {"type": "banana"}})
