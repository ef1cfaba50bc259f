"""RUN/report.html: one page, whole in itself, that says whether the model got better and what it cost.

No script, no font, no picture from elsewhere: the page opens the same from a mail, a share or an air-gapped machine.
Everything that comes from the data is escaped.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from luthier.evaluate import figures, samples, summary
from luthier.evaluate.card import loading_code
from luthier.evaluate.metrics import MIN_ROWS_FOR_VERDICT
from luthier.evaluate.pictures import read_pictures
from luthier.evaluate.record import RunRecord, read_run
from luthier.files import write_text

MAX_LISTED_ROWS = 200
"""Held-out rows in the list at the end; all of them are in predictions.jsonl."""

_PART_NAMES = {
    "supervised_tokens": "tokens that carry loss",
    "cut": "rows cut to max_length",
    "dropped": "rows left out for their length",
}
_METHOD_NAMES = {"lora": "LoRA", "dora": "DoRA", "ia3": "(IA)³"}
_FINE_STOPS = {"", "all steps done", "finished"}


def write_report(run: Path) -> Path:
    """Render RUN/report.html from what the run folder holds; parts that are missing are said to be missing.

    Returns:
        The path of the report, written atomically: an earlier one stays whole until the new one is.

    Raises:
        RunError: if there is no such folder.
        StorageError: if the report cannot be written.
    """
    record = read_run(run)
    path = record.path / "report.html"
    write_text(path, render(record))
    return path


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["count"] = summary.format_count
    return environment.from_string(files("luthier.evaluate").joinpath("report.html.jinja").read_text("utf-8"))


def render(record: RunRecord) -> str:
    """The page as text."""
    return _template().render(
        min_rows=MIN_ROWS_FOR_VERDICT,
        title=summary.headline(record.evaluation) or "Not judged on held-out rows",
        run=record.shown_path,
        subtitle=_subtitle(record),
        stopped=_stopped(record),
        notes=record.notes,
        hero=_hero(record.evaluation),
        scores=_scores(record.evaluation),
        groups=_groups(record.evaluation),
        kept=_scores(record.evaluation.get("replay") or {}),
        num_kept_rows=(record.evaluation.get("replay") or {}).get("num_rows"),
        num_rows=record.evaluation.get("num_rows"),
        outcomes=samples.outcomes(record.predictions),
        listed=[samples.sample(line) for line in record.predictions[:MAX_LISTED_ROWS]],
        num_predictions=len(record.predictions),
        confusion=_confusion(record),
        pictures=read_pictures(record),
        curves=_curves(record),
        cost=_cost(record),
        phases=_phases(record),
        data=_data(record.data),
        recipe=record.recipe_text,
        versions=list(_leaves(record.versions)),
        loading=loading_code(record),
        parts=_parts(record.evaluation),
        part_noun="label" if record.is_multilabel else "type",
        signatures=sorted((record.evaluation.get("signatures") or {}).items()),
        has_head=record.has_head,
        is_preference=record.is_preference,
    )


def _subtitle(record: RunRecord) -> list[str]:
    method = record.recipe.get("method")
    rank = method.get("rank") if isinstance(method, dict) else None
    method_text = _METHOD_NAMES.get(record.method, record.method) + (f", rank {rank}" if rank else "")
    seconds = _total_seconds(record)
    device = record.cost.get("device")
    parts = [
        _base_name(record),
        record.task,
        method_text,
        f"{record.steps[-1]['step']:,} steps" if record.steps else "",
        summary.format_seconds(seconds) if seconds else "",
        f"on {device}" if device else "",
    ]
    return [part for part in parts if part]


def _base_name(record: RunRecord) -> str:
    return Path(str(record.recipe.get("base", ""))).name


def _stopped(record: RunRecord) -> str | None:
    """Why training ended, where that is worth a warning."""
    reason = record.result.get("stopped_because")
    if not reason or str(reason) in _FINE_STOPS:
        return None
    advice = record.result.get("advice")
    return f"Training stopped: {reason}" + (f". {advice}" if advice else "")


def _hero(evaluation: Mapping[str, Any]) -> dict[str, Any] | None:
    line = summary.headline(evaluation)
    if line is None:
        return None
    metric = summary.primary_metric(evaluation)
    assert metric is not None  # there is a headline
    what, _, values = line.partition(": ")
    others = [
        f"{_few_shot_label(name)}: {summary.format_score(metric, score)}"
        for name in summary.model_names(evaluation)
        if name not in ("base", "tuned", "reference") and (score := summary.score_of(evaluation, name, metric))
    ]
    change = (evaluation.get("comparison") or {}).get(metric)
    return {
        "what": what,
        "values": values.split(" → "),
        "verdict": summary.verdict(evaluation),
        "change": summary.format_change(metric, change) if change else None,
        "others": others,
    }


def _few_shot_label(name: str) -> str:
    return summary.model_label(name).replace("base, ", "Base with ") + " in its prompt"


def _scores(evaluation: Mapping[str, Any]) -> dict[str, Any] | None:
    models = summary.model_names(evaluation)
    if not models:
        return None
    compared = evaluation.get("comparison") or {}
    rows = []
    for metric in summary.metric_names(evaluation):
        change = compared.get(metric)
        difference, _, interval = summary.format_change(metric, change).partition(" (")
        rows.append(
            {
                "label": summary.label(metric),
                "is_lower_better": metric in ("loss", "perplexity"),
                "cells": [_cell(metric, summary.score_of(evaluation, name, metric)) for name in models],
                "difference": difference,
                "interval": interval.rstrip(")"),
                "verdict": change.get("verdict") if change else None,
            }
        )
    return {"models": [summary.model_label(name) for name in models], "rows": rows, "is_compared": bool(compared)}


def _cell(metric: str, score: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if score is None:
        return None
    bar = None
    if summary.is_share(metric) and score["low"] is not None and score["value"] is not None:
        low, value, high = (100.0 * float(score[key]) for key in ("low", "value", "high"))
        bar = {"left": f"{low:.1f}", "width": f"{max(high - low, 0.5):.1f}", "at": f"{value:.1f}"}
    return {
        "value": summary.format_value(metric, score["value"]),
        "interval": summary.format_interval(metric, score),
        "rows": score["rows"],
        "bar": bar,
    }


def _groups(evaluation: Mapping[str, Any]) -> dict[str, Any] | None:
    """The headline's metric for each kind of row, where rows have kinds."""
    metric, groups = summary.primary_metric(evaluation), evaluation.get("groups")
    if metric is None or not isinstance(groups, Mapping):
        return None
    models = summary.model_names(evaluation)
    rows = [
        {"name": name, "cells": [_cell(metric, summary.score_of(scores, model, metric)) for model in models]}
        for name, scores in groups.items()
    ]
    return {"metric": summary.label(metric), "models": [summary.model_label(m) for m in models], "rows": rows}


