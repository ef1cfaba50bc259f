"""Sampling on the resident base: equal to transformers, to full recomputation, and to itself in any company."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import ORIGINAL_MAX_POSITIONS, SLIDING_WINDOW, VOCAB_SIZE, build_tokenizer
from torch import Tensor

from luthier.base.load import Base, load_base
from luthier.engine.pack import BASE_SLOT, PackItem, pack
from luthier.engine.sample import Completion, Request, Sampler, SamplingError, SamplingParams
from luthier.engine.slot import Slot
from luthier.errors import LuthierError
from luthier.types import AdapterSpec, Example

TOKENIZER = build_tokenizer()


def decode(tokens: Sequence[int]) -> str:
    return TOKENIZER.decode(list(tokens))


def prompt(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB_SIZE, size=length).astype(np.int32)


def adapt(base: Base, seed: int, **fields: object) -> Slot:
    """A slot whose update is not zero."""
    slot = base.bank.add(AdapterSpec(**({"rank": 4, "alpha": 8.0} | fields)), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for factors in slot.adapters.values():
            factors.b_OR.copy_(torch.empty(factors.b_OR.shape).normal_(0.0, 0.15, generator=generator))
    return slot


@torch.inference_mode()
def full_logits(base: Base, tokens: Sequence[int], slot: int = BASE_SLOT) -> Tensor:
    """Logits [L, V] of one sequence alone, computed in one go without a cache."""
    array = np.array(tokens, dtype=np.int32)
    batch = pack([PackItem(Example(array, np.ones(len(array), np.float32)), slot)])
    keep = torch.arange(len(array))
    whole = [type(batch.segments[0])(slot, 0, len(array))]
    routing = base.routing(batch, training=False)
    object.__setattr__(routing, "head_segments", tuple(whole))
    with base.bank.routed(routing):
        result = base.forward(batch, keep=keep)
    return result.logits_PV if result.logits_PV is not None else base.logits(result.hidden_TD, tuple(whole))


def greedy_by_hand(base: Base, tokens: np.ndarray, num_new: int, slot: int = BASE_SLOT) -> tuple[int, ...]:
    sequence = tokens.tolist()
    for _ in range(num_new):
        sequence.append(int(full_logits(base, sequence, slot)[-1].argmax()))
    return tuple(sequence[len(tokens) :])


def greedy(name: str, tokens: np.ndarray, num_new: int, slot: int = BASE_SLOT) -> Request:
    return Request(name, tokens, slot, SamplingParams(max_new_tokens=num_new))


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> Base:
    return load_base(tiny_llama, dtype="float64")


@pytest.fixture(scope="module")
def phi3(tiny_phi3: Path) -> Base:
    return load_base(tiny_phi3, dtype="float64")


@pytest.fixture(params=["llama", "phi3"])
def base(request: pytest.FixtureRequest) -> Base:
    return request.getfixturevalue(request.param)


# -- equal to others


# Phi-3: below, across and beyond the window (24) and LongRoPE's limit (32).
@pytest.mark.parametrize("length", [1, 5, SLIDING_WINDOW + 2, ORIGINAL_MAX_POSITIONS, 40])
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_phi3", "tiny_qwen3"])
def test_greedy_equals_transformers(model: str, length: int, request: pytest.FixtureRequest) -> None:
    from transformers import AutoModelForCausalLM

    folder = request.getfixturevalue(model)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    tokens = prompt(length, seed=length)
    expected = theirs.generate(
        torch.from_numpy(tokens.astype(np.int64))[None],
        attention_mask=torch.ones(1, length, dtype=torch.int64),
        max_new_tokens=30,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0, length:]
    [reply] = Sampler(load_base(folder, dtype="float64"), decode).run([greedy("a", tokens, 30)])
    assert reply.tokens == tuple(expected.tolist())
    assert reply.finish_reason == "length"
    assert reply.num_prompt_tokens == length


def test_slots_in_one_batch_equal_full_recomputation(base: Base) -> None:
    slots = [adapt(base, 1), adapt(base, 2, rank=7, targets=("o_proj", "down_proj")), None]
    lengths = [3, 20, 31, 40, 12, 1]
    requests = [
        greedy(str(index), prompt(length, index), 14, slot.index if (slot := slots[index % 3]) else BASE_SLOT)
        for index, length in enumerate(lengths)
    ]
    replies = Sampler(base, decode).run(requests)
    for request, reply in zip(requests, replies, strict=True):
        assert reply.name == request.name
        assert reply.tokens == greedy_by_hand(base, request.tokens, 14, request.slot)
    # The adapters matter: without them the replies are others.
    assert replies[0].tokens != greedy_by_hand(base, requests[0].tokens, 14)


def test_logprobs_equal_a_full_forward(base: Base) -> None:
    slot = adapt(base, 3)
    request = Request("a", prompt(29), slot.index, SamplingParams(max_new_tokens=9, temperature=0.7, num_logprobs=4))
    plain = greedy("b", prompt(6, 1), 9)
    reply, other = Sampler(base, decode).run([request, plain])
    assert other.logprobs is None
    assert reply.logprobs is not None
    assert [entry.token for entry in reply.logprobs] == list(reply.tokens)
    # LongRoPE's class changes as the sequence grows, so each position is held against its own prefix.
    for index, entry in enumerate(reply.logprobs):
        sequence = [*request.tokens.tolist(), *reply.tokens[:index]]
        expected_V = full_logits(base, sequence, slot.index)[-1].log_softmax(-1)
        assert entry.logprob == pytest.approx(float(expected_V[entry.token]), abs=1e-9)
        top = expected_V.topk(4)
        assert [token for token, _ in entry.top] == top.indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(top.values.tolist(), abs=1e-9)


def test_a_head_that_scales_its_logits(tmp_path: Path) -> None:
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        logits_scaling=8.0,
        initializer_range=0.1,
        max_position_embeddings=128,
    )
    base = Base(GraniteForCausalLM(config).double().eval())
    assert base.is_packed
    assert not base.head_is_plain
    slot = adapt(base, 1, targets=("q_proj", "lm_head"))
    requests = [
        Request("a", prompt(8), slot.index, SamplingParams(max_new_tokens=6, num_logprobs=1)),
        Request("b", prompt(11, 1), BASE_SLOT, SamplingParams(max_new_tokens=6, num_logprobs=1)),
    ]
    for request, reply in zip(requests, Sampler(base, decode).run(requests), strict=True):
        expected_LV = full_logits(base, [*request.tokens.tolist(), *reply.tokens], request.slot).log_softmax(-1)
        assert reply.logprobs is not None
        for index, entry in enumerate(reply.logprobs):
            assert entry.logprob == pytest.approx(float(expected_LV[len(request.tokens) - 1 + index].max()), abs=1e-9)


def test_a_base_that_runs_padded() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    config = BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=64, n_layer=2, n_head=4, initializer_range=0.1)
    model = BloomForCausalLM(config).double().eval()
    base = Base(model)
    assert not base.is_packed
    slot = adapt(base, 1)
    requests = [greedy("a", prompt(9), 8), greedy("b", prompt(4, 1), 8, slot.index), greedy("c", prompt(17, 2), 8)]
    for sampler in (Sampler(base, decode), Sampler(base, decode, max_prefill_tokens=20)):
        for request, reply in zip(requests, sampler.run(requests), strict=True):
            assert reply.tokens == greedy_by_hand(base, request.tokens, 8, request.slot)


def test_a_slot_with_new_tokens_beside_the_base(llama: Base) -> None:
    new = VOCAB_SIZE + 3
    slot = adapt(llama, 5, new_tokens=(7, new))
    assert slot.token_rows is not None
    with torch.no_grad():
        slot.token_rows.output_KD[1].mul_(0).add_(full_hidden_direction(llama, slot))
    mine = Request("a", np.array([1, new, 7], np.int32), slot.index, SamplingParams(max_new_tokens=4, num_logprobs=0))
    other = greedy("b", prompt(5), 4)
    reply, beside = Sampler(llama, decode).run([mine, other])
    assert new in reply.tokens
    assert reply.tokens == greedy_by_hand(llama, mine.tokens, 4, slot.index)
    assert beside.tokens == greedy_by_hand(llama, other.tokens, 4)


def full_hidden_direction(base: Base, slot: Slot) -> Tensor:
    """A row of the output layer that wins wherever the hidden state resembles the prompt's last."""
    batch = pack([PackItem(Example(np.array([1, VOCAB_SIZE + 3, 7], np.int32), np.zeros(3, np.float32)), slot.index)])
    with torch.no_grad(), base.bank.routed(base.routing(batch, training=False)):
        return base.forward(batch).hidden_TD[-1]


