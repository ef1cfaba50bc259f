"""`luthier predict`: a line for every row, for every task, from a run on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import luthier
from luthier.cli.main import app
from luthier.errors import DataError, RunError
from luthier.worker.predict_file import predict_file

PLACES = ["Paris", "Genf 😀", "Zürich", "東京", "Lima", "Oslo", "Bern", "Rom"]
TASKS: dict[str, tuple[Any, list[dict[str, Any]], set[str]]] = {
    "chat": (
        "chat",
        [
            {"messages": [{"role": "user", "content": f"Where is {p}?"}, {"role": "assistant", "content": p}]}
            for p in PLACES
        ],
        {"reply"},
    ),
    "completion": (
        "completion",
        [{"prompt": f"Where is {p}?", "completion": f" {p}"} for p in PLACES],
        {"completion"},
    ),
    "qa": (
        "qa",
        [
            {"context": f"It is in {p}.", "question": "Where?", "answers": [p] if n else []}
            for n, p in enumerate(PLACES)
        ],
        {"answer"},
    ),
    "choices": (
        {"type": "qa", "choices": ["yes", "no", "maybe so"]},
        [{"context": p, "question": "Far?", "answers": ["yes", "no", "maybe so"][n % 3]} for n, p in enumerate(PLACES)],
        {"answer"},
    ),
    "translation": (
        {"type": "translation", "source_lang": "en", "target_lang": "de"},
        [{"source": f"in {p}", "target": [f"zu {p}", f"in {p}"]} for p in PLACES],
        {"translation"},
    ),
    "classification": (
        "classification",
        [{"text": f"far {p}", "label": ["near", "far"][n % 2]} for n, p in enumerate(PLACES)],
        {"label", "probabilities"},
    ),
    "tagging": (
        "tagging",
        [{"tokens": ["in", *p.split()], "tags": ["O", "B-place", *["O"] * (len(p.split()) - 1)]} for p in PLACES],
        {"text", "spans", "tokens", "tags"},
    ),
    "spans": (
        {"type": "tagging", "reads": "once"},
        [{"text": f"in {p}", "spans": [[3, 3 + len(p.split()[0]), "place"]]} for p in PLACES],
        {"text", "spans", "tokens", "tags"},
    ),
    "text": ("text", [{"text": f"One day in {p}."} for p in PLACES], {"loss", "perplexity", "num_tokens"}),
}
ANSWERS = ("completion", "answers", "target", "label", "tags", "spans")
METRICS = {
    "qa": {"f1", "exact_match"},
    "choices": {"f1", "exact_match", "accuracy", "macro_f1"},
    "translation": {"chrf", "bleu"},
    "classification": {"accuracy", "macro_f1"},
    "tagging": {"f1", "precision", "recall", "tag_accuracy"},
    "spans": {"f1", "recall", "tag_accuracy"},
    "text": {"perplexity"},
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def trained(base: Path, folder: Path, task: Any, rows: list[dict[str, Any]], **sections: Any) -> Path:
    train, held = write(folder / "train.jsonl", rows * 2), write(folder / "held.jsonl", rows)
    recipe = {
        "base": str(base),
        "task": task,
        "data": {"train": str(train), "validation": str(held)} | sections.pop("data", {}),
        "method": {"type": "lora", "rank": 2},
        "train": {"max_steps": 2, "batch_size": 8, "learning_rate": 1e-2, "max_length": 192},
        "evaluation": {"rows": 100, "max_new_tokens": 6},
        "compute": {"device": "cpu", "threads": 1},
        "output": str(folder / "run"),
        **sections,
    }
    assert luthier.train(recipe).status == "done"
    return folder / "run"


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_trained_judged_and_predicted_for(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    task, rows, keys = TASKS[name]
    run = trained(tiny_llama, tmp_path, task, rows)
    scores = json.loads((run / "eval.json").read_text())
    for who in ("base", "tuned"):
        assert METRICS.get(name, {"exact_match"}) <= scores[who].keys() | ({"precision"} & METRICS.get(name, set()))
        assert scores[who]["loss"]["value"] > 0
    assert ("signatures" in scores) == (name == "translation")
    assert ("parts" in scores) == (name in ("tagging", "spans"))
    report = (run / "report.html").read_text()
    assert "</html>" in report
    assert ("By type" in report) == (name in ("tagging", "spans"))
    assert ("chrf: nrefs" in report) == (name == "translation")
    if name != "text":
        lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
        assert len(lines) == len(rows)
        assert {"row", "prompt", "reference", "base", "tuned"} <= lines[0].keys()
    questions = [{key: value for key, value in row.items() if key not in ANSWERS} for row in rows]
    out = tmp_path / "out.jsonl"
    result = CliRunner().invoke(
        app, ["predict", str(run), str(write(tmp_path / "q.jsonl", questions)), "-o", str(out), "-q"]
    )
    assert result.exit_code == 0, result.output
    predicted = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [line["row"] for line in predicted] == list(range(len(rows)))
    assert all(line.keys() == {"row", "line", *keys} for line in predicted)
    if name == "choices":
        assert {line["answer"] for line in predicted} <= {"yes", "no", "maybe so"}


def test_predictions_are_those_that_were_judged(tiny_llama: Path, tmp_path: Path) -> None:
    """The run's own predictions of the held-out rows, and `predict` on the same rows."""
    for name in ("classification", "tagging", "translation"):
        task, rows, _ = TASKS[name]
        folder = tmp_path / name
        folder.mkdir()
        run = trained(tiny_llama, folder, task, rows)
        judged = [json.loads(line)["tuned"] for line in (run / "predictions.jsonl").read_text().splitlines()]
        predict_file(run, folder / "held.jsonl", folder / "out.jsonl", max_new_tokens=6)
        lines = [json.loads(line) for line in (folder / "out.jsonl").read_text(encoding="utf-8").splitlines()]
        if name == "tagging":
            found = ["\n".join(f"{s['text']} [{s['label']}]" for s in line["spans"]) for line in lines]
        else:
            found = [line["label" if name == "classification" else name] for line in lines]
        assert found == judged