def _parts(evaluation: Mapping[str, Any]) -> dict[str, Any] | None:
    """Precision, recall and F1 of each type of thing within rows: the tuned model's, and the base's F1."""
    parts = evaluation.get("parts")
    if not isinstance(parts, Mapping):
        return None
    columns = (("base", "f1"), ("tuned", "f1"), ("tuned", "precision"), ("tuned", "recall"))
    rows = [
        {"name": name, "cells": [_cell(metric, summary.score_of(scores, model, metric)) for model, metric in columns]}
        for name, scores in parts.items()
    ]
    return {"columns": [f"{model}: {summary.label(metric)}" for model, metric in columns], "rows": rows}


def _confusion(record: RunRecord) -> dict[str, Any] | None:
    if not record.is_classification or record.is_multilabel:
        return None
    names, matrix_CC = samples.confusion(record.predictions)
    if not names:
        return None
    shown, part_CC = samples.most_mistaken(names, matrix_CC, figures.MAX_MATRIX_CLASSES)
    return {
        "picture": Markup(figures.confusion_matrix(part_CC, shown)),
        "num_shown": len(shown),
        "pairs": samples.confused_pairs(names, matrix_CC),
        "num_classes": len(names),
    }


def _curves(record: RunRecord) -> dict[str, Markup | None]:
    best_step = record.cost.get("best_step")
    best_step = best_step if isinstance(best_step, int) and best_step > 0 else None
    unit = "nats a token"
    for is_so, other in (
        (record.has_head, "nats a row"),
        (record.is_tagging, "nats a word"),
        (record.is_preference, "nats a pair"),
    ):
        unit = other if is_so else unit
    pictures = {
        "loss": figures.loss_curves(record.steps, record.evaluations, best_step, unit),
        "learning_rate": figures.small_curve(record.steps, "learning_rate", "Learning rate"),
        "grad_norm": figures.small_curve(record.steps, "grad_norm", "Gradient norm"),
    }
    # Our own SVG, in which matplotlib escaped every text.
    return {name: Markup(picture) if picture else None for name, picture in pictures.items()}