# -- company


@pytest.mark.parametrize("max_rows", [1, 3, 64])
def test_company_does_not_change_a_reply(base: Base, max_rows: int) -> None:
    slots = [BASE_SLOT, adapt(base, 1).index, adapt(base, 2).index]
    kinds = [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.7}, {"temperature": 3.0, "top_p": 0.99}]
    requests = [
        Request(
            str(index),
            prompt(3 + 5 * index, index),
            slots[index % 3],
            SamplingParams(max_new_tokens=4 + index, seed=index, **kinds[index % 4]),
        )
        for index in range(8)
    ]
    alone = [Sampler(base, decode).run([request])[0] for request in requests]
    assert Sampler(base, decode, max_rows=max_rows).run(requests) == alone
    assert Sampler(base, decode, max_rows=max_rows).run(requests[::-1]) == alone[::-1]


def test_the_seed_decides_the_reply(llama: Base) -> None:
    def reply(seed: int) -> tuple[int, ...]:
        params = SamplingParams(max_new_tokens=12, temperature=1.0, seed=seed)
        return Sampler(llama, decode).run([Request("a", prompt(4), BASE_SLOT, params)])[0].tokens

    assert reply(1) == reply(1)
    assert len({reply(seed) for seed in range(5)}) == 5


@pytest.mark.parametrize("budget", [1, 7, 33])
def test_prompts_in_parts(base: Base, budget: int) -> None:
    requests = [greedy(str(index), prompt(length, index), 5) for index, length in enumerate([50, 3, 34, 31])]
    whole = Sampler(base, decode).run(requests)
    assert Sampler(base, decode, max_prefill_tokens=budget).run(requests) == whole


