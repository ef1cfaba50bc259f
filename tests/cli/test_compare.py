"""`luthier compare`: what goes to which stream, and exit codes; nothing is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from luthier.cli.main import app
from luthier.evaluate.comparison import MethodRow
from luthier.worker.compare import Comparison

SCORE = {"value": 0.5, "low": 0.3, "high": 0.7, "rows": 20}
DONE = MethodRow("lora", "out/lora", 5e-4, evaluation={"base": {"accuracy": SCORE}, "tuned": {"accuracy": SCORE}})
FAILED = MethodRow("prompt", "out/prompt", 3e-2, problem="a classifier reads none")


def call(monkeypatch: pytest.MonkeyPatch, rows: tuple[MethodRow, ...], *arguments: str) -> tuple[Any, dict[str, Any]]:
    seen: dict[str, Any] = {}

    def compare(recipe: str, methods: list[str], **rest: Any) -> Comparison:
        seen.update(recipe=recipe, methods=methods, **rest)
        if not rows:
            raise KeyboardInterrupt
        return Comparison(Path("out"), rows, Path("out/compare.md"), Path("out/compare.png"))

    monkeypatch.setattr("luthier.worker.compare.compare", compare)
    monkeypatch.setattr("luthier.evaluate.comparison.facts", lambda rows: ["18 training rows."])
    return CliRunner().invoke(app, ["compare", "r.yaml", *arguments]), seen


def test_options_reach_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    options = [
        "--methods",
        "lora, prompt,",
        "--set",
        "train.epochs=1",
        "--set",
        "lora:method.rank=2",
        "--output",
        "out",
    ]
    done, seen = call(monkeypatch, (DONE,), *options)
    assert done.exit_code == 0
    assert seen["methods"] == ["lora", "prompt"]
    assert seen["overrides"] == ["train.epochs=1", "lora:method.rank=2"]
    assert seen["output"] == Path("out")


def test_the_table_is_printed_and_a_failed_method_is_exit_code_2(monkeypatch: pytest.MonkeyPatch) -> None:
    done, _ = call(monkeypatch, (DONE, FAILED), "--methods", "lora,prompt")
    assert done.exit_code == 2
    assert "50.0% (30.0 to 70.0)" in done.stdout
    assert "prompt failed: a classifier reads none" in done.stdout
    assert "18 training rows." in done.stdout
    assert "out/compare.png" in done.stdout
    assert "prompt failed; the same command tries again" in done.stderr


def test_json_is_alone_on_standard_output(monkeypatch: pytest.MonkeyPatch) -> None:
    done, _ = call(monkeypatch, (DONE, FAILED), "--methods", "lora,prompt", "--json")
    value = json.loads(done.stdout)
    assert value["metric"] == "accuracy"
    assert [row["status"] for row in value["rows"]] == ["done", "failed"]


def test_an_interrupt_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    done, _ = call(monkeypatch, (), "--methods", "lora")
    assert done.exit_code == 130
    assert "The same command goes on" in done.stderr