def test_a_row_that_does_not_hold_gets_a_line_that_says_so(tiny_llama: Path, tmp_path: Path) -> None:
    task, rows, _ = TASKS["tagging"]
    run = trained(tiny_llama, tmp_path, task, rows)
    data = tmp_path / "mixed.jsonl"
    data.write_text('{"tokens": ["Paris"]}\n\n{"tokens": "Paris"}\n{broken\n{"tokens": ["Oslo"], "tags": ["B-x"]}\n')
    result = CliRunner().invoke(app, ["predict", str(run), str(data), "-q"])
    assert result.exit_code == 2
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert [(line["row"], line["line"]) for line in lines] == [(0, 1), (1, 3), (2, 4), (3, 5)]
    assert [("error" in line) for line in lines] == [False, True, True, False]
    assert "a list of words" in lines[1]["error"]
    assert "broken JSON" in lines[2]["error"]


def test_files_and_runs_that_are_not_there_are_named(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no run"):
        predict_file(tmp_path / "none", tmp_path / "q.jsonl")
    task, rows, _ = TASKS["classification"]
    run = trained(tiny_llama, tmp_path, task, rows)
    with pytest.raises(DataError, match="no data file"):
        predict_file(run, tmp_path / "q.jsonl")


def test_other_columns_are_mapped_in_training_and_in_predicting(tiny_llama: Path, tmp_path: Path) -> None:
    rows = [{"passage": f"In {p}.", "query": "Where?", "gold": p, "id": n} for n, p in enumerate(PLACES)]
    fields = {"context": "passage", "question": "query", "answers": "gold"}
    run = trained(tiny_llama, tmp_path, "qa", rows, data={"fields": fields})
    questions = write(tmp_path / "q.jsonl", [{"passage": "In Rom.", "query": "Where?"}])
    assert predict_file(run, questions, tmp_path / "out.jsonl", max_new_tokens=3).num_errors == 0


@pytest.mark.parametrize("name", ["classification", "tagging"])
def test_labels_in_test_that_are_not_in_train_are_told_by_line(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    task, rows, _ = TASKS[name]
    extra = {"text": "x", "label": "middling"} if name == "classification" else {"tokens": ["x"], "tags": ["B-river"]}
    held = write(tmp_path / "other.jsonl", [*rows, extra])
    with pytest.raises(DataError, match=rf"other\.jsonl, line {len(rows) + 1}.*(middling|river)"):
        trained(tiny_llama, tmp_path, task, rows, data={"validation": str(held)})


@pytest.mark.parametrize("name", ["qa", "translation", "tagging", "classification"])
def test_an_empty_split_is_told(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    task, rows, _ = TASKS[name]
    blank = tmp_path / "blank.jsonl"
    blank.write_text("\n")
    with pytest.raises(DataError, match="holds no rows"):
        trained(tiny_llama, tmp_path, task, rows, data={"validation": str(blank)})


@pytest.mark.parametrize("method", [{"type": "full"}, {"type": "lokr"}])
def test_a_tagger_of_an_exclusive_method_predicts_what_was_judged(
    method: dict[str, Any], tiny_llama: Path, tmp_path: Path
) -> None:
    task, rows, _ = TASKS["tagging"]
    run = trained(tiny_llama, tmp_path, task, rows, method=method)
    judged = [json.loads(line)["tuned"] for line in (run / "predictions.jsonl").read_text().splitlines()]
    predict_file(run, tmp_path / "held.jsonl", tmp_path / "out.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert ["\n".join(f"{s['text']} [{s['label']}]" for s in line["spans"]) for line in lines] == judged


def test_a_tagger_is_exported_whole(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForTokenClassification

    task, rows, _ = TASKS["tagging"]
    run = trained(tiny_llama, tmp_path, task, rows)
    luthier.export_run(run, output=tmp_path / "merged")
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "merged")
    assert model.config.id2label == {0: "O", 1: "B-place", 2: "I-place"}


def test_rows_without_any_entity_are_no_data(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds an entity"):
        trained(tiny_llama, tmp_path, "tagging", [{"tokens": [p], "tags": ["O"]} for p in "abcdefgh"])
