"""Judging a model on held-out rows: scores of the reference, generated replies, and the files that keep them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from luthier.base.load import Base
from luthier.data.prepare import PreparedData
from luthier.data.store import ExampleStore, RecordStore
from luthier.data.template import Renderer
from luthier.engine.choices import OneOf
from luthier.engine.pack import BASE_SLOT, PackItem, pack
from luthier.engine.ranks import ALONE, Ranks
from luthier.engine.sample import Request, Sampler, SamplingParams
from luthier.engine.step import SequenceReport, score
from luthier.evaluate.metrics import RowScore, evaluation
from luthier.tasks.registry import head_of
from luthier.tasks.task import Marks, Probabilities
from luthier.types import Example, Prompt
from luthier.worker.budget import JudgingBudget, spread_rows
from luthier.worker.progress import Progress, SilentProgress

SCORE_TOKENS = 4096
"""Tokens in one forward while scoring."""

ROOM_FOR_REPLY = 1.25
"""A reply may be this much longer than the longest reference judged, and `EXTRA_TOKENS`; past that it is wrong."""
EXTRA_TOKENS = 16

OnRows = Callable[[str, int, int], None]


class Judge:
    """The held-out rows that base and tuned model are judged on: the same rows, prompts and limits for both.

    Args:
        base: The resident base.
        renderer: Tokenizer and chat template, as in training.
        data: Where the held-out rows are.
        budget: How many of them.
        max_new_tokens: The recipe's limit for replies.
        seed: Chooses the rows.
        on_rows: Told (what, done, total) now and then.
        score_tokens: Most tokens in one forward while scoring.
        between: Called between forwards, for callers who have other work to see to.
    """

    def __init__(
        self,
        base: Base,
        renderer: Renderer,
        data: PreparedData,
        budget: JudgingBudget,
        *,
        max_new_tokens: int,
        seed: int,
        on_rows: OnRows | None = None,
        score_tokens: int = SCORE_TOKENS,
        between: Callable[[], None] | None = None,
    ) -> None:
        self.score_tokens = score_tokens
        self.between = between
        self.base = base
        self.renderer = renderer
        self.data = data
        self.on_rows = on_rows or (lambda what, done, total: None)
        num_rows = len(data.validation_records) if data.validation_records is not None else 0
        self.at = spread_rows(num_rows, budget.num_rows, seed)
        generated = spread_rows(len(self.at), budget.num_generated, seed)
        self.generated_at = [self.at[i] for i in generated]
        self.max_new_tokens = max_new_tokens
        self._place: dict[int, int] = {}

    def scores(self, slot: int, what: str, num_shots: int = 0) -> list[RowScore]:
        """Judge the base with slot `slot` (or none) on every row.

        With examples in the prompt (`num_shots`), replies alone are judged.
        """
        replies = self._replies(slot, what, num_shots)
        if num_shots:
            return [_marked(RowScore(row), marks) for row, marks in replies.items()]
        return self._join(self._likelihoods(slot, what), replies)

    # -- likelihood

    def _likelihoods(self, slot: int, what: str) -> list[RowScore]:
        assert self.data.validation is not None
        assert self.data.validation_records is not None
        rows = {int(self.data.validation_records.rows[i]) for i in self.at}
        examples = examples_of_rows(self.data.validation, rows)

        def on_done(done: int) -> None:
            self.on_rows(f"{what}, loss", done, len(examples))
            if self.between is not None:
                self.between()

        reports = score_examples(self.base, examples, slot, on_done, self.score_tokens)
        scores = [_row_score(example, report) for example, report in zip(examples, reports, strict=True)]
        if head_of(self.data.task) is None:
            return scores
        given: dict[int, list[Probabilities]] = {}
        for example, report in zip(examples, reports, strict=True):
            assert report.probabilities_CK is not None
            given.setdefault(example.row, []).append(report.probabilities_CK)
        return self._join(scores, {row: self._read(row, found) for row, found in given.items()})

    def _read(self, row: int, given: list[Probabilities]) -> Marks:
        """What a head's probabilities for a row's examples are worth."""
        task, record = self.data.task, self._record(row)
        return task.mark(record, task.read(record, self.renderer, self.data.max_length, given))

    @staticmethod
    def _join(scores: list[RowScore], marks: dict[int, Marks]) -> list[RowScore]:
        """Put each row's marks onto its last example: the one that holds the turn judged."""
        last = {score.row: index for index, score in enumerate(scores)}
        joined = list(scores)
        for row, found in marks.items():
            if row in last:
                joined[last[row]] = _marked(joined[last[row]], found)
        return joined

    # -- replies

    def _replies(self, slot: int, what: str, num_shots: int) -> dict[int, Marks]:
        if not self.generated_at or not self.data.task.generates:
            return {}
        prompts = self.prompts(num_shots)
        done = write_replies(
            self.base,
            self.renderer,
            prompts,
            slot,
            self.reply_limit,
            on_rows=lambda n, total: self.on_rows(f"{what}, replies", n, total),
            between=self.between,
        )
        task = self.data.task
        return {
            prompt.row: task.mark(self._record(prompt.row), reply, prompt.reference)
            for prompt, reply in zip(prompts, done, strict=True)
        }

    def prompts(self, num_shots: int = 0) -> list[Prompt]:
        """The prompts to generate from, one a row."""
        if not self.generated_at or self.data.validation_records is None:
            return []
        task, records = self.data.task, self.data.validation_records
        shots = [task.from_json(value) for value in list(self.data.train_records)[:num_shots]]
        return [
            prompt
            for i in self.generated_at
            for prompt in task.prompts(task.from_json(records[i]), self.renderer, shots, int(records.rows[i]))
        ]

    @property
    def reply_limit(self) -> int:
        """Most tokens of a reply: the recipe's limit, or what the longest reference needs with room to spare."""
        longest = max((len(self.renderer.encode(prompt.reference)) for prompt in self.prompts()), default=0)
        return min(self.max_new_tokens, int(longest * ROOM_FOR_REPLY) + EXTRA_TOKENS)

    def prompt_texts(self) -> dict[int, str]:
        """Row -> what the model was given, as a person reads it."""
        if self.data.validation_records is None:
            return {}
        if self.data.task.generates:
            return {prompt.row: prompt.text for prompt in self.prompts()}
        if head_of(self.data.task) is None:
            return {}
        rows = self._records().rows
        return {int(rows[i]): self._record(int(rows[i])).text for i in self.at}

    def signatures(self) -> dict[str, str]:
        """Metric -> how it is computed on the rows judged."""
        task = self.data.task
        return task.signatures([task.from_json(self._records()[i]) for i in self.generated_at])

    def _records(self) -> RecordStore:
        assert self.data.validation_records is not None
        return self.data.validation_records

    def _record(self, row: int) -> Any:
        """The record of a row's index."""
        if not self._place:
            self._place = {int(found): i for i, found in enumerate(self._records().rows)}
        return self.data.task.from_json(self._records()[self._place[row]])


