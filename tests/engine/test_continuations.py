"""Continuations scored in one pass over a prompt, held against transformers and peft, which run each by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from slots import peft_model, stirred

from luthier.base import fast_body
from luthier.base.load import Base, load_base
from luthier.checkpoints.peft_format import write_adapter
from luthier.engine import continuations
from luthier.engine.continuations import Asked, score_continuations
from luthier.engine.live_rows import LiveRows
from luthier.engine.pack import BASE_SLOT
from luthier.errors import DataError
from luthier.types import AdapterSpec

LABELS = ((20, 3), (20, 21, 3), (20, 21, 22, 23, 3), (20, 21, 22, 24, 3), (30, 31, 3), (40,), (3,))
"""With one that begins another, some that begin alike, and two of a single token."""

WAYS = {
    "cached": {"dtype": "float64"},
    "repeated": {"dtype": "float64"},
    "shared": {"dtype": "float64", "wants_fast_body": True},
}


def asked_of(*lengths: int) -> list[Asked]:
    random = np.random.default_rng(0)
    return [Asked(random.integers(4, 300, size=length).astype(np.int32), LABELS) for length in lengths]


@torch.inference_mode()
def one_by_one(model: Any, asked: list[Asked]) -> list[list[float]]:
    """The definition: a forward a label."""
    scores = []
    for one in asked:
        scores.append([])
        for label in one.continuations:
            ids = torch.tensor([[*one.tokens.tolist(), *label]])
            logprobs = model(input_ids=ids).logits[0].log_softmax(dim=-1)
            first = len(one.tokens) - 1
            scores[-1].append(sum(float(logprobs[first + at, token]) for at, token in enumerate(label)))
    return scores


def check(found: list[Any], wanted: list[list[float]], tolerance: float = 1e-6) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.tolist() == pytest.approx(theirs, abs=tolerance)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    if request.param == "repeated":  # as on a GPU: prompts up to so many tokens run again with each branch
        monkeypatch.setattr(continuations, "REPEATED_TOKENS", {"cpu": 25})
    return WAYS[request.param]


def test_the_base_scores_as_transformers(folder: Path, way: dict[str, Any], wide_norms: None) -> None:
    """Prompts shorter and longer than the sliding window (24), and on both sides of LongRoPE's short class (32)."""
    from transformers import AutoModelForCausalLM

    base, asked = load_base(folder, **way), asked_of(1, 6, 23, 29, 31, 40)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float64").eval()
    check(score_continuations(base, asked, BASE_SLOT), one_by_one(model, asked))


def test_a_slot_scores_as_peft(folder: Path, way: dict[str, Any], tmp_path: Path, wide_norms: None) -> None:
    base, asked = load_base(folder, **way), asked_of(9, 17)
    slot = stirred(base, AdapterSpec(rank=4, alpha=8.0))
    other = stirred(base, AdapterSpec(rank=2), seed=5)
    write_adapter(slot, base, tmp_path, base_name=str(folder))
    model, _ = peft_model(folder, tmp_path)
    wanted = one_by_one(model, asked)
    check(score_continuations(base, asked, slot.index), wanted)
    assert score_continuations(base, asked, other.index)[0].tolist() != pytest.approx(wanted[0], abs=1e-3)


def test_a_trained_output_layer_is_heard(tiny_llama: Path, tmp_path: Path, way: dict[str, Any]) -> None:
    base, asked = load_base(tiny_llama, **way), asked_of(9)
    slot = stirred(base, AdapterSpec(rank=4, modules_to_save=("lm_head",)))
    write_adapter(slot, base, tmp_path, base_name=str(tiny_llama))
    model, _ = peft_model(tiny_llama, tmp_path)
    check(score_continuations(base, asked, slot.index), one_by_one(model, asked), 1e-5)


def test_a_padded_base_scores_the_same(folder: Path, base: Base) -> None:
    asked = asked_of(5, 30, 12)
    packed = score_continuations(base, asked, BASE_SLOT)
    base.is_packed = False
    check(score_continuations(base, asked, BASE_SLOT), [scores.tolist() for scores in packed], 1e-5)


def test_how_it_is_cut_into_forwards_does_not_matter(folder: Path, way: dict[str, Any]) -> None:
    base, asked = load_base(folder, **way), asked_of(5, 30, 12, 7)
    whole, done = score_continuations(base, asked, BASE_SLOT), list[int]()
    for max_tokens in (1, 40):
        found = score_continuations(base, asked, BASE_SLOT, done.append, max_tokens)
        check(found, [scores.tolist() for scores in whole], 1e-9)
    assert done[-1] == 4


def test_labels_past_the_rows_of_a_forward(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, asked = load_base(tiny_llama, dtype="float64"), asked_of(9)
    whole = score_continuations(base, asked, BASE_SLOT)
    monkeypatch.setattr(continuations, "MAX_ROWS", 2)
    check(score_continuations(base, asked, BASE_SLOT), [scores.tolist() for scores in whole], 1e-9)


def test_a_text_costs_its_prompt_and_its_labels(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """77 labels after a prompt of 40 tokens: the sum of both, not 77 times the prompt."""
    random = np.random.default_rng(1)
    labels = tuple((*random.integers(4, 300, size=3).tolist(), 3) for _ in range(77))
    asked = [Asked(random.integers(4, 300, size=40).astype(np.int32), labels)]
    most = 40 + sum(map(len, labels))
    rows: list[int] = []

    def count_live(*given: Any, **named: Any) -> LiveRows | None:
        live = found(*given, **named)
        rows.append(live.num_rows if live is not None else given[0].num_tokens)
        return live

    found = fast_body.find_live_rows
    base = load_base(tiny_llama)
    monkeypatch.setattr(fast_body, "find_live_rows", count_live)
    shared = score_continuations(base, asked, BASE_SLOT)
    assert 40 < sum(rows) <= most
    base, rows[:] = load_base(tiny_llama, dtype="float64"), []
    forward = base.forward
    monkeypatch.setattr(
        base, "forward", lambda batch, **named: (rows.append(batch.num_tokens), forward(batch, **named))[1]
    )
    cached = score_continuations(base, asked, BASE_SLOT)
    assert 40 < sum(rows) <= most
    check(shared, [scores.tolist() for scores in cached], 1e-3)


def test_what_is_too_long_or_empty_is_refused(tiny_llama: Path) -> None:
    base = load_base(tiny_llama)
    assert base.max_positions is not None
    with pytest.raises(DataError, match=f"at most {base.max_positions}"):
        score_continuations(base, asked_of(base.max_positions - 4), BASE_SLOT)
    for one in (Asked(np.zeros(0, np.int32), LABELS), Asked(np.zeros(3, np.int32), ((),))):
        with pytest.raises(ValueError, match="no tokens"):
            score_continuations(base, [one], BASE_SLOT)
    assert score_continuations(base, [], BASE_SLOT) == []
