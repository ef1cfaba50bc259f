"""When a run judges what: the base before training, validation on the way, the tuned model at the end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.base.load import Base
from luthier.data.prepare import PreparedData
from luthier.data.template import Renderer
from luthier.engine.job import TrainingJob
from luthier.engine.pack import BASE_SLOT
from luthier.engine.ranks import ALONE, Ranks
from luthier.engine.rounds import share_by_tokens
from luthier.engine.scoring import SCORE_TOKENS, score_examples
from luthier.evaluate.metrics import RowScore, evaluation
from luthier.files import write_text
from luthier.recipe import Recipe
from luthier.tasks.registry import head_of
from luthier.types import Example
from luthier.worker.budget import JudgingBudget, choose_budget
from luthier.worker.judge import Judge, examples_of_rows, mean_loss, predictions
from luthier.worker.progress import Progress
from luthier.worker.run_folder import RunFolder

SHARE_FOR_VALIDATION = 0.2
"""Validation losses on the way may cost this share of the training."""


@dataclass(slots=True)
class Best:
    """The best validation loss so far, and how many evaluations have passed since."""

    step: int = 0
    loss: float | None = None
    num_evaluations_since: int = 0

    def take(self, step: int, loss: float) -> bool:
        """Whether `loss` is the best so far."""
        is_better = self.loss is None or loss < self.loss
        if is_better:
            self.step, self.loss, self.num_evaluations_since = step, loss, 0
        else:
            self.num_evaluations_since += 1
        return is_better


@contextmanager
def counted(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add what passes within to `seconds[phase]`."""
    started = time.perf_counter()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - started