def write_replies(
    base: Base,
    renderer: Renderer,
    prompts: Sequence[Prompt],
    slot: int,
    max_new_tokens: int,
    *,
    on_rows: Callable[[int, int], None] | None = None,
    between: Callable[[], None] | None = None,
) -> list[str]:
    """The likeliest reply to each prompt, batched; held to the prompt's choices where it has some."""
    params = SamplingParams(max_new_tokens=max_new_tokens, stop_ids=tuple(renderer.stop_ids))
    end = renderer.end_of_turn_id if renderer.can_chat else renderer.require_eos_id()
    requests = []
    for n, prompt in enumerate(prompts):
        constraint, own = None, params
        if prompt.choices:
            sequences = [renderer.continuation(prompt.text, prompt.tokens.tolist(), c) for c in prompt.choices]
            constraint = OneOf(sequences, end, base.vocabulary_size)
            own = replace(params, max_new_tokens=max(len(sequence) for sequence in sequences) + 1)
        requests.append(Request(str(n), prompt.tokens, slot, own, constraint))
    return [reply.text for reply in Sampler(base, renderer.decode).run(requests, on_rows, between=between)]


def examples_of_rows(store: ExampleStore, rows: set[int]) -> list[Example]:
    """The examples that the given records became, in order."""
    return [store[int(i)] for i in np.flatnonzero(np.isin(store.rows, list(rows)))]