# -- shared beginnings


def count_tokens(base: Base, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every forward from now on."""
    counts: list[int] = []
    forward = base.forward
    monkeypatch.setattr(
        base, "forward", lambda batch, **named: counts.append(batch.num_tokens) or forward(batch, **named)
    )
    return counts


@pytest.mark.parametrize("max_rows", [2, 64])
def test_a_shared_beginning_is_computed_once(llama: Base, max_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    slot = adapt(llama, 1)
    shared = prompt(60, seed=9)
    params = SamplingParams(max_new_tokens=1, num_logprobs=0)
    requests = [
        Request(str(index), np.concatenate([shared, prompt(2 + index, index)]), slot.index, params)
        for index in range(6)
    ]
    foreign = Request("foreign", requests[0].tokens, BASE_SLOT, params)
    expected = [
        full_logits(llama, request.tokens, request.slot)[-1].log_softmax(-1).max() for request in [*requests, foreign]
    ]
    counts = count_tokens(llama, monkeypatch)
    replies = Sampler(llama, decode, max_rows=max_rows).run([*requests, foreign])
    for reply, value in zip(replies, expected, strict=True):
        assert reply.logprobs is not None
        assert reply.logprobs[0].logprob == pytest.approx(float(value), abs=1e-9)
    own = sum(2 + index for index in range(6))
    assert sum(counts) <= 60 + own + (60 + 2)  # once for the slot, once for the base


def test_a_shared_beginning_across_longrope_classes(phi3: Base) -> None:
    shared = prompt(32, seed=9)
    lengths = [1, 40, 2, 30, 0]  # the last is the shared part alone, still of the short class
    requests = [greedy(str(index), np.concatenate([shared, prompt(n, index)]), 8) for index, n in enumerate(lengths)]
    for request, reply in zip(requests, Sampler(phi3, decode).run(requests), strict=True):
        assert reply.tokens == greedy_by_hand(phi3, request.tokens, 8)


def test_the_owner_of_a_shared_beginning_leaves(llama: Base) -> None:
    shared = prompt(40, seed=9)
    sampler = Sampler(llama, decode, max_prefill_tokens=16)
    requests = [greedy(str(index), np.concatenate([shared, prompt(3, index)]), 5) for index in range(3)]
    for request in requests:
        sampler.submit(request)
    events = sampler.step()
    sampler.cancel("0")
    done = {}
    while sampler.has_work:
        done |= {event.name: event.completion for event in sampler.step() if event.completion is not None}
    assert events == []
    assert done["0"].finish_reason == "cancelled"
    assert done["1"].tokens == greedy_by_hand(llama, requests[1].tokens, 5)
    assert done["2"].tokens == greedy_by_hand(llama, requests[2].tokens, 5)


def test_a_conversation_goes_on_from_its_keys(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = Sampler(base, decode, remembers=True)
    first = greedy("turn 1", prompt(36), 6)
    [reply] = sampler.run([first])
    second = greedy("turn 2", np.concatenate([first.tokens, np.array(reply.tokens, np.int32), prompt(4, 1)]), 6)
    expected = greedy_by_hand(base, second.tokens, 6)
    counts = count_tokens(base, monkeypatch)
    assert sampler.run([second])[0].tokens == expected
    assert counts[0] == 5  # the reply's last token, which was never fed, and the four new ones


def test_a_conversation_that_grows_into_longrope_starts_anew(phi3: Base) -> None:
    sampler = Sampler(phi3, decode, remembers=True)
    first = greedy("turn 1", prompt(28), 5)  # ends with 32 keys of the short class, enough to be lent
    [reply] = sampler.run([first])
    tokens = np.concatenate([first.tokens, np.array(reply.tokens, np.int32), prompt(4, 1)])
    assert len(first.tokens) < ORIGINAL_MAX_POSITIONS < len(tokens)
    params = SamplingParams(max_new_tokens=1, num_logprobs=0)
    [second] = sampler.run([Request("turn 2", tokens, BASE_SLOT, params)])
    assert second.logprobs is not None
    assert second.logprobs[0].logprob == pytest.approx(
        float(full_logits(phi3, tokens)[-1].log_softmax(-1).max()), abs=1e-9
    )


# -- the end of a reply


def test_stop_ids_end_a_reply_and_are_no_part_of_it(llama: Base) -> None:
    whole = greedy_by_hand(llama, prompt(5), 12)
    stop = whole[7]
    params = SamplingParams(max_new_tokens=12, stop_ids=(VOCAB_SIZE - 1, stop), num_logprobs=0)
    [reply] = Sampler(llama, decode).run([Request("a", prompt(5), BASE_SLOT, params)])
    assert reply.tokens == whole[: whole.index(stop)]
    assert reply.finish_reason == "stop"
    assert reply.text == decode(reply.tokens)
    assert reply.logprobs is not None
    assert len(reply.logprobs) == len(reply.tokens)


def test_a_stop_string_ends_a_reply_before_it(llama: Base) -> None:
    text = decode(greedy_by_hand(llama, prompt(5), 12)).rstrip("\ufffd")
    stop = text[3:5]
    assert len(stop) == 2
    params = SamplingParams(max_new_tokens=12, stop_strings=("never\x00there", stop))
    [reply] = Sampler(llama, decode).run([Request("a", prompt(5), BASE_SLOT, params)])
    assert reply.text == text[: text.index(stop)]
    assert reply.finish_reason == "stop"


def test_streamed_deltas_add_up_to_the_text(llama: Base) -> None:
    sampler = Sampler(llama, decode)
    for seed in range(6):
        params = SamplingParams(max_new_tokens=25, temperature=2.0, seed=seed, stop_strings=("a", "the"))
        sampler.submit(Request(str(seed), prompt(4, seed), BASE_SLOT, params))
    texts: dict[str, str] = {}
    tokens: dict[str, list[int | None]] = {}
    done: dict[str, Completion] = {}
    while sampler.has_work:
        for event in sampler.step():
            assert event.name not in done
            texts[event.name] = texts.get(event.name, "") + event.text_delta
            tokens.setdefault(event.name, []).append(event.token)
            if event.completion is not None:
                assert event.finish_reason == event.completion.finish_reason
                done[event.name] = event.completion
    assert {name: reply.text for name, reply in done.items()} == texts
    assert {name: list(reply.tokens) for name, reply in done.items()} == tokens
    for reply in done.values():
        assert reply.text == decode(reply.tokens).split("a")[0].split("the")[0]


def test_the_positions_of_the_base_end_a_reply(phi3: Base) -> None:
    assert phi3.max_positions == 128
    [reply] = Sampler(phi3, decode).run([greedy("a", prompt(125), 50)])
    assert len(reply.tokens) == 3
    assert reply.finish_reason == "length"
    with pytest.raises(LuthierError, match=r"128 tokens[\s\S]*shorten the prompt"):
        Sampler(phi3, decode).submit(greedy("b", prompt(128), 1))


# -- coming and going


def test_requests_come_in_as_others_leave(llama: Base) -> None:
    sampler = Sampler(llama, decode, max_rows=2)
    requests = [greedy(str(index), prompt(4 + index, index), 2 + index) for index in range(5)]
    for request in requests[:3]:
        sampler.submit(request)
    done: dict[str, Completion] = {}
    steps = 0
    while sampler.has_work:
        events = sampler.step()
        steps += 1
        assert len(events) <= 2
        done |= {event.name: event.completion for event in events if event.completion is not None}
        if steps == 2:
            for request in requests[3:]:
                sampler.submit(request)
    assert {name: reply.tokens for name, reply in done.items()} == {
        request.name: greedy_by_hand(llama, request.tokens, 2 + index) for index, request in enumerate(requests)
    }
    assert steps == 12  # 20 tokens by two rows: 2 + 4 + 6 in one, 3 + 5 in the other
    assert sampler.cache_bytes == 0


def test_one_slots_queue_does_not_hold_up_another(llama: Base) -> None:
    slot = adapt(llama, 1)
    sampler = Sampler(llama, decode, max_rows=2)
    for index in range(10):
        sampler.submit(greedy(f"many {index}", prompt(4, index), 3))
    sampler.submit(greedy("single", prompt(4), 3, slot.index))
    assert {event.name for event in sampler.step()} == {"many 0", "single"}
    sampler.step()
    sampler.step()
    assert {event.name for event in sampler.step()} == {"many 1", "many 2"}


def test_cancel(llama: Base) -> None:
    sampler = Sampler(llama, decode, max_rows=2)
    requests = [greedy(str(index), prompt(6, index), 9) for index in range(4)]
    for request in requests:
        sampler.submit(request)
    sampler.step()
    sampler.step()
    assert sampler.cancel("0")
    assert sampler.cancel("3")
    assert not sampler.cancel("0")
    assert not sampler.cancel("unknown")
    done: dict[str, Completion] = {}
    while sampler.has_work:
        done |= {event.name: event.completion for event in sampler.step() if event.completion is not None}
    assert {name: reply.finish_reason for name, reply in done.items()} == {
        "0": "cancelled",
        "1": "length",
        "2": "length",
        "3": "cancelled",
    }
    assert done["0"].tokens == greedy_by_hand(llama, requests[0].tokens, 2)
    assert done["0"].text == decode(done["0"].tokens)
    assert done["3"].tokens == ()
    assert done["1"].tokens == greedy_by_hand(llama, requests[1].tokens, 9)
    assert done["2"].tokens == greedy_by_hand(llama, requests[2].tokens, 9)


def test_a_slot_that_leaves_the_bank_cancels_its_requests(llama: Base) -> None:
    gone, stays = adapt(llama, 1), adapt(llama, 2)
    sampler = Sampler(llama, decode, max_rows=2)
    sampler.submit(greedy("gone", prompt(6), 9, gone.index))
    sampler.submit(greedy("stays", prompt(6), 9, stays.index))
    sampler.submit(greedy("gone too", prompt(6), 9, gone.index))
    sampler.step()
    llama.bank.remove(gone)
    done: dict[str, Completion] = {}
    while sampler.has_work:
        done |= {event.name: event.completion for event in sampler.step() if event.completion is not None}
    assert done["gone"].finish_reason == done["gone too"].finish_reason == "cancelled"
    assert "left the bank" in done["gone"].problem
    assert done["stays"].tokens == greedy_by_hand(llama, prompt(6), 9, stays.index)


def test_a_diverged_adapter_hurts_nobody_else(llama: Base) -> None:
    broken = adapt(llama, 1)
    with torch.no_grad():
        next(iter(broken.adapters.values())).b_OR.fill_(float("nan"))
    requests = [greedy("broken", prompt(6), 5, broken.index), greedy("fine", prompt(7), 5)]
    bad, fine = Sampler(llama, decode).run(requests)
    assert bad.finish_reason == "cancelled"
    assert "not finite" in bad.problem
    assert fine.tokens == greedy_by_hand(llama, prompt(7), 5)
    # Its keys must not poison whoever gets the row next.
    sampler = Sampler(llama, decode, max_rows=1)
    assert sampler.run(requests)[1].tokens == fine.tokens


def test_run_reports_progress_and_refuses_bad_requests(llama: Base) -> None:
    seen: list[tuple[int, int]] = []
    sampler = Sampler(llama, decode, max_rows=2)
    sampler.run([greedy(str(n), prompt(3, n), 2) for n in range(3)], lambda done, total: seen.append((done, total)))
    assert seen == [(2, 3), (3, 3)]
    with pytest.raises(SamplingError, match=f"token {VOCAB_SIZE}"):
        sampler.run([greedy("a", prompt(3), 2), greedy("b", np.array([VOCAB_SIZE], np.int32), 2)])
    assert not sampler.has_work
    with pytest.raises(SamplingError, match="no tokens"):
        sampler.submit(greedy("a", np.array([], np.int32), 2))
    with pytest.raises(ValueError, match="not in the bank"):
        sampler.submit(greedy("a", prompt(3), 2, slot=10_000))
    sampler.submit(greedy("a", prompt(3), 2))
    with pytest.raises(ValueError, match="here already"):
        sampler.submit(greedy("a", prompt(3), 2))


@pytest.mark.parametrize(
    "fields",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"stop_strings": ("",)},
        {"num_logprobs": -1},
    ],
)
def test_parameters_that_do_not_hold(fields: dict[str, object]) -> None:
    with pytest.raises(SamplingError, match=next(iter(fields)).split("_")[0]):
        SamplingParams(**fields)
