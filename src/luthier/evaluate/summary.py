"""Scores, counts and durations in the words a person reads; shared by the command line, the report and the card."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

LABELS = {
    "f1": "F1",
    "precision": "Precision",
    "recall": "Recall",
    "chrf": "chrF",
    "bleu": "BLEU",
    "preference_accuracy": "Preference accuracy",
    "reward_margin": "Reward margin",
    "ranking_accuracy": "Ranking accuracy",
    "bars_fit": "Bars that fit",
    "key_agreement": "Notes in key",
    "iou": "IoU",
    "valid": "Valid",
    "exact_match": "Exact match",
    "accuracy": "Accuracy",
    "micro_f1": "Micro-F1",
    "macro_f1": "Macro-F1",
    "subset_accuracy": "Subset accuracy",
    "loss": "Loss",
    "perplexity": "Perplexity",
    "token_accuracy": "Token accuracy",
    "tag_accuracy": "Tag accuracy",
}
PRIMARY = (
    *("f1", "chrf", "bars_fit", "iou", "preference_accuracy", "exact_match", "accuracy", "micro_f1"),
    *("perplexity", "loss", "token_accuracy"),
)
"""The first of these that both models have makes the headline."""

_SHARES = frozenset(
    {
        *("f1", "precision", "recall", "preference_accuracy", "ranking_accuracy"),
        *("exact_match", "accuracy", "micro_f1", "macro_f1", "subset_accuracy", "token_accuracy", "tag_accuracy"),
        *("valid", "bars_fit", "key_agreement", "iou"),
    }
)
_ENDS = (("0%", 0.0), ("100%", 1.0))
_SHOTS = re.compile(r"base_(\d+)_shots?")


def is_share(metric: str) -> bool:
    """Whether a metric lies between 0 and 1 and is read in percent."""
    return metric in _SHARES


def label(metric: str) -> str:
    return LABELS.get(metric, metric.replace("_", " ").capitalize())


def model_names(evaluation: Mapping[str, Any]) -> list[str]:
    """The models that an eval.json scores: "base", "base_3_shot" and the like, "tuned", in that order; then
    "reference", where references have scores of their own."""
    found = [name for name, scores in evaluation.items() if isinstance(scores, Mapping) and scores]
    shots = sorted((name for name in found if _SHOTS.fullmatch(name)), key=lambda name: int(name.split("_")[1]))
    return [name for name in ("base", *shots, "tuned", "reference") if name in found]


def model_label(name: str) -> str:
    match = _SHOTS.fullmatch(name)
    if not match:
        return name
    return f"base, {match[1]} example" + ("" if match[1] == "1" else "s")


def metric_names(evaluation: Mapping[str, Any]) -> list[str]:
    """Every metric that some model has, known ones first."""
    found = {
        metric for name in model_names(evaluation) for metric in evaluation[name] if _is_score(evaluation, name, metric)
    }
    return [metric for metric in LABELS if metric in found] + sorted(found - set(LABELS))


def score_of(evaluation: Mapping[str, Any], model: str, metric: str) -> dict[str, Any] | None:
    """One score as {"value", "low", "high", "rows"}, the last three possibly None; None where the model has none."""
    score = evaluation.get(model, {}).get(metric) if isinstance(evaluation.get(model), Mapping) else None
    if isinstance(score, Mapping):
        return {key: score.get(key) for key in ("value", "low", "high", "rows")}
    if isinstance(score, int | float) and not isinstance(score, bool):
        return {"value": float(score), "low": None, "high": None, "rows": None}
    return None


def _is_score(evaluation: Mapping[str, Any], model: str, metric: str) -> bool:
    return metric != "num_rows" and score_of(evaluation, model, metric) is not None


def format_value(metric: str, value: float | None, digits: int = 1) -> str:
    """A metric's value: shares in percent with `digits` decimals, others with four significant digits."""
    if value is None or not math.isfinite(value):
        return "not a number"
    if metric in _SHARES:
        return f"{100 * value:.{digits}f}%"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def format_score(metric: str, score: Mapping[str, Any] | None) -> str:
    """A value with its interval, as in "91.7% (84.4 to 95.7)"; a dash for none."""
    if score is None:
        return "-"
    text = format_value(metric, score["value"])
    return text if score["low"] is None else f"{text} ({format_interval(metric, score)})"


