"""The same hyperparameters give the same training as transformers with peft, step for step, and equal logits after it.

The other side is the usual loop, written plainly here: padded micro-batches, a loss over the supervised tokens of the
whole optimizer batch, AdamW, a cosine schedule, clipping. It begins at the same adapter and sees the same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pairs import make_pairs, referenced
from slots import stirred
from tiny_models import ORIGINAL_MAX_POSITIONS
from torch import Tensor

from engine.conftest import run_all
from luthier.base.load import Base, load_base
from luthier.checkpoints.peft_format import write_adapter
from luthier.engine.engine import Engine
from luthier.engine.job import TrainingJob
from luthier.engine.pack import PackItem, pack
from luthier.engine.request import Request, SamplingParams
from luthier.engine.sample import Sampler
from luthier.engine.step import score
from luthier.types import AdapterSpec, Example, TrainSpec

MakeExamples = Callable[..., list[Example]]

PAD = 2
TRAIN = TrainSpec(
    epochs=3, batch_size=6, learning_rate=5e-3, weight_decay=0.1, micro_batch_tokens=70, max_grad_norm=0.25
)
LM = AdapterSpec(rank=4, alpha=8.0)
CLASSIFIER = AdapterSpec(rank=3, alpha=6.0, targets=("o_proj", "down_proj"), num_classes=4)
KINDS = {
    "language modelling": LM,
    "classification": CLASSIFIER,
    "tagging": AdapterSpec(rank=3, alpha=6.0, targets=("o_proj", "down_proj"), num_classes=4, head="token"),
    "multilabel": AdapterSpec(rank=3, alpha=6.0, targets=("o_proj", "down_proj"), num_classes=4, head="multilabel"),
    "lora+": AdapterSpec(rank=4, alpha=8.0, lora_plus_ratio=4.0),
    "dora": AdapterSpec(method="dora", rank=4, alpha=8.0),
    "dora classification": AdapterSpec(method="dora", rank=3, alpha=6.0, rank_stabilized=True, num_classes=4),
    "ia3": AdapterSpec(method="ia3", targets="default"),
    "preference": LM,
    "preference by dora": AdapterSpec(method="dora", rank=4, alpha=8.0),
}


def peft_model(base: Base, adapter: Path, dtype: torch.dtype) -> Any:
    """The adapter over a fresh base, ready to be trained, by peft alone."""
    from peft import PeftModel
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )

    assert base.folder is not None
    model: Any
    if (adapter / "classifier").exists():
        config = AutoConfig.from_pretrained(adapter, subfolder="classifier")
        config.classifier_dropout = 0.0  # transformers' token classifiers drop a tenth by default
        is_token = "TokenClassification" in config.architectures[0]
        kind = AutoModelForTokenClassification if is_token else AutoModelForSequenceClassification
        model = kind.from_pretrained(base.folder, config=config, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=dtype)
    return PeftModel.from_pretrained(model, adapter, is_trainable=True).train()


def trained_by_peft(model: Any) -> dict[str, torch.nn.Parameter]:
    """What peft trains, under the bank's names."""
    named = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            short = name.removeprefix("base_model.model.").replace(".default", "")
            short = short.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
            named[short.replace("score.modules_to_save.", "head.")] = parameter
    return named


def micro_batches(batch: list[Example]) -> Iterator[list[Example]]:
    """Two rows at a time. LongRoPE's two classes stay apart, for transformers gives a whole forward one of them."""
    short = [example for example in batch if example.num_tokens <= ORIGINAL_MAX_POSITIONS]
    long = [example for example in batch if example.num_tokens > ORIGINAL_MAX_POSITIONS]
    for rows in (short, long):
        for start in range(0, len(rows), 2):
            yield rows[start : start + 2]


def padded(rows: list[Example]) -> dict[str, Tensor]:
    longest = max(row.num_tokens for row in rows)
    ids = np.full((len(rows), longest), PAD, dtype=np.int64)
    mask = np.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : row.num_tokens] = row.tokens
        mask[index, : row.num_tokens] = 1
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}


def language_modelling_loss(model: Any, rows: list[Example]) -> Tensor:
    """Summed over the supervised tokens."""
    inputs = padded(rows)
    labels = torch.full_like(inputs["input_ids"], -100)
    for index, row in enumerate(rows):
        supervised = torch.from_numpy(row.weights > 0)
        labels[index, : row.num_tokens][supervised] = inputs["input_ids"][index, : row.num_tokens][supervised]
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


