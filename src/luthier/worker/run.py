"""One recipe on its way from data to a judged adapter: everything of a job that the engine does not know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

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
from luthier.checkpoints.peft_format import check_writable
from luthier.checkpoints.slot_files import read_slot, write_slot
from luthier.data.prepare import PreparedData
from luthier.data.template import Renderer
from luthier.engine.job import StepReport, TrainingJob, total_steps
from luthier.engine.own import OwnSlot
from luthier.engine.pack import BASE_SLOT
from luthier.engine.ranks import ALONE, Ranks, check_alike, wait_for_all
from luthier.engine.scoring import SCORE_TOKENS
from luthier.engine.slot import Slot
from luthier.errors import ModelError, RunError
from luthier.evaluate.card import write_card
from luthier.extras import require_for_scoring
from luthier.files import atomic_folder
from luthier.methods.config import exclusive_spec
from luthier.recipe import Recipe
from luthier.tasks.registry import task_for
from luthier.types import ExclusiveSpec
from luthier.worker.exhibits import write_exhibits
from luthier.worker.judging import Best, Judging, counted
from luthier.worker.loading import adapter_spec, head_fields, prepare_data, public_name
from luthier.worker.method_fit import check_for_encoder
from luthier.worker.progress import Progress
from luthier.worker.reference import with_reference
from luthier.worker.result import RunResult, kept_result
from luthier.worker.run_folder import RunFolder
from luthier.worker.start import started_own_slot, started_slot
from luthier.worker.verify import check_result
from luthier.worker.zero import optimizer_maker


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
    judging: Judging = field(init=False)
    best: Best = field(default_factory=Best)
    stopped_because: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    score_tokens: int = SCORE_TOKENS
    """Most tokens in one forward while scoring."""
    between: Callable[[], None] | None = None
    """Called between the forwards of an evaluation, for callers who have other work to see to."""
    writes_report: bool = True
    """Whether `finish` also writes the report and the card that people read."""
    ranks: Ranks = ALONE
    """The processes that train it together. This one writes; the others have a `FollowingRun`."""
    last_validation: dict[str, float] = field(default_factory=dict)
    _saved_step: int = -1

    @classmethod
    def begin(cls, recipe: Recipe, base_folder: Path, progress: Progress, *, resume: bool) -> Run:
        """Check recipe and data, and open or create the run's folder, before the base is loaded."""
        require_for_scoring(recipe.task.type, task_for(recipe.task).needs)
        check_for_encoder(recipe, base_folder)
        renderer = Renderer.load(base_folder, recipe.method.new_tokens)
        has_run = RunFolder(Path(recipe.output)).has_state
        if resume and has_run:
            folder = RunFolder.open(recipe.output)
            folder.check_same(recipe)
        else:
            folder = RunFolder.create(recipe)
        seconds: dict[str, float] = {}
        progress.stage(f"Checking the data of {recipe.output}")
        with counted(seconds, "data"):
            data = prepare_data(recipe, renderer, folder.path / "data")
            folder.write_json("data.json", data.report_json())
        for warning in data.report.warnings:
            progress.note(warning, "warning")
        return cls(recipe, folder, renderer, data, progress, resumed=resume and has_run, seconds=seconds)

    @property
    def name(self) -> str:
        return str(self.folder.path)

    def kept_result(self) -> RunResult | None:
        """The result of a run that was done before, or None where something is left to do."""
        return kept_result(self.folder) if self.resumed else None

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
            slot: Slot | OwnSlot = started_own_slot(base, self.recipe.start_from)
        else:
            slot = self._make_slot(base, fresh=checkpoint is None)
            check_writable(slot, base)
        if self.data.task.objective == "preference":
            self._settle_reference(slot)  # before a checkpoint's values come into the slot
        make = optimizer_maker(self.recipe, base, slot, self.ranks, self.progress.note)
        self.job = TrainingJob(self.name, slot, self.data.examples, self.recipe.train.spec(), make)
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
        spec = adapter_spec(self.recipe, self.renderer, self.data.task)
        if self.recipe.start_from is None:
            return base.bank.add(spec, self.recipe.train.seed, fresh=fresh)
        return started_slot(base, self.recipe.start_from, spec, self.name, self.progress)

    def _settle_reference(self, slot: Slot | OwnSlot) -> None:
        self._ask_reference(slot)
        wait_for_all(self.ranks)  # they read what this one has written

    def _ask_reference(self, slot: Slot | OwnSlot) -> None:
        """Give every pair what the model makes of it that training begins from."""
        between = self.between or (lambda: None)

        def note(done: int, total: int) -> None:
            self.progress.evaluation(self.name, "reference", done, total)
            between()

        start = self.recipe.start_from
        with counted(self.seconds, "reference"):
            self.data = with_reference(
                self.data,
                self.base,
                BASE_SLOT if start is None else slot.index,
                self.folder.path,
                start,
                on_pairs=note,
                max_tokens=self.score_tokens,
            )

    def exclusive_spec(self) -> ExclusiveSpec:
        """What an exclusive method does, with what the data and the schedule add."""
        steps = total_steps(len(self.data.examples), self.recipe.train.spec())
        return replace(exclusive_spec(self.recipe.method), total_steps=steps, **head_fields(self.data.task))

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
                    f"{report.num_supervised_tokens:,} of them supervised" + self._replayed(),
                ),
                ("steps", f"{self.job.total_steps:,} of {self.recipe.train.batch_size} examples"),
            ],
        )

    def _replayed(self) -> str:
        mixed = self.data.mixed
        if mixed is None:
            return ""
        share = 100.0 * mixed.num_replayed_tokens / mixed.total_tokens
        return f"; with {mixed.num_replayed_tokens:,} replayed tokens ({share:.1f}% of all)"

    def plan_judging(self) -> None:
        """Choose the held-out rows for the judgement and for the losses on the way."""
        self.judging = Judging(
            self.recipe,
            self.folder,
            self.renderer,
            self.data,
            self.progress,
            self.seconds,
            self.base,
            self.job,
            score_tokens=self.score_tokens,
            between=self.between,
            ranks=self.ranks,
        )

    def judge_base(self) -> None:
        """Judge the base before training, once; a resumed run remembers."""
        self.judging.judge_base()

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
        if self.judging.validation and (is_last or report.step % self.judging.evaluate_every == 0):
            with counted(self.seconds, "validation"):
                self._validate(report.step)
        every = self.recipe.train.checkpoint_every or self.judging.evaluate_every
        if is_last or self.best.step == report.step or report.step % every == 0 or self.stopped_because:
            self.save()

    def _validate(self, step: int) -> None:
        values = self.judging.validate(step)
        self.last_validation = {"step": step, **values}
        self.best.take(step, values["loss"])
        patience = self.recipe.train.early_stopping
        if patience is not None and self.best.num_evaluations_since >= patience and self.job.is_active:
            self.stopped_because = (
                f"no better validation loss in {patience} evaluations; the best was {self.best.loss:.4f} "
                f"at step {self.best.step}"
            )
            self.job.state = "stopped"

    def save(self) -> None:
        """Save a checkpoint of the last whole step, unless there is one; keep the last and the best."""
        step = self.job.step
        if step == self._saved_step or step == 0:
            return
        self.check_replicas()
        with self.job.optimizer.consolidated() as whole:
            if isinstance(self.job.slot, OwnSlot):
                self.job.slot.whole = whole
            self._write_checkpoint(step)
        self._saved_step = step

    def check_replicas(self) -> None:
        """Hold what this process trains against what the others do.

        Raises:
            RunError: when they differ.
        """
        check_alike(self.ranks, self.job.optimizer.pieces(), f"what {self.name} has learnt by step {self.job.step}")

    def _write_checkpoint(self, step: int) -> None:
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
        prune(self.folder.checkpoints, keep={step, self.best.step})

    def interrupt(self) -> None:
        """Save where the run stands, to be resumed."""
        self.job.restart_step()
        self.save()
        self.folder.set_state("interrupted", step=self.job.step, total_steps=self.job.total_steps)

    # -- after training

    def finish(self, peak_memory_bytes: int, device: str) -> RunResult:
        """Keep the best, write the adapter, judge it, and write everything that people read."""
        kept_step = self._keep_best()
        self._write_result()
        if self.recipe.compute.zero:
            check_result(self)
        if self.job.state != "failed":
            self.judging.judge_tuned()
        values = self.judging.write()
        result = self._result(kept_step, peak_memory_bytes, device)
        self.folder.write_json("result.json", result)
        status = "failed" if self.job.state == "failed" else "done"
        at = {"step": self.job.step, "total_steps": self.job.total_steps}
        self.folder.set_state(status, **at, problem=self.job.problem)
        if self.writes_report:
            from luthier.evaluate.report import write_report  # only now: it loads matplotlib

            write_exhibits(self.folder, self.data.task, self.judging.judge.record_of, self.judging.scores)
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
            "labels": list(self.data.task.outputs) or None,
            "pad_token_id": self.renderer.pad_id,
            "threshold": self.data.task.threshold,
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
            "num_processes": self.ranks.size,
            "base_sha256": self._base_identity(),
            "base_quantization": self.base.quantization,
            "base_dtype": str(self.base.dtype).removeprefix("torch."),
            "data_sha256": self.data.data_hash,
        }
