"""Padded steps of sampling as graphs capture them: the same replies as full recomputation gives.

On the CPU the padded steps run as they are; on a GPU, captured (tests/gpu/test_reply_graphs.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import write_tiny_phi3

from engine.test_sample import adapt, decode, greedy, greedy_by_hand, prompt
from luthier.base.load import Base, load_base
from luthier.engine import reply_graphs
from luthier.engine.pack import BASE_SLOT
from luthier.engine.reply_graphs import ReplyGraph, ReplyGraphs, bucket_of
from luthier.engine.request import Request, SamplingParams
from luthier.engine.sample import Sampler
from luthier.types import AdapterSpec


@pytest.fixture(scope="module", params=["llama", "windowed phi3"])
def base(request: pytest.FixtureRequest, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tiny_llama
    if request.param != "llama":
        folder = write_tiny_phi3(tmp_path_factory.mktemp("models") / "tiny-phi3-windowed", rope_scaling=None)
    base = load_base(folder, dtype="float64", wants_fast_body=True)
    assert base.fast_body is not None, base.fast_body_problem
    return base


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every padded step that was run."""
    seen: list[int] = []
    original = ReplyGraph.run

    def noted(graph: ReplyGraph, tokens: list[int], *others: object) -> torch.Tensor:
        seen.append(len(tokens))
        return original(graph, tokens, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(ReplyGraph, "run", noted)
    return seen


def sampler_on(base: Base, **fields: object) -> Sampler:
    sampler = Sampler(base, decode, **fields)  # type: ignore[arg-type]
    sampler._graphs = ReplyGraphs(base, sampler._rows.cache, captures=False)
    return sampler


def test_replies_equal_full_recomputation_in_any_company(base: Base, steps: list[int]) -> None:
    slots = [adapt(base, 1), adapt(base, 2, rank=17, targets=("o_proj", "down_proj")), None]
    lengths = [3, 60, 31, 40, 12, 1, 2]  # the cache grows past 64 positions under way
    requests = [
        Request(
            str(index), prompt(length, index), slot.index if (slot := slots[index % 3]) else BASE_SLOT,
            SamplingParams(max_new_tokens=8 + 3 * index),
        )
        for index, length in enumerate(lengths)
    ]  # fmt: skip
    replies = sampler_on(base, max_rows=5).run(requests)
    for request, reply in zip(requests, replies, strict=True):
        assert reply.tokens == greedy_by_hand(base, request.tokens, request.params.max_new_tokens, request.slot)
    assert len(steps) >= 10
    assert {1, 5} <= set(steps)


def test_a_slot_that_has_trained_is_read_anew(base: Base, steps: list[int]) -> None:
    slot = adapt(base, 5)
    sampler = sampler_on(base, remembers=True)
    first = sampler.run([greedy("a", prompt(6), 12, slot.index)])[0]
    with torch.no_grad():
        for factors in slot.adapters.values():
            factors.b_OR.neg_()
    second = sampler.run([greedy("b", prompt(6, 1), 12, slot.index)])[0]
    assert first.tokens != second.tokens
    assert second.tokens == greedy_by_hand(base, prompt(6, 1), 12, slot.index)
    assert steps


@pytest.mark.parametrize("kind", ["a trained output layer", "a method that the blocks do not compute"])
def test_other_slots_run_as_before(base: Base, steps: list[int], kind: str) -> None:
    if kind == "a trained output layer":
        slot = base.bank.add(AdapterSpec(rank=4, modules_to_save=("lm_head",)), 3)
        with torch.no_grad():
            slot.saved_modules["lm_head"].weight.mul_(-1.0)  # type: ignore[operator, union-attr]
    else:
        slot = base.bank.add(AdapterSpec(method="dora", rank=4), 3)
    [reply] = sampler_on(base).run([greedy("a", prompt(6), 10, slot.index)])
    assert reply.tokens == greedy_by_hand(base, prompt(6), 10, slot.index)
    assert not steps


def test_one_bucket_serves_rows_slots_and_ranks_like_it(base: Base) -> None:
    assert base.fast_body is not None
    slots = [base.fast_body._factors_of(base.bank.add(AdapterSpec(rank=rank), rank)) for rank in (3, 16, 17)]
    assert bucket_of(5, slots[:1]) == bucket_of(8, slots[1:2]) != bucket_of(9, slots[:1])
    assert bucket_of(17, slots[:2]) == bucket_of(32, slots[:2]) != bucket_of(33, slots[:2])
    assert bucket_of(5, slots[:1]) != bucket_of(5, slots[2:])  # another padded rank
    assert bucket_of(5, []).num_slots == 0


def test_those_least_recently_used_go_first(base: Base, monkeypatch: pytest.MonkeyPatch, steps: list[int]) -> None:
    monkeypatch.setattr(reply_graphs, "MAX_GRAPHS", 1)
    sampler = sampler_on(base)
    requests = [greedy(str(i), prompt(5, i), 6 + 5 * i) for i in range(3)]
    replies = sampler.run(requests)
    assert [len(reply.tokens) for reply in replies] == [6, 11, 16]
    assert replies[2].tokens == greedy_by_hand(base, prompt(5, 2), 16)
    assert set(steps) == {3, 2, 1}