def _phase_seconds(record: RunRecord) -> dict[str, float]:
    for name in ("seconds", "phases", "seconds_by_phase"):
        phases = record.cost.get(name)
        if isinstance(phases, dict):
            return {str(phase): float(seconds) for phase, seconds in phases.items() if phase != "total"}
    return {}


def _total_seconds(record: RunRecord) -> float:
    seconds = record.cost.get("seconds")
    if isinstance(seconds, dict) and "total" in seconds:
        return float(seconds["total"])
    if isinstance(seconds, int | float):
        return float(seconds)
    return sum(_phase_seconds(record).values())


def _phases(record: RunRecord) -> list[dict[str, str]]:
    phases = _phase_seconds(record)
    total = sum(phases.values())
    if not total:
        return []
    return [
        {
            "name": name.replace("_", " "),
            "time": summary.format_seconds(seconds),
            "percent": f"{100 * seconds / total:.1f}",
        }
        for name, seconds in phases.items()
    ]


def _cost(record: RunRecord) -> list[tuple[str, str, str]]:
    """Tiles of (what, how much, in what relation)."""
    cost, tiles = record.cost, []
    if seconds := _total_seconds(record):
        tiles.append(("Time", summary.format_seconds(seconds), f"on {cost['device']}" if cost.get("device") else ""))
    if num_tokens := cost.get("num_trained_tokens"):
        tiles.append(("Tokens trained on", summary.format_count(num_tokens), ""))
    if tokens_per_second := cost.get("tokens_per_second"):
        tiles.append(("Training speed", f"{tokens_per_second:,.0f}", "tokens a second"))
    if peak_memory_bytes := cost.get("peak_memory_bytes"):
        tiles.append(("Peak memory", summary.format_bytes(peak_memory_bytes), ""))
    if num_trainable := cost.get("num_trainable_parameters"):
        num_base = cost.get("num_base_parameters")
        share = f"{100 * num_trainable / num_base:.2g}% of {summary.format_count(num_base)}" if num_base else ""
        tiles.append(("Trainable parameters", summary.format_count(num_trainable), share))
    return tiles


def _data(data: Mapping[str, Any]) -> dict[str, Any] | None:
    """The data report as a table of its two sides, with a histogram of training lengths and what is to be known."""
    if not data:
        return None
    replay = data.get("replay") or {}
    sides = {
        "training": data.get("train"),
        "held out": data.get("validation"),
        "replayed text": replay.get("train"),
        "replayed, held out": replay.get("validation"),
    }
    parts = {name: _part_facts(part) for name, part in sides.items() if isinstance(part, Mapping)}
    names = list(dict.fromkeys(fact for facts in parts.values() for fact in facts))
    lengths = (data.get("train") or {}).get("lengths") or {}
    bins = lengths.get("histogram") or []
    picture = None
    if bins:
        edges = [bin["low"] for bin in bins] + [bins[-1]["high"] + 1]
        picture = figures.histogram(edges, [bin["count"] for bin in bins], "tokens in a training example")
    return {
        "parts": list(parts),
        "facts": [(name, [facts.get(name, "-") for facts in parts.values()]) for name in names],
        "picture": Markup(picture) if picture else None,
        "warnings": [str(warning) for warning in data.get("warnings") or []] + _counted_warnings(data),
    }


def _part_facts(part: Mapping[str, Any]) -> dict[str, str]:
    facts = {
        "files": ", ".join(Path(str(name)).name for name in part.get("files") or []),
        "classes": f"{len(part['classes']):,}" if part.get("classes") else "",
    }
    for name in ("rows", "examples", "tokens", "supervised_tokens", "cut", "dropped"):
        count = part.get(f"num_{name}")
        if isinstance(count, int) and (count or name == "rows"):
            facts[_PART_NAMES.get(name, name)] = f"{count:,}"
    lengths = part.get("lengths") or {}
    if lengths.get("max"):
        facts["tokens in an example"] = (
            f"median {lengths['median']:,}, 95% {lengths['p95']:,}, longest {lengths['max']:,}"
        )
    return {name: text for name, text in facts.items() if text}


def _counted_warnings(data: Mapping[str, Any]) -> list[str]:
    counted = (
        ("num_duplicates", "training rows repeat an earlier row"),
        ("num_overlapping", "held-out rows stand in the training data too: their scores flatter"),
        ("num_problems", "rows could not be read as the task's records"),
    )
    return [f"{data[name]:,} {what}" for name, what in counted if data.get(name)]


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Everything in nested mappings as text, under its dotted name."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", str(value)
