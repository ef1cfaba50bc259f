"""Judging a model on held-out rows: scores of the reference, generated replies, and the files that keep them."""

from __future__ import annotations

import math
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
from luthier.engine.pack import BASE_SLOT
from luthier.engine.ranks import ALONE, Ranks
from luthier.engine.sample import Request, Sampler, SamplingParams
from luthier.engine.scoring import SCORE_TOKENS, score_examples
from luthier.engine.step import SequenceReport
from luthier.evaluate.metrics import RowScore, evaluation
from luthier.tasks.classification.words import WordsTask
from luthier.tasks.preference.metrics import PAIR_METRICS, pair_ratios
from luthier.tasks.registry import head_of
from luthier.tasks.task import Marks, Probabilities
from luthier.types import Example, HeadKind, Prompt
from luthier.worker.budget import JudgingBudget, spread_rows
from luthier.worker.choosing import choose_labels
from luthier.worker.progress import Progress, SilentProgress

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
        self.seed = seed
        self._place: dict[int, int] = {}

    def scores(self, slot: int, what: str, num_shots: int = 0, *, is_reference: bool = False) -> list[RowScore]:
        """Judge the base with slot `slot` (or none) on every row.

        With examples in the prompt (`num_shots`), replies alone are judged.

        Args:
            is_reference: This model is what the pairs' reference was asked of.
        """
        replies = self._replies(slot, what, num_shots) | self._choices(slot, what, num_shots)
        if num_shots:
            return [_marked(RowScore(row), marks) for row, marks in replies.items()]
        return self._join(self._likelihoods(slot, what, is_reference), replies)

    def of_replay(self) -> Judge | None:
        """The same judge on held-out rows of the replayed text, at most as many as here; None without."""
        replay = self.data.replay
        if replay is None or replay.validation_records is None or not self.at:
            return None
        return Judge(
            self.base,
            self.renderer,
            replay,
            JudgingBudget(min(len(self.at), len(replay.validation_records)), 0),
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            on_rows=self.on_rows,
            score_tokens=self.score_tokens,
            between=self.between,
        )

    def _counting(self, what: str, total: int) -> Callable[[int], None]:
        """Tells of the rows done, and lets the caller's other work go on."""

        def on_done(done: int) -> None:
            self.on_rows(what, done, total)
            if self.between is not None:
                self.between()

        return on_done

    # -- likelihood

    def _likelihoods(self, slot: int, what: str, is_reference: bool) -> list[RowScore]:
        assert self.data.validation is not None
        assert self.data.validation_records is not None
        rows = {int(self.data.validation_records.rows[i]) for i in self.at}
        examples = examples_of_rows(self.data.validation, rows)

        on_done = self._counting(f"{what}, loss", len(examples))
        reports = score_examples(self.base, examples, slot, on_done, self.score_tokens)
        reports = [_over_itself(report) for report in reports] if is_reference else reports
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
        task, record = self.data.task, self.record_of(row)
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
            prompt.row: task.mark(self.record_of(prompt.row), reply, prompt.reference)
            for prompt, reply in zip(prompts, done, strict=True)
        }

    def _choices(self, slot: int, what: str, num_shots: int) -> dict[int, Marks]:
        """Which label is likeliest, of a task that chooses."""
        task = self.data.task
        if not self.generated_at or not isinstance(task, WordsTask):
            return {}
        rows = [int(self._records().rows[i]) for i in self.generated_at]
        found = choose_labels(
            self.base,
            self.renderer,
            task,
            [self.record_of(row) for row in rows],
            slot,
            shots=self._shots(num_shots),
            on_done=self._counting(f"{what}, labels", len(rows)),
            max_tokens=self.score_tokens,
        )
        return {row: self._read(row, [given]) for row, given in zip(rows, found, strict=True)}

    def _shots(self, num_shots: int) -> list[Any]:
        """The training records that stand in a prompt, solved."""
        return [self.data.task.from_json(value) for value in list(self.data.train_records)[:num_shots]]

    def prompts(self, num_shots: int = 0) -> list[Prompt]:
        """The prompts to generate from, one a row."""
        if not self.generated_at or self.data.validation_records is None:
            return []
        task, records = self.data.task, self.data.validation_records
        shots = self._shots(num_shots)
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
        if self.data.task.generates or self.data.task.chooses:
            return {prompt.row: prompt.text for prompt in self.prompts()}
        if head_of(self.data.task) is None:
            return {}
        rows = self._records().rows
        return {int(rows[i]): self.record_of(int(rows[i])).text for i in self.at}

    def signatures(self) -> dict[str, str]:
        """Metric -> how it is computed on the rows judged."""
        task = self.data.task
        return task.signatures([task.from_json(self._records()[i]) for i in self.generated_at])

    def _records(self) -> RecordStore:
        assert self.data.validation_records is not None
        return self.data.validation_records

    def record_of(self, row: int) -> Any:
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
    requests = []
    for n, prompt in enumerate(prompts):
        constraint, own = None, params
        if prompt.choices:
            constraint = OneOf(prompt.choices, base.vocabulary_size)
            own = replace(params, max_new_tokens=max(map(len, prompt.choices)))
        requests.append(Request(str(n), prompt.tokens, slot, own, constraint))
    return [reply.text for reply in Sampler(base, renderer.decode).run(requests, on_rows, between=between)]