def format_interval(metric: str, score: Mapping[str, Any]) -> str:
    """The two ends of an interval, as in "84.4 to 95.7" (percent for shares); empty for none."""
    ends = [score.get("low"), score.get("high")]
    if any(end is None for end in ends):
        return ""
    return " to ".join(format_value(metric, end).rstrip("%") for end in ends)


def format_change(metric: str, change: Mapping[str, Any] | None) -> str:
    """A paired difference, as in "+88.5 points (81.2 to 94.8)"; a dash for none."""
    if not change or change.get("difference") is None:
        return "-"

    def signed(value: float) -> str:
        return f"{100 * value:+.1f}" if metric in _SHARES else f"{value:+.4g}"

    text = signed(change["difference"]) + (" points" if metric in _SHARES else "")
    if change.get("low") is None or change.get("high") is None:
        return text
    return f"{text} ({signed(change['low'])} to {signed(change['high'])})"


def primary_metric(evaluation: Mapping[str, Any]) -> str | None:
    """The metric of the headline: the first of `PRIMARY` that both base and tuned model have."""
    both = [m for m in PRIMARY if _is_score(evaluation, "base", m) and _is_score(evaluation, "tuned", m)]
    return both[0] if both else None


def headline(evaluation: Mapping[str, Any]) -> str | None:
    """One sentence, as in "Exact match on 96 held-out rows: 3% → 91%"; None where base or tuned was not judged."""
    metric = primary_metric(evaluation)
    if metric is None:
        return None
    base, tuned = score_of(evaluation, "base", metric), score_of(evaluation, "tuned", metric)
    if base is None or tuned is None:
        return None
    num_rows = tuned["rows"] or evaluation.get("num_rows")
    where = f" on {num_rows:,} held-out row{'' if num_rows == 1 else 's'}" if num_rows else " on held-out rows"
    values = [base["value"], tuned["value"]]
    texts = [format_value(metric, value, digits=0) for value in values]
    # Whole percents unless they would hide something: two equal texts, or a "100%" that is 99.7%.
    hides = texts[0] == texts[1] or any(
        text == whole and value != exact for text, value in zip(texts, values, strict=True) for whole, exact in _ENDS
    )
    if hides:
        texts = [format_value(metric, value) for value in values]
    return f"{label(metric)}{where}: {' → '.join(texts)}"


def verdict(evaluation: Mapping[str, Any], metric: str | None = None) -> str | None:
    """ "better", "worse" or "no clear difference" for a metric (the headline's by default); None where not compared."""
    metric = metric or primary_metric(evaluation)
    change = (evaluation.get("comparison") or {}).get(metric)
    return change.get("verdict") if isinstance(change, Mapping) else None


def summary_table(eval_json: Mapping[str, Any]) -> list[list[str]]:
    """Base against tuned as rows of plain text, the header first; only the header where nothing was judged.

    Columns: metric, one a model, change (tuned - base, with its interval), verdict. Cells hold no rich markup.
    """
    models = model_names(eval_json)
    compared = eval_json.get("comparison") or {}
    table = [["metric", *(model_label(name) for name in models)] + (["change", "verdict"] if compared else [])]
    for metric in metric_names(eval_json):
        cells = [label(metric), *(format_score(metric, score_of(eval_json, name, metric)) for name in models)]
        if compared:
            cells += [format_change(metric, compared.get(metric)), verdict(eval_json, metric) or "-"]
        table.append(cells)
    return table


def format_count(count: float) -> str:
    """A count as people say it: 987, 12,345, 1.23 M, 7.00 G."""
    for size, letter in ((1e9, "G"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.2f} {letter}"
    return f"{count:,.0f}"


def format_seconds(seconds: float) -> str:
    """A duration: 3.2 s, 4 min 12 s, 2 h 05 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def format_bytes(num_bytes: float) -> str:
    """A size in binary units: 512 B, 1.4 MiB, 3.2 GiB."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if num_bytes >= 1024**power:
            return f"{num_bytes / 1024**power:.1f} {unit}"
    return f"{num_bytes:.0f} B"
