"""Results as tables and JSON, at the widths of terminals."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from luthier.cli.console import print_json, print_scores


def _score(value: float, low: float, high: float) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "rows": 96}


EVALUATION = {
    "num_rows": 96,
    "base": {"exact_match": _score(0.031, 0.01, 0.09), "loss": _score(1.234, 1.1, 1.4)},
    "base_3_shot": {"exact_match": _score(0.12, 0.05, 0.2)},
    "tuned": {"exact_match": _score(0.917, 0.844, 0.957), "loss": _score(0.2345, 0.2, 0.3)},
    "comparison": {
        "exact_match": {"difference": 0.886, "low": 0.81, "high": 0.95, "rows": 96, "verdict": "better"},
        "loss": {"difference": -1.0, "low": -1.2, "high": -0.8, "rows": 96, "verdict": "better"},
    },
}


def _printed(width: int) -> str:
    stream = io.StringIO()
    print_scores(EVALUATION, Console(file=stream, width=width))
    return stream.getvalue()


def test_a_wide_table_keeps_scores_and_change_on_one_line() -> None:
    text = _printed(160)
    line = next(line for line in text.splitlines() if "Exact match" in line)
    for cell in ("3.1% (1.0 to 9.0)", "12.0% (5.0 to 20.0)", "91.7% (84.4 to 95.7)", "+88.6 points", "better"):
        assert cell in line
    assert "Exact match on 96 held-out rows: 3% → 92%" in text


def test_a_narrow_table_gives_intervals_their_own_line_and_fits() -> None:
    text = _printed(80)
    assert max(map(len, text.splitlines())) <= 80
    assert "points" not in text
    lines = text.splitlines()
    place = next(place for place, line in enumerate(lines) if "Exact match" in line)
    assert "91.7%" in lines[place]
    assert "(84.4 to 95.7)" in lines[place + 1]


def test_nothing_judged_prints_nothing() -> None:
    stream = io.StringIO()
    print_scores({"num_rows": 0, "base": {}, "tuned": {}}, Console(file=stream))
    assert stream.getvalue() == ""


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"loss": float("nan"), "rows": [1, float("inf")], "name": "é"})
    text = capsys.readouterr().out
    assert json.loads(text) == {"loss": None, "rows": [1, None], "name": "é"}
    assert "é" in text