def score_examples(
    base: Base,
    examples: Sequence[Example],
    slot: int,
    on_done: Callable[[int], None] = lambda done: None,
    max_tokens: int = SCORE_TOKENS,
) -> list[SequenceReport]:
    """Forward-only scores of each example, in order; similar lengths run together where the base pads."""
    order = sorted(range(len(examples)), key=lambda i: examples[i].num_tokens)
    reports: list[SequenceReport | None] = [None] * len(examples)
    start = 0
    while start < len(order):
        end, tokens = start, 0
        while end < len(order) and (end == start or tokens + examples[order[end]].num_tokens <= max_tokens):
            tokens += examples[order[end]].num_tokens
            end += 1
        batch = pack([PackItem(examples[i], slot) for i in order[start:end]], base.device)
        for i, report in zip(order[start:end], score(base, batch), strict=True):
            reports[i] = report
        start = end
        on_done(end)
    return [report for report in reports if report is not None]


def mean_loss(reports: Sequence[SequenceReport], ranks: Ranks = ALONE) -> dict[str, float]:
    """Loss and token accuracy over all the sequences of all ranks, as metrics.jsonl keeps them."""
    rows = [
        (r.nll_sum, r.weight_sum, r.num_correct, r.num_targets, r.probabilities_CK is not None, r.predicted_class >= 0)
        for r in reports
    ]
    sums = torch.tensor(rows, dtype=torch.float64).reshape(-1, 6).sum(dim=0)  # a rank may have none
    ranks.sum_(sums)
    nll, weight, num_correct, num_targets, num_with_head, num_of_sequences = sums.tolist()
    loss, correct = nll / weight, num_correct / max(1, num_targets)
    if num_with_head:
        return {"loss": loss, "accuracy" if num_of_sequences else "tag_accuracy": correct}
    return {"loss": loss, "perplexity": float(np.exp(min(loss, 700.0))), "token_accuracy": correct}


def _row_score(example: Example, report: SequenceReport) -> RowScore:
    if report.probabilities_CK is None:
        return RowScore(example.row, report.nll_sum, report.weight_sum, report.num_correct, report.num_targets)
    score = RowScore(example.row, report.nll_sum, report.weight_sum)
    if example.tags is not None:
        score = replace(score, ratios={"tag_accuracy": (report.num_correct, report.num_targets)})
    return score


def _marked(score: RowScore, marks: Marks) -> RowScore:
    return replace(
        score,
        reply=marks.reply,
        reference=marks.reference,
        is_exact=marks.is_exact,
        is_right=marks.is_right,
        class_index=marks.class_index,
        predicted_class=marks.predicted_class,
        ratios={**score.ratios, **marks.ratios},
        statistics=dict(marks.statistics),
        parts={part: dict(found) for part, found in marks.parts.items()},
        group=marks.group,
    )


def predictions(scores: dict[str, list[RowScore]], prompts: dict[int, str]) -> list[dict[str, Any]]:
    """A line a row for predictions.jsonl: the prompt, the reference, and what each model made of it."""
    lines: dict[int, dict[str, Any]] = {}
    for who, rows in scores.items():
        for row in rows:
            if row.reply is None:
                continue
            line = lines.setdefault(row.row, {"row": row.row})
            if row.row in prompts:
                line["prompt"] = prompts[row.row]
            line["reference"], line[who], line[f"{who}_correct"] = row.reference, row.reply, row.is_right
    return list(lines.values())


def evaluate_run(
    run: str | Path, *, data: Path | None = None, rows: int | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Judge a finished run's base and tuned model again: on its held-out rows, or on another file.

    Returns:
        What eval.json holds. The run's own files are left as they are.
    """
    from luthier.worker.loading import load_run

    progress = progress or SilentProgress()
    loaded = load_run(run, data=data, rows=rows, progress=progress)
    tuned = loaded.judge.scores(loaded.slot, "tuned")
    if loaded.base_slot is not None:
        base = loaded.judge.scores(loaded.base_slot, "base")
    else:
        judge = loaded.judge_of_base()
        slots = list(judge.base.bank.slots)  # a classifier's base has a slot with an untrained head
        base = judge.scores(slots[0] if slots else BASE_SLOT, "base")
    return evaluation({"base": base, "tuned": tuned}, signatures=loaded.judge.signatures())
