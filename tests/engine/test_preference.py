"""Preference pairs in the engine: loss and gradients against plain transformers, and what holds a pair together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pairs import make_pairs, referenced
from slots import stirred
from torch import Tensor

from engine.conftest import add_job, run_all
from luthier.base.load import Base, load_base
from luthier.engine.engine import Engine
from luthier.engine.job import TrainingJob
from luthier.engine.live_rows import find_live_rows
from luthier.engine.pack import BASE_SLOT, PackItem, pack
from luthier.engine.scoring import reference_margins, score_examples
from luthier.engine.step import train_step
from luthier.types import AdapterSpec, Example, TrainSpec

MakeExamples = Callable[..., list[Example]]

SPEC = AdapterSpec(rank=4, alpha=8.0)


def items(pairs: list[Example], slot: int) -> list[PackItem]:
    return [PackItem(pair, slot) for pair in pairs]


def plain_margins(model: Any, pairs: list[Example]) -> Tensor:
    """log p(chosen) - log p(rejected) by transformers alone, a sequence at a time."""
    found = []
    for pair in pairs:
        sums, start = [], 0
        for length in pair.lengths:
            ids = torch.from_numpy(pair.tokens[start : start + length].astype(np.int64))
            counts = torch.from_numpy(pair.weights[start : start + length][1:] > 0)
            logprobs = model(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
            sums.append(logprobs.gather(1, ids[1:, None])[:, 0][counts].sum())
            start += length
        found.append(sums[0] - sums[1])
    return torch.stack(found)


def test_a_pair_is_two_neighbouring_sequences_of_its_slot() -> None:
    pair, plain = make_pairs(1, 0)[0], Example(np.arange(4, 9, dtype=np.int32), np.r_[0, 1, 1, 1, 1])
    batch = pack([PackItem(plain, 2), PackItem(pair, 1, (7, 8, 9))])
    assert batch.lengths == (*pair.lengths, 5)
    assert batch.slots == (1, 1, 2)
    assert batch.draws[:2] == ((7, 8, 9), (7, 8, 9))
    assert batch.pairs is not None
    assert batch.pairs.chosen_rows == (0,)
    assert batch.positions_T[pair.lengths[0]] == 0  # the rejected side begins anew
    num_chosen, num_rejected = (int(part.sum()) for part in np.split(pair.weights, [pair.lengths[0]]))
    assert batch.pairs.side_Q.tolist() == [0] * num_chosen + [1] * num_rejected
    assert not batch.target_weight_P[batch.pairs.at_Q].any()
    assert batch.target_weight_P.sum() == 4
    assert pack([PackItem(plain, 2)]).pairs is None


@pytest.mark.usefixtures("wide_norms")
@pytest.mark.parametrize("fast", [False, True], ids=["modules", "blocks"])
def test_loss_and_gradients_equal_the_plain_ones(folder: Path, fast: bool, tmp_path: Path) -> None:
    """Against peft over transformers in float64, whose reference is the model with the adapter off."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from luthier.checkpoints.peft_format import write_adapter

    base = load_base(folder, dtype="float64", wants_fast_body=fast)
    slot = stirred(base, SPEC)
    write_adapter(slot, base, tmp_path, base_name=str(folder))
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64), tmp_path, is_trainable=True
    )
    pairs = make_pairs(7, 3)
    with torch.no_grad(), plain.disable_adapter():
        reference_M = plain_margins(plain, pairs)
    assert reference_margins(base, pairs, BASE_SLOT) == pytest.approx(reference_M.numpy(), abs=1e-9)
    reward_M = 0.1 * (plain_margins(plain, pairs) - reference_M)
    losses_M = -0.95 * F.logsigmoid(reward_M) - 0.05 * F.logsigmoid(-reward_M)
    losses_M.mean().backward()

    known = referenced(base, pairs)
    found = score_examples(base, known, slot.index)
    assert [report.nll_sum for report in found] == pytest.approx(losses_M.tolist(), abs=1e-9)
    assert [report.pair.reward_margin for report in found if report.pair] == pytest.approx(reward_M.tolist(), abs=1e-9)
    report = train_step(base, pack(items(known, slot.index)), {slot.index: 7.0})[slot.index]
    assert report.nll_sum / report.weight_sum == pytest.approx(float(losses_M.detach().mean()), abs=1e-9)
    assert (report.weight_sum, report.num_tokens) == (7.0, sum(pair.num_tokens for pair in pairs))
    theirs = {
        name.removeprefix("base_model.model.").replace(".default", ""): p.grad
        for name, p in plain.named_parameters()
        if p.requires_grad
    }
    assert theirs.keys() == slot.parameters().keys()
    for name, parameter in slot.parameters().items():
        torch.testing.assert_close(
            parameter.grad, theirs[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_memory_that_runs_short_never_parts_a_pair(tiny_llama: Path) -> None:
    base = load_base(tiny_llama)
    pairs = referenced(base, make_pairs(6, 1))
    job = TrainingJob("a", base.bank.add(SPEC, 0), pairs, TrainSpec(batch_size=6, micro_batch_tokens=100_000))
    sizes = []
    while True:
        micro = job.next_micro_batch()
        batch = pack(micro)
        assert batch.pairs is not None
        assert batch.num_sequences == 2 * len(micro)
        assert batch.pairs.chosen_rows == tuple(range(0, 2 * len(micro), 2))
        sizes.append(len(micro))
        if not job.shrink_micro_batch():
            break
    assert sizes[0] == 6
    assert sizes[-1] == 1  # down to one pair a forward, and no further


def test_the_prompt_of_a_pair_is_computed_once(tiny_llama: Path) -> None:
    base = load_base(tiny_llama)
    [pair] = [pair for pair in make_pairs(20, 5) if pair.num_tokens > 60][:1]
    assert pair.pair is not None
    num_prompt = int(np.flatnonzero(pair.weights)[0])
    rows = find_live_rows(pack([PackItem(pair, 0)]), only_scored=True)
    assert rows is not None
    # Each side but its last token, and the prompt once.
    assert rows.num_rows == pair.num_tokens - num_prompt - 2
    assert base.fast_body is not None


def test_a_job_without_its_reference_does_not_train(tiny_llama: Path) -> None:
    base = load_base(tiny_llama)
    engine = Engine(base)
    engine.add(TrainingJob("a", base.bank.add(SPEC, 0), make_pairs(4, 0), TrainSpec()))
    with pytest.raises(ValueError, match="reference has not been computed"):
        engine.step()


def test_preferences_are_learnt_beside_chat_and_classes(tiny_llama: Path, make_examples: MakeExamples) -> None:
    engine = Engine(load_base(tiny_llama))
    for kind in (0, 3):
        add_job(engine, kind, make_examples)
    pairs = referenced(engine.base, make_pairs(12, 0))
    train = TrainSpec(epochs=4, batch_size=4, learning_rate=5e-3, seed=1)
    job = TrainingJob("preference", engine.base.bank.add(SPEC, 0), pairs, train)
    engine.add(job)
    curve = run_all(engine)[job.name]
    assert curve[0].loss == pytest.approx(np.log(2), abs=1e-5)
    assert curve[-1].loss < curve[0].loss - 0.05
    assert curve[0].num_supervised_tokens == sum(int(pairs[i].weights.sum()) for i in job.batch_indices(0))
    reports = score_examples(engine.base, pairs, job.slot.index)
    assert all(report.pair is not None and report.pair.reward_margin > 0 for report in reports)


def test_a_start_may_be_the_reference(tiny_llama: Path) -> None:
    """A job that goes on from an adapter is held to that adapter: its first loss is log 2, over the base it is not."""
    base = load_base(tiny_llama, dtype="float64")
    slot = stirred(base, SPEC)
    pairs = make_pairs(4, 2, smoothing=0.0)
    own = score_examples(base, referenced(base, pairs, slot.index), slot.index)
    assert [report.nll_sum for report in own] == pytest.approx([np.log(2)] * 4, abs=1e-12)
    other = score_examples(base, referenced(base, pairs), slot.index)
    assert all(abs(report.nll_sum - np.log(2)) > 1e-6 for report in other)


def test_examples_without_sides_have_no_margin(base: Base, make_examples: MakeExamples) -> None:
    with pytest.raises(ValueError, match="no preference pair"):
        reference_margins(base, [replace(make_examples(1, 0)[0])], BASE_SLOT)
