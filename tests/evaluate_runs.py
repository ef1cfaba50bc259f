"""Run folders as a training leaves them, built without training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from luthier.evaluate.metrics import RowScore, evaluation

NUM_STEPS = 180
BEST_STEP = 150
CLASSES = ["$ light_on $", "<script>alert(1)</script>", "heating & more", "blinds", "music", "timer"]


def build_chat_run(run: Path) -> Path:
    """A run on 96 held-out rows: 3 right before, 87 after, one of those 3 lost."""
    generator = np.random.default_rng(7)
    _write_common(run, "chat")
    base, few, tuned, lines = [], [], [], []
    rooms, devices = ["kitchen", "bedroom", "hall", "study"], ["light", "heating", "blinds", "speaker"]
    for row in range(96):
        room, device = rooms[row % 4], devices[row // 4 % 4]
        reference = json.dumps({"tool": "set", "device": f"{room}.{device}", "value": 20 + row % 60})
        near = reference.replace(room, rooms[(row + 1) % 4])
        is_base, is_few, is_tuned = row < 3, row % 4 == 0, 1 <= row < 88
        replies = {
            "base": reference
            if is_base
            else f"Sure! I can help you with the {device} in the {room}. What would you like?",
            "base_3_shot": reference if is_few else near,
            "tuned": reference if is_tuned else near,
        }
        right = {"base": is_base, "base_3_shot": is_few, "tuned": is_tuned}
        for scores, name, nll, share in (
            (base, "base", 2.3, 0.55),
            (few, "base_3_shot", 0.9, 0.8),
            (tuned, "tuned", 0.07, 0.975),
        ):
            num_tokens = int(generator.integers(18, 30))
            scores.append(
                RowScore(
                    row=row,
                    nll_sum=float(num_tokens * nll * generator.uniform(0.6, 1.4)),
                    weight_sum=float(num_tokens),
                    num_correct_tokens=int(generator.binomial(num_tokens, share)),
                    num_tokens=num_tokens,
                    reply=replies[name],
                    reference=reference,
                    is_exact=right[name],
                    group="one step" if row % 3 else "several steps",
                )
            )
        prompt = f"user: Could you set the {device} in the {room} to {20 + row % 60}? <b>Thanks</b> & bye"
        correct = {f"{name}_correct": value for name, value in right.items()}
        lines.append({"row": row, "prompt": prompt, "reference": reference, **replies, **correct})
    _write_json(run / "eval.json", evaluation({"base": base, "base_3_shot": few, "tuned": tuned}))
    _write_lines(run / "predictions.jsonl", lines)
    return run


def build_classification_run(run: Path, classes: list[str] | None = None) -> Path:
    """A run whose tuned model is wrong on two rows of seven."""
    classes = classes or CLASSES
    _write_common(run, "classification", labels=classes)
    base, tuned, lines = [], [], []
    for row in range(20 * len(classes)):
        true = row % len(classes)
        guess = (true + 1 + row % 3) % len(classes) if row % 7 in (3, 5) else true
        for scores, predicted, nll in ((base, 0, 1.9), (tuned, guess, 0.4)):
            scores.append(RowScore(row=row, nll_sum=nll, weight_sum=1.0, class_index=true, predicted_class=predicted))
        lines.append(
            {
                "row": row,
                "prompt": f"Please do the thing for {classes[true]}",
                "reference": classes[true],
                "base": classes[0],
                "tuned": classes[guess],
                "base_correct": true == 0,
                "tuned_correct": true == guess,
            }
        )
    _write_json(run / "eval.json", evaluation({"base": base, "tuned": tuned}))
    _write_lines(run / "predictions.jsonl", lines)
    return run


def _write_common(run: Path, task: str, labels: list[str] | None = None) -> None:
    run.mkdir(parents=True)
    recipe = {
        "format": 1,
        "base": "smollm2-135m-instruct",
        "task": {"type": task},
        "method": {"type": "lora", "rank": 16, "alpha": 32.0, "dropout": 0.0, "targets": "all-linear"},
        "train": {"epochs": 2.0, "batch_size": 16, "learning_rate": 5e-4, "schedule": "cosine", "seed": 42},
        "data": {"train": "train.jsonl", "validation": 0.1},
        "output": f"runs/{run.name}",
    }
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    _write_lines(run / "metrics.jsonl", _metrics())
    result = {
        "status": "done",
        "stopped_because": "all steps done",
        "best_step": BEST_STEP,
        "seconds": {"load": 2.1, "check": 1.4, "judge_base": 38.0, "train": 171.0, "judge_tuned": 29.5, "save": 0.6},
        "num_trained_tokens": 412_345,
        "tokens_per_second": 1234.5,
        "peak_memory_bytes": 1_432_000_000,
        "num_trainable_parameters": 4_884_480,
        "num_base_parameters": 134_515_008,
        "device": "cpu",
        "data_sha256": "ab" * 32,
    }
    _write_json(run / "result.json", result)
    _write_json(
        run / "versions.json", {"luthier": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.0"}
    )
    _write_json(run / "data.json", _data(labels or []))


def _metrics() -> list[dict[str, Any]]:
    generator = np.random.default_rng(1)
    lines: list[dict[str, Any]] = []
    for step in range(1, NUM_STEPS + 1):
        lines.append(
            {
                "kind": "step",
                "step": step,
                "loss": 2.4 * math.exp(-step / 22) + 0.08 + 0.05 * float(generator.random()) * (1 + 30 / step),
                "learning_rate": 5e-4 * 0.5 * (1 + math.cos(math.pi * step / NUM_STEPS)),
                "grad_norm": 1.8 * math.exp(-step / 60) + 0.2 * float(generator.random()),
                "num_tokens": 2290 * step,
            }
        )
        if step % 30 == 0:
            held = 2.4 * math.exp(-step / 22) + 0.12 + 0.0006 * max(0, step - BEST_STEP)
            lines.append({"kind": "evaluation", "step": step, "loss": held, "perplexity": math.exp(held)})
    return lines


def _data(labels: list[str]) -> dict[str, Any]:
    bins = [
        {"low": low, "high": low + 9, "count": count}
        for low, count in zip(range(40, 120, 10), (3, 41, 160, 210, 133, 52, 18, 4), strict=True)
    ]
    lengths = {"median": 73, "p95": 96, "max": 118, "histogram": bins}
    part = {
        "files": ["/home/someone/private/train.jsonl"],
        "num_rows": 621,
        "num_examples": 621,
        "num_tokens": 45_821,
        "num_supervised_tokens": 14_204,
        "num_cut": 0,
        "num_dropped": 0,
        "lengths": lengths,
        "longest": [],
        "classes": {},
    }
    return {
        "trainable": True,
        "task": "chat",
        "format": "chat",
        "labels": labels,
        "train": part,
        "validation": {**part, "num_rows": 96, "num_examples": 96, "num_tokens": 7_012, "num_supervised_tokens": 2_190},
        "num_problems": 0,
        "num_duplicates": 4,
        "num_overlapping": 0,
        "warnings": ["2 rows have an empty system turn"],
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, allow_nan=False), encoding="utf-8")


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