class Judging:
    """The judgements of one run: the same held-out rows for base and tuned model, a part of them on the way.

    Args:
        recipe, folder, renderer, data, progress, seconds: The run's own.
        base, job: What is judged.
        score_tokens: Most tokens in one forward while scoring.
        between: Called between the forwards, for callers who have other work to see to.
        ranks: The processes that validate together, a share of the examples each; only the first judges.

    Attributes:
        evaluate_every: Steps between two validations.
        validation: The examples of a validation; empty where nothing is held out.
        scores: What each model did on each row, as far as it has been judged.
        replay_scores: Likewise on the held-out rows of the replayed text.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        renderer: Renderer,
        data: PreparedData,
        progress: Progress,
        seconds: dict[str, float],
        base: Base,
        job: TrainingJob,
        *,
        score_tokens: int = SCORE_TOKENS,
        between: Callable[[], None] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks = ranks
        self.recipe, self.folder, self.data, self.seconds = recipe, folder, data, seconds
        self.renderer = renderer
        self.base, self.job = base, job
        self.score_tokens, self.between = score_tokens, between
        self.scores: dict[str, list[RowScore]] = {}
        self.replay_scores: dict[str, list[RowScore]] = {}
        name = str(folder.path)
        self.judge = Judge(
            base,
            renderer,
            data,
            self._budget(),
            max_new_tokens=recipe.evaluation.max_new_tokens,
            seed=recipe.train.seed,
            on_rows=lambda what, done, total: progress.evaluation(name, what, done, total),
            score_tokens=score_tokens,
            between=between,
        )
        self.replay_judge = self.judge.of_replay()
        self.evaluate_every = recipe.evaluation.every or max(1, job.steps_per_epoch // 2)
        self.validation = self._validation_examples()

    @property
    def _num_held_out(self) -> int:
        return len(self.data.validation_records) if self.data.validation_records is not None else 0

    @property
    def _train_tokens(self) -> float:
        """Tokens that training runs in all its epochs."""
        return float(self.data.examples.num_tokens.sum()) * self.job.total_steps / self.job.steps_per_epoch

    @property
    def _row_tokens(self) -> float:
        """Mean tokens of a held-out row."""
        held_out = self.data.validation
        lengths = held_out.num_tokens if held_out is not None else np.zeros(0)
        return float(lengths.sum()) / max(1, self._num_held_out)

    def _budget(self) -> JudgingBudget:
        if self._num_held_out == 0:
            return JudgingBudget(0, 0)
        settings = self.recipe.evaluation
        return choose_budget(
            num_held_out=self._num_held_out,
            train_tokens=self._train_tokens,
            row_tokens=self._row_tokens,
            reply_tokens=self._reply_tokens,
            num_models=2 + (settings.shots > 0),
            rows=settings.rows,
            generate_rows=settings.generate_rows,
            generates=settings.generate or self.data.task.chooses,
        )

    @property
    def _reply_tokens(self) -> float:
        """Tokens that a reply may cost; with labels to choose from, those of all of them."""
        if self.data.task.chooses:
            encode = self.renderer.encode
            return sum(len(encode(label)) + 1.0 for label in self.data.task.labels) / 2  # a token here costs no step
        return min(self.recipe.evaluation.max_new_tokens, self._row_tokens)

    def _validation_examples(self) -> list[Example]:
        num_evaluations = max(1, self.job.total_steps // self.evaluate_every)
        allowance = SHARE_FOR_VALIDATION * 2.0 * self._train_tokens / num_evaluations
        most = max(1, int(allowance / max(1.0, self._row_tokens)))
        if self.data.validation is None or self.data.validation_records is None:
            return []
        rows = {int(self.data.validation_records.rows[i]) for i in self.judge.at[:most]}
        return examples_of_rows(self.data.validation, rows) if rows else []

    def judge_base(self) -> None:
        """Judge the base before training, once; a resumed run remembers."""
        if not self.judge.at:
            return
        # A head has no untrained counterpart in the base: what it gives before training stands for it.
        slot = self.job.slot.index if self.job.slot.head is not None else BASE_SLOT
        self._judge("base", slot, is_reference=self.recipe.start_from is None)
        self._judge_replay("base", slot)
        shots = self.recipe.evaluation.shots
        writes = self.data.task.generates or self.data.task.chooses
        if shots and writes and self.judge.generated_at:
            self._judge(f"base_{shots}_shot", BASE_SLOT, shots)

    def judge_tuned(self) -> None:
        """Judge what the slot holds now, anew."""
        if not self.judge.at:
            return
        for name in ("tuned", "tuned_replay"):
            (self.folder.path / "scores" / f"{name}.json").unlink(missing_ok=True)
        self._judge("tuned", self.job.slot.index)
        self._judge_replay("tuned", self.job.slot.index)

    def validate(self, step: int) -> dict[str, float]:
        """The validation loss and its like, written down as of `step`."""
        between = self.between
        on_done = (lambda done: None) if between is None else (lambda done: between())
        lengths = [example.num_tokens for example in self.validation]
        examples, ranks = self.validation, self.ranks
        if not self.base.is_sharded:  # else every forward is all ranks' together, so each scores all
            mine = share_by_tokens(lengths, [0] * ranks.size)[ranks.rank]
            examples = [self.validation[position] for position in mine]
        else:
            ranks = ALONE
        reports = score_examples(self.base, examples, self.job.slot.index, on_done, self.score_tokens)
        values = mean_loss(reports, head_of(self.data.task), ranks)
        self.folder.append_metric(kind="evaluation", step=step, **values)
        return values

    def write(self) -> dict[str, Any]:
        """Write eval.json and predictions.jsonl; returns what eval.json holds."""
        values: dict[str, Any] = {"num_rows": 0, "base": {}, "tuned": {}}
        if self.scores:
            values = evaluation(self.scores, signatures=self.judge.signatures())
        if self.replay_scores:
            values["replay"] = evaluation(self.replay_scores)
        self.folder.write_json("eval.json", values)
        lines = predictions(self.scores, self.judge.prompt_texts())
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_text(self.folder.path / "predictions.jsonl", text)
        return values

    def _judge(self, who: str, slot: int, num_shots: int = 0, *, is_reference: bool = False) -> None:
        with counted(self.seconds, "judging"):
            kept = self.folder.read_scores(who)
            if kept is None:
                kept = self.judge.scores(slot, who.replace("_", " "), num_shots, is_reference=is_reference)
                self.folder.write_scores(who, kept)
            self.scores[who] = kept

    def _judge_replay(self, who: str, slot: int) -> None:
        """The general ability: the loss on held-out rows of the replayed text."""
        if self.replay_judge is None:
            return
        with counted(self.seconds, "judging"):
            kept = self.folder.read_scores(f"{who}_replay")
            if kept is None:
                kept = self.replay_judge.scores(slot, f"{who}, replayed text")
                self.folder.write_scores(f"{who}_replay", kept)
            self.replay_scores[who] = kept