def examples_of_rows(store: ExampleStore, rows: set[int]) -> list[Example]:
    """The examples that the given records became, in order."""
    return [store[int(i)] for i in np.flatnonzero(np.isin(store.rows, list(rows)))]


def mean_loss(
    reports: Sequence[SequenceReport], head: HeadKind | None = None, ranks: Ranks = ALONE
) -> dict[str, float]:
    """Loss and accuracy over all the sequences of all ranks, or what there is of pairs, as metrics.jsonl keeps them.

    Args:
        head: Of the task. Of any number of labels the loss alone is told: what is right depends on the threshold.
    """
    rows = [(r.nll_sum, r.weight_sum, r.num_correct, r.num_targets, *_pair_row(r)) for r in reports]
    sums = torch.tensor(rows, dtype=torch.float64).reshape(-1, 5 + len(PAIR_METRICS)).sum(dim=0)  # a rank may have none
    ranks.sum_(sums)
    nll, weight, num_correct, num_targets, num_pairs, *of_pairs = sums.tolist()
    loss, correct = nll / weight, num_correct / max(1, num_targets)
    if num_pairs:
        return {"loss": loss} | {name: total / num_pairs for name, total in zip(PAIR_METRICS, of_pairs, strict=True)}
    if head == "multilabel":
        return {"loss": loss}
    if head is not None:
        return {"loss": loss, "accuracy" if head == "sequence" else "tag_accuracy": correct}
    return {"loss": loss, "perplexity": float(np.exp(min(loss, 700.0))), "token_accuracy": correct}


def _pair_row(report: SequenceReport) -> list[float]:
    """1 and the metrics of a pair, or as many zeros."""
    pair = report.pair
    if pair is None:
        return [0.0] * (1 + len(PAIR_METRICS))
    ratios = pair_ratios(pair.chosen_logprob, pair.rejected_logprob, pair.reward_margin)
    return [1.0, *(ratios[name][0] for name in PAIR_METRICS)]


def _over_itself(report: SequenceReport) -> SequenceReport:
    """The reference's own report of a pair: it gains nothing over itself, where rounding would say that it does."""
    if report.pair is None:
        return report
    return replace(report, nll_sum=math.log(2.0), pair=replace(report.pair, reward_margin=0.0))


def _row_score(example: Example, report: SequenceReport) -> RowScore:
    if (pair := report.pair) is not None:
        ratios = pair_ratios(pair.chosen_logprob, pair.rejected_logprob, pair.reward_margin)
        return RowScore(example.row, report.nll_sum, report.weight_sum, ratios=ratios)
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
        reference_ratios=dict(marks.reference_ratios),
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
    tuned = _scores_of(loaded.judge, loaded.slot, "tuned")
    if loaded.base_slot is not None:
        base = _scores_of(loaded.judge, loaded.base_slot, "base", is_reference=loaded.base_is_reference)
    else:
        judge = loaded.judge_of_base()
        slots = list(judge.base.bank.slots)  # a classifier's base has a slot with an untrained head
        slot = slots[0] if slots else BASE_SLOT
        base = _scores_of(judge, slot, "base", is_reference=loaded.base_is_reference)
    values = evaluation({"base": base[0], "tuned": tuned[0]}, signatures=loaded.judge.signatures())
    if tuned[1]:
        values["replay"] = evaluation({"base": base[1], "tuned": tuned[1]})
    return values


def _scores_of(
    judge: Judge, slot: int, what: str, *, is_reference: bool = False
) -> tuple[list[RowScore], list[RowScore]]:
    """Scores on the held-out rows, and on those of the replayed text."""
    scores = judge.scores(slot, what, is_reference=is_reference)
    replay = judge.of_replay()
    return scores, replay.scores(slot, f"{what}, replayed text") if replay is not None else []
