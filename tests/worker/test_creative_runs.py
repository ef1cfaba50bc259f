"""Tasks whose rows are works: a tiny model's garbage is trained on, judged, pictured and predicted, and scores 0."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import luthier
from luthier.cli.main import app
from luthier.errors import RecipeError

SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8"><rect width="{}" height="8"/></svg>'
PLACES = ["Paris", "Genf 😀", "Zürich", "東京", "Lima", "Oslo", "Bern", "Rom"]
WORKS: dict[str, tuple[list[dict[str, Any]], set[str], set[str], set[str]]] = {
    "music": (
        [{"abc": f"X:1\nT:{p}\nM:4/4\nL:1/8\nK:D\nD2F2 A4|d8|", "prompt": f"A tune for {p}"} for p in PLACES],
        {"valid", "bars_fit", "key_agreement"},
        {"row-0.svg", "row-0-reference.mid", "row-7-tuned.abc"},
        {"abc", "valid", "problem"},
    ),
    "art": (
        [{"prompt": f"a map of {p}", "svg": SVG.format(n + 1)} for n, p in enumerate(PLACES)],
        {"valid", "iou"},
        {"drawings.png", "row-0-reference.svg"},
        {"svg", "valid", "problem"},
    ),
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", WORKS)
def test_garbage_scores_nothing_and_crashes_nothing(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    rows, metrics, exhibits, keys = WORKS[name]
    held = write(tmp_path / "held.jsonl", rows)
    run = tmp_path / "run"
    recipe = {
        "base": str(tiny_llama),
        "task": name,
        "data": {"train": str(write(tmp_path / "train.jsonl", rows * 2)), "validation": str(held)},
        "method": {"type": "lora", "rank": 2},
        "train": {"max_steps": 2, "batch_size": 8, "max_length": 512},
        "evaluation": {"rows": 100, "max_new_tokens": 6, "shots": 1},
        "compute": {"device": "cpu", "threads": 1},
        "output": str(run),
    }
    assert luthier.train(recipe).status == "done"
    scores = json.loads((run / "eval.json").read_text(encoding="utf-8"))
    for who in ("base", "tuned"):
        assert {metric: scores[who][metric]["value"] for metric in metrics} == dict.fromkeys(metrics, 0.0)
        assert scores[who]["loss"]["value"] > 0
    assert scores["reference"]["valid"]["value"] == 1.0
    assert exhibits <= {path.name for path in (run / "exhibits").iterdir()}
    report = (run / "report.html").read_text(encoding="utf-8")
    assert "Pictures of held-out rows" in report
    assert 'src="data:image/' in report
    queries = [{key: value for key, value in row.items() if key != "svg"} for row in rows]
    out = tmp_path / "out.jsonl"
    arguments = ["predict", str(run), str(write(tmp_path / "q.jsonl", queries)), "-o", str(out), "-q"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == len(rows)
    assert all(line.keys() == {"row", "line", *keys} and not line["valid"] for line in lines)


@pytest.mark.parametrize(("name", "package"), [("music", "mido"), ("art", "resvg_py")])
def test_a_missing_package_is_named_before_anything_is_done(
    name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda asked, *more: None if asked == package else find(asked, *more)
    )
    recipe = {"base": str(tmp_path / "no-base"), "task": name, "data": {"train": "x"}, "output": str(tmp_path / "run")}
    with pytest.raises(RecipeError, match=rf"(?s)task: {name} is judged with {package}, .*luthier\[{name}\]"):
        luthier.train(recipe)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("music", {"abc": "GAB c3|"}, "line 2 (abc): has no K: field"),
        ("art", {"prompt": "a door", "svg": "a door"}, "line 2 (svg): holds no <svg> element"),
    ],
)
def test_wrong_rows_are_told_by_line(
    name: str, wrong: dict[str, Any], said: str, tiny_llama: Path, tmp_path: Path
) -> None:
    rows, *_ = WORKS[name]
    data = write(tmp_path / "rows.jsonl", [rows[0], wrong, rows[1]])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"base: {tiny_llama}\ntask: {name}\ndata: {{train: {data}, validation: null}}\n", encoding="utf-8"
    )
    result = CliRunner().invoke(app, ["check", str(recipe)])
    assert result.exit_code != 0
    assert said in " ".join(result.output.split())


@pytest.mark.parametrize("validation", [None, 0.0])
def test_a_run_without_held_out_rows_has_no_exhibits(
    validation: float | None, tiny_llama: Path, tmp_path: Path
) -> None:
    rows, *_ = WORKS["music"]
    recipe = {
        "base": str(tiny_llama),
        "task": "music",
        "data": {"train": str(write(tmp_path / "train.jsonl", rows)), "validation": validation},
        "train": {"max_steps": 1, "batch_size": 4, "max_length": 512},
        "compute": {"device": "cpu", "threads": 1},
        "output": str(tmp_path / "run"),
    }
    assert luthier.train(recipe).status == "done"
    assert "Pictures" not in (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "run/exhibits/index.json").read_text(encoding="utf-8")) == []
