"""Judging a model on held-out rows: scores of the reference, generated replies, and the files that keep them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from luthier.base.load import Base
from luthier.data.prepare import PreparedData
from luthier.data.store import ExampleStore
from luthier.data.template import Renderer
from luthier.engine.pack import BASE_SLOT, PackItem, pack
from luthier.engine.sample import Request, Sampler, SamplingParams
from luthier.engine.step import SequenceReport, score
from luthier.evaluate.metrics import RowScore, evaluation
from luthier.tasks.chat.metrics import exact_match
from luthier.types import NO_CLASS, Example
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

    def scores(self, slot: int, what: str, num_shots: int = 0) -> list[RowScore]:
        """Judge the base with slot `slot` (or none) on every row.

        With examples in the prompt (`num_shots`), replies alone are judged.
        """
        replies = self._replies(slot, what, num_shots)
        if num_shots:
            return list(replies.values())
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
        labels = self.data.task.labels
        return [_row_score(example, report, labels) for example, report in zip(examples, reports, strict=True)]

    @staticmethod
    def _join(scores: list[RowScore], replies: dict[int, RowScore]) -> list[RowScore]:
        """Put each row's reply onto its last example: the one that holds the turn judged."""
        last = {score.row: index for index, score in enumerate(scores)}
        joined = list(scores)
        for row, reply in replies.items():
            if row in last:
                joined[last[row]] = replace(
                    joined[last[row]], reply=reply.reply, reference=reply.reference, is_exact=reply.is_exact
                )
        return joined

    # -- replies

    def _replies(self, slot: int, what: str, num_shots: int) -> dict[int, RowScore]:
        if not self.generated_at or not self.data.task.generates:
            return {}
        prompts = self.prompts(num_shots)
        params = SamplingParams(max_new_tokens=self.reply_limit, stop_ids=tuple(self.renderer.stop_ids))
        requests = [Request(str(n), prompt.tokens, slot, params) for n, prompt in enumerate(prompts)]
        sampler = Sampler(self.base, self.renderer.decode)
        done = sampler.run(requests, lambda n, total: self.on_rows(f"{what}, replies", n, total), between=self.between)
        return {
            prompt.row: RowScore(
                prompt.row,
                reply=reply.text,
                reference=prompt.reference,
                is_exact=exact_match(reply.text, prompt.reference),
            )
            for prompt, reply in zip(prompts, done, strict=True)
        }

    def prompts(self, num_shots: int = 0) -> list[Any]:
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

    def prompt_texts(self) -> dict[int, tuple[str, str]]:
        """Row -> (prompt as a person reads it, reference)."""
        return {prompt.row: (prompt.text, prompt.reference) for prompt in self.prompts()}


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


def mean_loss(reports: Sequence[SequenceReport]) -> dict[str, float]:
    """Loss and token accuracy over all the sequences, as metrics.jsonl keeps them."""
    weight = sum(report.weight_sum for report in reports)
    loss = sum(report.nll_sum for report in reports) / weight
    correct = sum(report.num_correct for report in reports) / max(1, sum(report.num_targets for report in reports))
    if any(report.predicted_class >= 0 for report in reports):
        return {"loss": loss, "accuracy": correct}
    return {"loss": loss, "perplexity": float(np.exp(min(loss, 700.0))), "token_accuracy": correct}


def _row_score(example: Example, report: SequenceReport, labels: Sequence[str]) -> RowScore:
    if example.class_index != NO_CLASS:
        return RowScore(
            example.row,
            report.nll_sum,
            report.weight_sum,
            reference=labels[example.class_index],
            class_index=example.class_index,
            predicted_class=report.predicted_class,
        )
    return RowScore(example.row, report.nll_sum, report.weight_sum, report.num_correct, report.num_targets)


def predictions(
    scores: dict[str, list[RowScore]], prompts: dict[int, tuple[str, str]], labels: Sequence[str]
) -> list[dict[str, Any]]:
    """A line a row for predictions.jsonl: the prompt, the reference, and what each model made of it."""
    lines: dict[int, dict[str, Any]] = {}
    for who, rows in scores.items():
        for row in rows:
            line = lines.setdefault(row.row, {"row": row.row})
            if row.row in prompts:
                line["prompt"], line["reference"] = prompts[row.row]
            if row.reply is not None:
                line[who], line[f"{who}_correct"] = row.reply, row.is_exact
            elif row.is_classed:
                assert row.predicted_class is not None
                line["reference"] = labels[row.class_index]
                line[who] = labels[row.predicted_class]
                line[f"{who}_correct"] = row.predicted_class == row.class_index
    return [line for line in lines.values() if len(line) > 1]


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
    return evaluation({"base": base, "tuned": tuned})
