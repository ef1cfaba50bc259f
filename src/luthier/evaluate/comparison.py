"""Several methods on one recipe, side by side: read from their run folders, as a table and in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from luthier.evaluate.record import RunRecord, read_run
from luthier.evaluate.summary import (
    PRIMARY,
    format_bytes,
    format_score,
    label,
    score_of,
    verdict,
)

NO_METRIC = "score"


@dataclass(frozen=True, slots=True)
class MethodRow:
    """What one method took and gave.

    Attributes:
        method: Its name.
        folder: Its run folder.
        learning_rate: The peak rate that it was trained with.
        problem: Why it failed, or empty.
        num_trainable_parameters: Trained values.
        saved_bytes: Of the result's weight files.
        peak_memory_bytes: The most that its process held, judging included: on the GPU, or resident on a CPU.
        tokens_per_second: The median over its steps.
        num_steps, num_trained_tokens: Of its training.
        data_sha256: What it was trained on.
        evaluation: What its eval.json holds; empty where it has none.
    """

    method: str
    folder: str
    learning_rate: float
    problem: str = ""
    num_trainable_parameters: int | None = None
    saved_bytes: int | None = None
    peak_memory_bytes: int | None = None
    tokens_per_second: float | None = None
    num_steps: int | None = None
    num_trained_tokens: int | None = None
    data_sha256: str | None = None
    evaluation: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "status": "failed" if self.problem else "done"}


def read_row(method: str, run: Path, learning_rate: float, problem: str = "") -> MethodRow:
    """A method's row, from what its run folder holds; of one that failed, nothing but the reason."""
    if problem:
        return MethodRow(method, str(run), learning_rate, problem)
    record = read_run(run)
    rates = [step["tokens_per_second"] for step in record.steps if "tokens_per_second" in step]
    return MethodRow(
        method,
        str(run),
        learning_rate,
        num_trainable_parameters=record.result.get("num_trainable_parameters"),
        saved_bytes=sum(path.stat().st_size for path in (run / record.result_folder).rglob("*.safetensors")),
        peak_memory_bytes=record.result.get("peak_memory_bytes"),
        tokens_per_second=median(rates) if rates else None,
        num_steps=record.result.get("num_steps"),
        num_trained_tokens=record.result.get("num_trained_tokens"),
        data_sha256=record.result.get("data_sha256"),
        evaluation=record.evaluation,
    )


def common_metric(rows: Sequence[MethodRow]) -> str | None:
    """The first of the headline's metrics that every finished row has for base and tuned model; None for none."""
    done = [row for row in rows if not row.problem]
    for metric in PRIMARY:
        if done and all(score_of(row.evaluation, who, metric) for row in done for who in ("base", "tuned")):
            return metric
    return None


def method_table(rows: Sequence[MethodRow]) -> list[list[str]]:
    """Rows of plain text, the header first: what each method took, and the score of base and tuned model."""
    metric = common_metric(rows)
    name = label(metric).lower() if metric else NO_METRIC
    header = ["method", "learning rate", "trainable", "saved", "peak memory", "tokens/s"]
    return [[*header, f"base {name}", f"tuned {name}", "verdict"], *(_cells(row, metric) for row in rows)]


def _cells(row: MethodRow, metric: str | None) -> list[str]:
    start = [row.method, f"{row.learning_rate:g}"]
    if row.problem:
        return [*start, *["-"] * 6, "failed"]
    scores = (
        [format_score(metric, score_of(row.evaluation, who, metric)) for who in ("base", "tuned")] if metric else []
    )
    return [
        *start,
        "-" if row.num_trainable_parameters is None else f"{row.num_trainable_parameters:,}",
        "-" if row.saved_bytes is None else format_bytes(row.saved_bytes),
        "-" if row.peak_memory_bytes is None else format_bytes(row.peak_memory_bytes),
        "-" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
        *(scores or ["-", "-"]),
        (verdict(row.evaluation, metric) if metric else None) or "-",
    ]


def facts(rows: Sequence[MethodRow]) -> list[str]:
    """What all finished rows have in common, a sentence each: data, budget, machine, packages, date."""
    done = [row for row in rows if not row.problem]
    if not done:
        return []
    record = read_run(Path(done[0].folder))
    return [_budget(record, done[0]), _held_out(record, done), _machine(record, done)]


def _budget(record: RunRecord, row: MethodRow) -> str:
    train = record.data.get("train", {})
    batch_size = record.recipe.get("train", {}).get("batch_size")
    return (
        f"{record.recipe.get('base')}, task {record.task}: {train.get('num_rows', 0):,} training rows, "
        f"{row.num_steps:,} steps of {batch_size} examples, {row.num_trained_tokens:,} tokens."
    )


def _held_out(record: RunRecord, rows: Sequence[MethodRow]) -> str:
    num_rows = record.evaluation.get("num_rows", 0)
    if not num_rows:
        return "Nothing was judged."
    judged = f"Judged on {num_rows:,} held-out rows; intervals are of 95%."
    apart = sorted(row.method for row in rows if _quantization(row) == "nf4")
    return judged + (f" The base of {', '.join(apart)} is held in NF4." if apart else "")


def _quantization(row: MethodRow) -> str | None:
    found = read_run(Path(row.folder)).result.get("base_quantization")
    return str(found) if found else None


def _machine(record: RunRecord, rows: Sequence[MethodRow]) -> str:
    versions = ", ".join(
        f"{name} {record.versions[name]}"
        for name in ("luthier", "torch", "transformers", "peft")
        if name in record.versions
    )
    newest = max((Path(row.folder) / "result.json").stat().st_mtime for row in rows)
    dtype = record.result.get("base_dtype")
    return f"{record.result.get('device')}, {dtype}; {versions}; {date.fromtimestamp(newest).isoformat()}."


def markdown(rows: Sequence[MethodRow], chart: str | None = None) -> str:
    """The comparison as a page: the table, why methods failed, and what all have in common.

    Args:
        chart: A picture's path as the page should name it.
    """
    header, *cells = method_table(rows)
    lines = ["# Methods compared", "", *facts(rows), ""]
    lines += ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in cells]
    lines += ["", *(f"- {row.method} failed: {_one_line(row.problem)}" for row in rows if row.problem)]
    lines += ["", f"![What each method takes and gives]({chart})"] if chart else []
    return "\n".join(lines).rstrip() + "\n"


def _one_line(text: str) -> str:
    return " ".join(text.split())
