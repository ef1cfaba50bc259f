"""task: text."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
from tiny_templates import write_family

from luthier.data.rows import RowError
from luthier.data.template import Renderer
from luthier.tasks.registry import task_for
from luthier.tasks.text.metrics import perplexity
from luthier.tasks.text.schema import TextConfig

TASK = task_for(TextConfig())
LONG = "The capital of France is Paris, and the river there is the Seine. " * 5


@pytest.mark.parametrize("max_length", [2, 8, 17, 4096])
def test_windows_without_bos_supervise_every_token_once(max_length: int, tmp_path: Path) -> None:
    renderer = Renderer.load(write_family(tmp_path, "chatml"))
    whole = [*renderer.encode(LONG), renderer.eos_id]
    examples = TASK.examples(TASK.parse({"text": LONG}), renderer, max_length, row=4)
    assert all(2 <= e.num_tokens <= max_length and e.weights[0] == 0 and e.weights[1:].all() for e in examples)
    assert [t for e in examples for t in e.tokens[1:].tolist()] == whole[1:]
    assert examples[0].tokens[0] == whole[0]
    for before, after in pairwise(examples):
        assert after.tokens[0] == before.tokens[-1]
    assert {e.row for e in examples} == {4}


@pytest.mark.parametrize("max_length", [2, 8, 17, 4096])
def test_windows_with_bos_begin_with_it(max_length: int, tmp_path: Path) -> None:
    renderer = Renderer.load(write_family(tmp_path, "llama3"))
    examples = TASK.examples(TASK.parse({"text": LONG}), renderer, max_length)
    assert all(e.tokens[0] == renderer.bos_id and 2 <= e.num_tokens <= max_length for e in examples)
    assert all(e.weights[0] == 0 and e.weights[1:].all() for e in examples)
    assert [t for e in examples for t in e.tokens[1:].tolist()] == [*renderer.encode(LONG), renderer.eos_id]


def test_window_edges(tmp_path: Path) -> None:
    """A document that just fills its windows leaves none behind that has nothing to learn."""
    renderer = Renderer.load(write_family(tmp_path, "chatml"))
    num_tokens = len(renderer.encode(LONG)) + 1
    for max_length in range(2, num_tokens + 2):
        examples = TASK.examples(TASK.parse({"text": LONG}), renderer, max_length)
        assert sum(e.num_tokens - 1 for e in examples) == num_tokens - 1
        assert min(e.num_tokens for e in examples) >= 2


def test_other_truncations(tmp_path: Path) -> None:
    renderer = Renderer.load(write_family(tmp_path, "chatml"))
    record = TASK.parse({"text": LONG})
    assert len(TASK.examples(record, renderer, 16, "start")) == len(TASK.examples(record, renderer, 16, "end")) > 1
    assert TASK.examples(record, renderer, 16, "drop") == []
    with pytest.raises(RowError) as caught:
        TASK.examples(record, renderer, 16, "error")
    assert caught.value.kind == "truncated"
    assert TASK.prompts(record, renderer) == []


def test_wrong_rows_and_json() -> None:
    for row, kind in (({"text": "  "}, "empty"), ({"text": 3}, "schema"), ({}, "schema")):
        with pytest.raises(RowError) as caught:
            TASK.parse(row)
        assert (caught.value.field, caught.value.kind) == ("text", kind)
    record = TASK.parse({"text": LONG})
    assert TASK.from_json(record.to_json()) == record


def test_perplexity() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(math.log(5.0)) == pytest.approx(5.0)
    assert perplexity(1e4) == math.inf