def class_loss(model: Any, rows: list[Example]) -> Tensor:
    """Summed over the sequences."""
    logits = model(**padded(rows), use_cache=False).logits
    return F.cross_entropy(logits, torch.tensor([row.class_index for row in rows]), reduction="sum")


def label_loss(model: Any, rows: list[Example]) -> Tensor:
    """transformers' own loss of `multi_label_classification`, a mean over the sequences, times their number."""
    flags = np.stack([row.class_flags for row in rows if row.class_flags is not None])
    labels = torch.from_numpy(flags).to(next(model.parameters()).dtype)
    loss: Tensor = model(**padded(rows), labels=labels, use_cache=False).loss
    return loss * len(rows)


def tag_loss(model: Any, rows: list[Example]) -> Tensor:
    """Summed over the tagged tokens."""
    inputs = padded(rows)
    labels = torch.full_like(inputs["input_ids"], -100)
    for index, row in enumerate(rows):
        assert row.tags is not None
        tagged = torch.from_numpy(row.tags >= 0)
        labels[index, : row.num_tokens][tagged] = torch.from_numpy(row.tags.astype(np.int64))[tagged]
    logits = model(**inputs, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def preference_loss(model: Any, rows: list[Example]) -> Tensor:
    """DPO's loss with label smoothing, summed over the pairs; the reference is the model with its adapter off."""

    def margin(pair: Example) -> Tensor:
        sides, start = [], 0
        for length in pair.lengths:
            ids = torch.from_numpy(pair.tokens[start : start + length].astype(np.int64))
            counts = torch.from_numpy(pair.weights[start : start + length] > 0)
            logprobs = model(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
            sides.append(logprobs[torch.arange(length - 1), ids[1:]][counts[1:]].sum())
            start += length
        return sides[0] - sides[1]

    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        assert row.pair is not None
        with torch.no_grad(), model.disable_adapter():
            reference = margin(row)
        reward = row.pair.beta * (margin(row) - reference)
        smoothing = row.pair.label_smoothing
        total = total - (1 - smoothing) * F.logsigmoid(reward) - smoothing * F.logsigmoid(-reward)
    return total


def usual_loop(
    model: Any, batches: Sequence[list[Example]], train: TrainSpec, lora_plus_ratio: float = 1.0
) -> tuple[list[float], list[float]]:
    """The loss and the gradient's norm of each step."""
    from transformers import get_cosine_schedule_with_warmup

    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parameters = list(named.values())
    halves = [p for name, p in named.items() if ".lora_B." in name]
    others = [p for name, p in named.items() if ".lora_B." not in name]
    adamw = torch.optim.AdamW(
        [{"params": others}, {"params": halves, "lr": train.learning_rate * lora_plus_ratio}],
        lr=train.learning_rate,
        betas=train.betas,
        eps=train.eps,
        weight_decay=train.weight_decay,
    )
    schedule = get_cosine_schedule_with_warmup(adamw, 0, len(batches))
    losses, norms = [], []
    for batch in batches:
        compute, count = language_modelling_loss, sum(int((row.weights[1:] > 0).sum()) for row in batch)
        if batch[0].class_index >= 0:
            compute, count = class_loss, len(batch)
        elif batch[0].class_flags is not None:
            compute, count = label_loss, len(batch)
        elif batch[0].tags is not None:
            compute, count = tag_loss, sum(int((row.tags >= 0).sum()) for row in batch if row.tags is not None)
        elif batch[0].pair is not None:
            compute, count = preference_loss, len(batch)
        total = 0.0
        for rows in micro_batches(batch):
            loss = compute(model, rows) / count
            loss.backward()
            total += float(loss.detach())
        losses.append(total)
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, train.max_grad_norm)))
        adamw.step()
        schedule.step()
        adamw.zero_grad()
    return losses, norms


def train_both(
    folder: Path, spec: AdapterSpec, examples: list[Example], dtype: torch.dtype, tmp_path: Path
) -> tuple[TrainingJob, list[Any], dict[str, torch.nn.Parameter], tuple[list[float], list[float]]]:
    base = load_base(folder, dtype=dtype)
    slot = base.bank.add(spec, seed=3)
    write_adapter(slot, base, tmp_path, base_name=str(folder), pad_token_id=PAD)
    if examples[0].pair is not None:
        examples = referenced(base, examples)
    job = TrainingJob("job", slot, examples, TRAIN)
    batches = [[examples[int(i)] for i in job.batch_indices(step)] for step in range(job.total_steps)]
    engine = Engine(base)
    engine.add(job)
    reports = run_all(engine)["job"]
    model = peft_model(base, tmp_path, dtype)
    theirs = usual_loop(model, batches, TRAIN, spec.lora_plus_ratio)
    return job, reports, trained_by_peft(model), theirs


