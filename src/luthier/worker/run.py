"""One recipe on its way from data to a judged adapter: everything of a job that the engine does not know."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from luthier.base.folder import RESULT_MODEL
from luthier.base.identity import weights_identity
from luthier.base.load import Base
from luthier.base.own import OwnBase
from luthier.checkpoints.checkpoint import (
    checkpoint_folder,
    latest_checkpoint,
    load_checkpoint,
    prune,
    save_checkpoint,
    step_of,
)
from luthier.checkpoints.own_files import write_result
from luthier.checkpoints.peft_format import check_writable, slot_from_adapter
from luthier.checkpoints.slot_files import read_slot, write_slot
from luthier.data.prepare import PreparedData
from luthier.data.template import Renderer
from luthier.engine.job import StepReport, TrainingJob, total_steps
from luthier.engine.own import OwnSlot
from luthier.engine.pack import BASE_SLOT
from luthier.engine.slot import Slot
from luthier.errors import ModelError, RecipeError, RunError
from luthier.evaluate.card import write_card
from luthier.evaluate.metrics import RowScore, evaluation
from luthier.evaluate.report import write_report
from luthier.files import atomic_folder, write_text
from luthier.methods.config import exclusive_spec
from luthier.methods.peft.layer import PeftBase
from luthier.methods.registry import METHODS
from luthier.recipe import Recipe
from luthier.types import AdapterSpec, ExclusiveSpec
from luthier.worker.budget import JudgingBudget, choose_budget
from luthier.worker.judge import SCORE_TOKENS, Judge, examples_of_rows, mean_loss, predictions, score_examples
from luthier.worker.loading import adapter_spec, prepare_data, public_name
from luthier.worker.progress import Progress
from luthier.worker.run_folder import RunFolder

SHARE_FOR_VALIDATION = 0.2
"""Validation losses on the way may cost this share of the training."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """What came of a run.

    Attributes:
        folder: The run folder.
        status: "done" or "failed".
        evaluation: What eval.json holds.
        result: What result.json holds: steps, tokens, seconds, memory, and why training stopped.
    """

    folder: Path
    status: str
    evaluation: dict[str, Any]
    result: dict[str, Any]

    @property
    def has_adapter(self) -> bool:
        """Whether the run made an adapter rather than a whole model."""
        return not (self.folder / RESULT_MODEL).exists()

    @property
    def tuned(self) -> Path:
        """Where the result stands."""
        return self.folder / ("adapter" if self.has_adapter else RESULT_MODEL)

    def to_json(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "status": self.status,
            "adapter" if self.has_adapter else "model": str(self.tuned),
            "evaluation": self.evaluation,
            "result": self.result,
        }


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


@dataclass
class Run:
    """One recipe's run. Made by `Run.begin`; `admit` gives it a slot and a job on a base."""

    recipe: Recipe
    folder: RunFolder
    renderer: Renderer
    data: PreparedData
    progress: Progress
    resumed: bool
    job: TrainingJob = field(init=False)
    base: Base = field(init=False)
    best: Best = field(default_factory=Best)
    stopped_because: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    scores: dict[str, list[RowScore]] = field(default_factory=dict)
    score_tokens: int = SCORE_TOKENS
    """Most tokens in one forward while scoring."""
    between: Callable[[], None] | None = None
    """Called between the forwards of an evaluation, for callers who have other work to see to."""
    writes_report: bool = True
    """Whether `finish` also writes the report and the card that people read."""
    last_validation: dict[str, float] = field(default_factory=dict)
    _saved_step: int = -1

    @classmethod
    def begin(cls, recipe: Recipe, base_folder: Path, progress: Progress, *, resume: bool) -> Run:
        """Check recipe and data, and open or create the run's folder, before the base is loaded."""
        renderer = Renderer.load(base_folder, recipe.method.new_tokens)
        has_run = RunFolder(Path(recipe.output)).has_state
        if resume and has_run:
            folder = RunFolder.open(recipe.output)
            folder.check_same(recipe)
        else:
            folder = RunFolder.create(recipe)
        started = time.perf_counter()
        progress.stage(f"Checking the data of {recipe.output}")
        data = prepare_data(recipe, renderer, folder.path / "data")
        folder.write_json("data.json", data.report.to_json())
        for warning in data.report.warnings:
            progress.note(warning, "warning")
        run = cls(recipe, folder, renderer, data, progress, resumed=resume and has_run)
        run._count_seconds("data", started)
        return run

    @property
    def name(self) -> str:
        return str(self.folder.path)

    def kept_result(self) -> RunResult | None:
        """The result of a run that was done before, or None where something is left to do."""
        values, result = self.folder.read_json("eval.json"), self.folder.read_json("result.json")
        has_weights = self.folder.adapter.exists() or self.folder.model.exists()
        is_done = self.resumed and self.folder.state()["status"] == "done" and has_weights
        # The card is written last.
        if not is_done or values is None or result is None or not (self.folder.path / "README.md").exists():
            return None
        return RunResult(self.folder.path, "done", values, result)

    # -- before training

    def admit(self, base: Base) -> TrainingJob:
        """Make the slot and the job: fresh, from an adapter, or from the last checkpoint.

        Raises:
            RecipeError: when the recipe's method does not fit the base, or the adapter to start from.
            ModelError: when the checkpoint belongs to another base.
        """
        self.base = base
        checkpoint = latest_checkpoint(self.folder.checkpoints) if self.resumed else None
        if isinstance(base, OwnBase):
            slot: Slot | OwnSlot = self._own_slot(base)
        else:
            slot = self._make_slot(base, fresh=checkpoint is None)
            check_writable(slot, base)
        self.job = TrainingJob(self.name, slot, self.data.train, self.recipe.train.spec())
        if checkpoint is not None:
            extra = load_checkpoint(checkpoint, self.job, base)
            self._check_base(extra)
            self._check_data(extra)
            self.best = Best(**extra["best"])
            self.seconds = {**extra["seconds"], **self.seconds}
            self.stopped_because = extra["stopped_because"]
            if self.stopped_because:
                self.job.state = "stopped"
            self._saved_step = self.job.step
            self.progress.note(f"{self.name} goes on from step {self.job.step}")
        self.folder.rewind_metrics(self.job.step)
        self._assert_trainable(slot)
        warmup = self.recipe.train.warmup_steps
        if warmup >= self.job.total_steps:
            self.progress.note(
                f"train.warmup_steps is {warmup:,} and the run has {self.job.total_steps:,} steps: "
                "the learning rate never reaches train.learning_rate",
                "warning",
            )
        return self.job

    def _make_slot(self, base: Base, *, fresh: bool) -> Slot:
        """The job's slot; with `fresh` false its values are loaded next, so that no start is computed."""
        labels = self.data.task.labels
        spec = adapter_spec(self.recipe, self.renderer, len(labels) or None)
        if self.recipe.start_from is None:
            return base.bank.add(spec, self.recipe.train.seed, fresh=fresh)
        start = Path(self.recipe.start_from)
        if spec.init != "default":
            raise RecipeError(
                f"method.init is {spec.init}, and start_from names an adapter, which has its values already",
                "one of the two",
                "set method.init: default, or leave start_from out",
            )
        slot = slot_from_adapter(
            base,
            start / "adapter" if (start / "adapter").exists() else start,
            spec.dropout,
            lora_plus_ratio=spec.lora_plus_ratio,
        )
        found, asked = _fit(slot.spec), _fit(spec)
        if found != asked:
            raise RecipeError(
                f"start_from: {start} is {found}",
                f"{asked}, as the recipe says",
                "set method (and the task) to what the adapter has",
            )
        self._check_start(start, slot, spec)
        return slot

    def _check_start(self, start: Path, slot: Slot, spec: AdapterSpec) -> None:
        """No part of the recipe's method is passed over in silence: the adapter has it, or the user hears of it."""
        bank = self.base.bank
        found: dict[str, set[Any]] = {
            "modules_to_save": set(slot.saved_modules),
            "new_tokens": set(slot.token_rows.ids_K.tolist()) if slot.token_rows is not None else set(),
        }
        wanted: dict[str, set[Any]] = {
            "modules_to_save": set(bank.resolve_modules(spec.modules_to_save)),
            "new_tokens": set(spec.new_tokens),
        }
        for name, has in found.items():
            if has != wanted[name] and (name == "new_tokens" or wanted[name] - has):
                raise RecipeError(
                    f"start_from: {start} has {sorted(has) or 'none'} where method.{name} asks for "
                    f"{sorted(wanted[name]) or 'none'}",
                    "the modules and tokens that the adapter was trained with",
                    f"set method.{name} as it was when the adapter was trained",
                )
        other = []
        if (slot.spec.alpha, slot.spec.rank_stabilized) != (spec.alpha, spec.rank_stabilized):
            other.append(f"alpha {slot.spec.alpha:g}{' (rank-stabilized)' if slot.spec.rank_stabilized else ''}")
        if set(slot.adapters) != set(bank.resolve_targets(spec)):
            other.append("targets " + ", ".join(sorted({name.rsplit(".", 1)[-1] for name in slot.adapters})))
        if found["modules_to_save"] != wanted["modules_to_save"]:
            other.append("modules_to_save " + ", ".join(sorted(slot.saved_modules)))
        if other:
            text = "; ".join(other)
            self.progress.note(f"{self.name} goes on with what {start} has, not the recipe: {text}", "warning")

    def exclusive_spec(self) -> ExclusiveSpec:
        """What an exclusive method does, with what the data and the schedule add."""
        steps = total_steps(len(self.data.train), self.recipe.train.spec())
        labels = self.data.task.labels
        return replace(exclusive_spec(self.recipe.method), num_classes=len(labels) or None, total_steps=steps)

    def _own_slot(self, base: OwnBase) -> OwnSlot:
        if self.recipe.start_from is not None:
            assert isinstance(base, PeftBase), "own weights go on from a base, as was said before loading"
            start = Path(self.recipe.start_from)
            base.start_from(start / "adapter" if (start / "adapter").exists() else start)
        return base.slot

    def _check_base(self, extra: dict[str, Any]) -> None:
        now = self._base_identity()
        if extra["base"] != now:
            raise ModelError(
                f"{self.name} was trained on weights {extra['base'][:12]}, and the base here is {now[:12]}",
                "the same base",
                "name in `base` the model that the run began with",
            )

    def _check_data(self, extra: dict[str, Any]) -> None:
        if extra["data"] != self.data.data_hash:
            raise RunError(
                f"{self.name} was trained on other data: its files have changed since it began",
                "the same rows, so that the resumed run equals an uninterrupted one",
                "put the files back as they were, or start a new run with another `output`",
            )

    def _base_identity(self) -> str:
        assert self.base.folder is not None
        return weights_identity(self.base.folder)

    def _assert_trainable(self, slot: Slot | OwnSlot) -> None:
        """What is trainable is counted, said and asserted: no method is ever ignored in silence."""
        count = slot.num_trainable_parameters
        assert count > 0, "a slot without anything to train"
        assert not any(p.requires_grad for p in self.base.frozen_parameters()), "the base must stay frozen"
        share = 100.0 * count / self.base.num_parameters
        parts = slot.parts()
        report = self.data.report.train
        self.progress.facts(
            self.name,
            [
                ("method", self.recipe.method.type + ": " + ", ".join(parts)),
                ("trainable", f"{count:,} parameters ({share:.2f}% of the base's {self.base.num_parameters:,})"),
                (
                    "data",
                    f"{report.num_rows:,} rows, {report.num_tokens:,} tokens, "
                    f"{report.num_supervised_tokens:,} of them supervised",
                ),
                ("steps", f"{self.job.total_steps:,} of {self.recipe.train.batch_size} examples"),
            ],
        )

    # -- judging

    def plan_judging(self) -> None:
        """Choose the held-out rows for the judgement and for the losses on the way."""
        settings, spec = self.recipe.evaluation, self.recipe.train
        held_out = self.data.validation
        lengths = held_out.num_tokens if held_out is not None else np.zeros(0)
        num_rows = len(self.data.validation_records) if self.data.validation_records is not None else 0
        epochs = self.job.total_steps / self.job.steps_per_epoch
        self.train_tokens = float(self.data.train.num_tokens.sum()) * epochs
        row_tokens = float(lengths.sum()) / max(1, num_rows)
        budget = choose_budget(
            num_held_out=num_rows,
            train_tokens=self.train_tokens,
            row_tokens=row_tokens,
            reply_tokens=min(settings.max_new_tokens, row_tokens),
            num_models=2 + (settings.shots > 0),
            rows=settings.rows,
            generate_rows=settings.generate_rows,
            generates=settings.generate,
        )
        if num_rows == 0:
            budget = JudgingBudget(0, 0)
        self.judge = Judge(
            self.base,
            self.renderer,
            self.data,
            budget,
            max_new_tokens=settings.max_new_tokens,
            seed=spec.seed,
            on_rows=lambda what, done, total: self.progress.evaluation(self.name, what, done, total),
            score_tokens=self.score_tokens,
            between=self.between,
        )
        self.evaluate_every = settings.every or max(1, self.job.steps_per_epoch // 2)
        num_evaluations = max(1, self.job.total_steps // self.evaluate_every)
        allowance = SHARE_FOR_VALIDATION * 2.0 * self.train_tokens / num_evaluations
        most = max(1, int(allowance / max(1.0, row_tokens)))
        rows: set[int] = set()
        if self.data.validation_records is not None:
            rows = {int(self.data.validation_records.rows[i]) for i in self.judge.at[:most]}
        self.validation = examples_of_rows(held_out, rows) if held_out is not None and rows else []

    def judge_base(self) -> None:
        """Judge the base before training, once; a resumed run remembers."""
        if not self.judge.at:
            return
        # A head has no untrained counterpart in the base: what it gives before training stands for it.
        slot = self.job.slot.index if self.job.slot.head is not None else BASE_SLOT
        self._judge("base", slot)
        shots = self.recipe.evaluation.shots
        if shots and self.data.task.generates and self.judge.generated_at:
            self._judge(f"base_{shots}_shot", BASE_SLOT, shots)

    def _judge(self, who: str, slot: int, num_shots: int = 0) -> None:
        started = time.perf_counter()
        kept = self.folder.read_scores(who)
        if kept is None:
            kept = self.judge.scores(slot, who.replace("_", " "), num_shots)
            self.folder.write_scores(who, kept)
        self.scores[who] = kept
        self._count_seconds("judging", started)

    # -- while training

    def on_step(self, report: StepReport) -> None:
        """Write the step down, and evaluate, save or stop where it is time."""
        rate = report.num_tokens / max(report.seconds, 1e-9)
        self.seconds["training"] = self.seconds.get("training", 0.0) + report.seconds
        self.folder.append_metric(
            kind="step",
            step=report.step,
            epoch=round(report.epoch, 4),
            loss=report.loss,
            learning_rate=report.learning_rate,
            grad_norm=report.grad_norm,
            num_tokens=report.num_tokens,
            num_supervised_tokens=report.num_supervised_tokens,
            seconds=round(report.seconds, 4),
            tokens_per_second=round(rate, 1),
        )
        self.progress.step(self.name, report.step, report.loss, rate, report.learning_rate)
        is_last = not self.job.is_active
        if self.validation and (is_last or report.step % self.evaluate_every == 0):
            self._validate(report.step)
        every = self.recipe.train.checkpoint_every or self.evaluate_every
        if is_last or self.best.step == report.step or report.step % every == 0 or self.stopped_because:
            self.save()

    def _validate(self, step: int) -> None:
        started = time.perf_counter()
        between = self.between
        on_done = (lambda done: None) if between is None else (lambda done: between())
        values = mean_loss(score_examples(self.base, self.validation, self.job.slot.index, on_done, self.score_tokens))
        self.last_validation = {"step": step, **values}
        self.folder.append_metric(kind="evaluation", step=step, **values)
        self.best.take(step, values["loss"])
        patience = self.recipe.train.early_stopping
        if patience is not None and self.best.num_evaluations_since >= patience and self.job.is_active:
            self.stopped_because = (
                f"no better validation loss in {patience} evaluations; the best was {self.best.loss:.4f} "
                f"at step {self.best.step}"
            )
            self.job.state = "stopped"
        self._count_seconds("validation", started)

    def save(self) -> None:
        """Save a checkpoint of the last whole step, unless there is one; keep the last and the best."""
        step = self.job.step
        if step == self._saved_step or step == 0:
            return
        extra = {
            "base": self._base_identity(),
            "data": self.data.data_hash,
            "best": {
                "step": self.best.step,
                "loss": self.best.loss,
                "num_evaluations_since": self.best.num_evaluations_since,
            },
            "seconds": self.seconds,
            "stopped_because": self.stopped_because,
        }
        save_checkpoint(self.folder.checkpoints, self.job, self.base, extra, **self._adapter_facts())
        self._saved_step = step
        prune(self.folder.checkpoints, keep={step, self.best.step})

    def interrupt(self) -> None:
        """Save where the run stands, to be resumed."""
        self.job.restart_step()
        self.save()
        self.folder.set_state("interrupted", step=self.job.step)

    # -- after training

    def finish(self, peak_memory_bytes: int, device: str) -> RunResult:
        """Keep the best, write the adapter, judge it, and write everything that people read."""
        kept_step = self._keep_best()
        self._write_result()
        if self.job.state != "failed" and self.judge.at:
            (self.folder.path / "scores" / "tuned.json").unlink(missing_ok=True)
            self._judge("tuned", self.job.slot.index)
        values = evaluation(self.scores) if self.scores else {"num_rows": 0, "base": {}, "tuned": {}}
        self.folder.write_json("eval.json", values)
        lines = predictions(self.scores, self.judge.prompt_texts(), self.data.task.labels)
        write_text(self.folder.path / "predictions.jsonl", _json_lines(lines))
        result = self._result(kept_step, peak_memory_bytes, device)
        self.folder.write_json("result.json", result)
        status = "failed" if self.job.state == "failed" else "done"
        self.folder.set_state(status, step=self.job.step, problem=self.job.problem)
        if self.writes_report:
            write_report(self.folder.path)
            write_card(self.folder.path)
        self.progress.finish(
            self.name, self.job.problem or f"{self.job.step} steps, {result['num_trained_tokens']:,} tokens"
        )
        return RunResult(self.folder.path, status, values, result)

    def _keep_best(self) -> int:
        """Put the kept checkpoint's values into the slot; the step it is of."""
        wants_best = self.recipe.train.keep_best and self.best.loss is not None
        is_last_best = not wants_best or self.best.step == self.job.step
        if is_last_best and self.job.state != "failed":
            return self.job.step
        checkpoint = (
            checkpoint_folder(self.folder.checkpoints, self.best.step)
            if wants_best and self.best.step
            else latest_checkpoint(self.folder.checkpoints)
        )
        if checkpoint is None:
            return 0
        read_slot(self.job.slot, self.base, checkpoint)
        return step_of(checkpoint)

    def _write_result(self) -> None:
        result = self.folder.tuned(self.recipe)
        if result.exists():
            return
        with atomic_folder(result) as temporary:
            if isinstance(self.base, OwnBase):
                write_result(self.base, temporary, **self._adapter_facts())
            else:
                write_slot(self.job.slot, self.base, temporary, **self._adapter_facts())
            self.renderer.save(temporary)

    def _adapter_facts(self) -> dict[str, Any]:
        return {
            "base_name": public_name(self.recipe.base),
            "labels": list(self.data.task.labels) or None,
            "pad_token_id": self.renderer.pad_id,
        }

    def _result(self, kept_step: int, peak_memory_bytes: int, device: str) -> dict[str, Any]:
        seconds = self.seconds.get("training", 0.0)
        return {
            "status": self.job.state,
            "num_steps": self.job.step,
            "total_steps": self.job.total_steps,
            "best_step": kept_step,
            "best_validation_loss": self.best.loss,
            "stopped_because": self.job.problem or self.stopped_because or "all steps done",
            "num_trained_tokens": self.job.num_tokens_done,
            "tokens_per_second": round(self.job.num_tokens_done / seconds, 1) if seconds else None,
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
            "peak_memory_bytes": peak_memory_bytes,
            "num_trainable_parameters": self.job.slot.num_trainable_parameters,
            "num_base_parameters": self.base.num_parameters,
            "micro_batch_tokens": self.job.micro_batch_tokens,
            "device": device,
            "base_sha256": self._base_identity(),
            "base_quantization": self.base.quantization,
            "base_dtype": str(self.base.dtype).removeprefix("torch."),
            "data_sha256": self.data.data_hash,
        }

    def _count_seconds(self, phase: str, started: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started


def _json_lines(lines: list[dict[str, Any]]) -> str:
    import json

    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _fit(spec: AdapterSpec) -> str:
    """What an adapter must have in common with the recipe that goes on from it."""
    size = METHODS[spec.method].describe(replace(spec, lora_plus_ratio=1.0))  # how it learns may change
    return ", ".join(part for part in (spec.method, size, f"{spec.num_classes or 'no'} classes") if part)