# Adam divides by the root of the second moment, so that the smallest gradients' rounding grows in the weights.
TOLERANCES = {torch.float64: (1e-9, 1e-8), torch.float32: (1e-4, 2e-3)}
"""Of the losses (relative), and of each trained tensor's change (relative, in norm)."""


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_curve_and_the_adapter_equal_pefts(
    folder: Path, kind: str, dtype: torch.dtype, make_examples: MakeExamples, tmp_path: Path
) -> None:
    spec = KINDS[kind]
    examples = make_examples(22, 0, classes=spec.num_classes or 0, head=spec.head)
    if kind.startswith("preference"):
        examples = make_pairs(22, 0)
    lengths = [length for example in examples for length in example.lengths]
    assert {length > ORIGINAL_MAX_POSITIONS for length in lengths} == {True, False}
    job, reports, theirs, (losses, norms) = train_both(folder, spec, examples, dtype, tmp_path)
    loss_tolerance, adapter_tolerance = TOLERANCES[dtype]
    assert len(losses) == 12
    assert [report.loss for report in reports] == pytest.approx(losses, rel=loss_tolerance)
    assert [report.grad_norm for report in reports] == pytest.approx(norms, rel=10 * loss_tolerance)
    assert max(norms) > TRAIN.max_grad_norm  # clipping took part
    assert abs(losses[-1] - losses[0]) > 0.003  # and something was learnt
    ours = job.slot.parameters()
    assert ours.keys() == theirs.keys()
    fresh = load_base(folder, dtype=dtype).bank.add(spec, seed=3).parameters()
    for name, parameter in ours.items():
        change = float((parameter - fresh[name]).detach().norm())
        assert change > 0
        assert float((parameter - theirs[name]).detach().norm()) <= adapter_tolerance * change, name


def test_a_loss_per_micro_batch_would_be_told_apart(
    tiny_llama: Path, make_examples: MakeExamples, tmp_path: Path
) -> None:
    """The mean of the micro-batches' means, a frequent mistake, is another curve than the one asserted above."""
    examples = make_examples(22, 0)
    base = load_base(tiny_llama, dtype="float64")
    write_adapter(base.bank.add(LM, seed=3), base, tmp_path, base_name=str(tiny_llama))
    model = peft_model(base, tmp_path, torch.float64)
    batch = examples[:6]
    count = sum(int((row.weights[1:] > 0).sum()) for row in batch)
    parts = list(micro_batches(batch))
    with torch.no_grad():
        sums = [float(language_modelling_loss(model, rows)) for rows in parts]
    means = [
        value / sum(int((row.weights[1:] > 0).sum()) for row in rows) for value, rows in zip(sums, parts, strict=True)
    ]
    assert abs(sum(sums) / count - sum(means) / len(means)) > 1e-3


def test_training_sampling_and_peft_score_one_slot_alike(
    folder: Path, make_examples: MakeExamples, tmp_path: Path
) -> None:
    """The log-probabilities of a sampled reply: by the sampler, by the training forward, and by peft."""
    base = load_base(folder, dtype="float64")
    slot = stirred(base, LM)
    prompt = make_examples(1, 4)[0].tokens[:20]
    params = SamplingParams(max_new_tokens=20, temperature=0.8, seed=1, num_logprobs=0)
    [reply] = Sampler(base, str).run([Request("a", prompt, slot.index, params)])
    assert reply.logprobs is not None
    sampled = [entry.logprob for entry in reply.logprobs]
    write_adapter(slot, base, tmp_path, base_name=str(folder))
    model = peft_model(base, tmp_path, torch.float64).eval()
    for count in (ORIGINAL_MAX_POSITIONS - 20, 20):  # LongRoPE's two classes, each by the length of its own forward
        tokens = np.concatenate([prompt, np.array(reply.tokens[:count], np.int32)])
        weights = np.zeros(len(tokens), np.float32)
        weights[-1] = 1.0
        [report] = score(base, pack([PackItem(Example(tokens, weights), slot.index)]))
        with torch.no_grad():
            ids = torch.from_numpy(tokens.astype(np.int64))[None]
            logprobs_V = model(input_ids=ids, use_cache=False).logits[0, -2].log_softmax(-1)
        assert -report.nll_sum == pytest.approx(float(logprobs_V[int(tokens[-1])]), abs=1e-9)
        # The sampler sees the tokens before the last alone, which is the same class for both counts.
        assert sampled[count - 1] == pytest.approx(-report.nll_sum, abs=1e-9)
