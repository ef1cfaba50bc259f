"""`luthier predict`: a line for every row, for every task, from a run on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner
from worker.test_train import train_in_this_process

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
    "words": (
        {"type": "classification", "head": "words", "calibration": "prior", "words": {"near": "close by"}},
        [{"text": f"far {p}", "label": ["near", "far", "far 😀"][n % 3]} for n, p in enumerate(PLACES)],
        {"label", "probabilities"},
    ),
    "labels": (
        {"type": "classification", "multiple": True, "threshold": 0.45},
        [
            {"text": f"far {p}", "label": [["near", "far 😀"], "far 😀", [], ["遠い"]][n % 4]}
            for n, p in enumerate(PLACES)
        ],
        {"labels", "probabilities"},
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
    "words": {"accuracy", "macro_f1", "token_accuracy", "perplexity"},
    "labels": {"micro_f1", "macro_f1", "subset_accuracy"},
    "tagging": {"f1", "precision", "recall", "tag_accuracy"},
    "spans": {"f1", "recall", "tag_accuracy"},
    "text": {"perplexity"},
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def judged_and_predicted(run: Path, folder: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """What the tuned model's replies to the held-out rows were when it was judged, and what is predicted for them."""
    judged = [json.loads(line)["tuned"] for line in (run / "predictions.jsonl").read_text().splitlines()]
    predict_file(run, folder / "held.jsonl", folder / "out.jsonl")
    return judged, [json.loads(line) for line in (folder / "out.jsonl").read_text(encoding="utf-8").splitlines()]


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
    assert train_in_this_process(recipe).status == "done"
    return folder / "run"


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_trained_judged_and_predicted_for(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    task, rows, keys = TASKS[name]
    run = trained(tiny_llama, tmp_path, task, rows)
    scores = json.loads((run / "eval.json").read_text())
    for who in ("base", "tuned"):
        assert METRICS.get(name, {"exact_match"}) <= scores[who].keys() | ({"precision"} & METRICS.get(name, set()))
        assert scores[who]["loss"]["value"] > 0
    assert ("signatures" in scores) == (name in ("translation", "labels", "words"))
    assert ("parts" in scores) == (name in ("tagging", "spans", "labels"))
    report = (run / "report.html").read_text()
    assert "</html>" in report
    assert ("By type" in report) == (name in ("tagging", "spans"))
    assert ("chrf: nrefs" in report) == (name == "translation")
    assert ("By label" in report) == ("probability of 0.45 or more" in report) == (name == "labels")
    assert ("What is mistaken for what" in report) == (name in ("classification", "words"))
    assert ("luthier chat" in report) == (name not in ("classification", "labels", "tagging", "spans"))
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
    for name in ("classification", "words", "labels", "tagging", "translation"):
        task, rows, _ = TASKS[name]
        folder = tmp_path / name
        folder.mkdir()
        run = trained(tiny_llama, folder, task, rows)
        judged = [json.loads(line)["tuned"] for line in (run / "predictions.jsonl").read_text().splitlines()]
        predict_file(run, folder / "held.jsonl", folder / "out.jsonl", max_new_tokens=6)
        lines = [json.loads(line) for line in (folder / "out.jsonl").read_text(encoding="utf-8").splitlines()]
        if name == "tagging":
            found = ["\n".join(f"{s['text']} [{s['label']}]" for s in line["spans"]) for line in lines]
        elif name == "labels":
            found = [", ".join(sorted(line["labels"])) or "(none)" for line in lines]
            for line in lines:
                assert line["probabilities"].keys() == {"near", "far 😀", "遠い"}
                assert line["labels"] == [label for label, p in line["probabilities"].items() if p >= 0.45]
        else:
            found = [line["label" if name in ("classification", "words") else name] for line in lines]
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


@pytest.mark.parametrize("name", ["classification", "labels", "tagging"])
def test_labels_in_test_that_are_not_in_train_are_told_by_line(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    task, rows, _ = TASKS[name]
    extra = {"tokens": ["x"], "tags": ["B-river"]} if name == "tagging" else {"text": "x", "label": "middling"}
    held = write(tmp_path / "other.jsonl", [*rows, extra])
    with pytest.raises(DataError, match=rf"other\.jsonl, line {len(rows) + 1}.*(middling|river)"):
        trained(tiny_llama, tmp_path, task, rows, data={"validation": str(held)})


@pytest.mark.parametrize("name", ["qa", "translation", "tagging", "classification", "labels"])
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
    judged, lines = judged_and_predicted(run, tmp_path)
    assert ["\n".join(f"{s['text']} [{s['label']}]" for s in line["spans"]) for line in lines] == judged


@pytest.mark.parametrize("method", [{"type": "lora", "rank": 2}, {"type": "full"}, {"type": "lokr"}])
def test_labels_reload_without_luthier_with_equal_probabilities(
    method: dict[str, Any], tiny_llama: Path, tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    task, rows, _ = TASKS["labels"]
    run = trained(tiny_llama, tmp_path, task, rows, method=method)
    predict_file(run, tmp_path / "held.jsonl", tmp_path / "out.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    folders = [run / "model"] if method["type"] == "full" else [run / "adapter", tmp_path / "merged"]
    if method["type"] != "full":
        luthier.export_run(run, output=tmp_path / "merged")
    for folder in folders:
        if folder.name == "adapter":
            config = AutoConfig.from_pretrained(folder, subfolder="classifier")
            plain = AutoModelForSequenceClassification.from_pretrained(tiny_llama, config=config)
            model = PeftModel.from_pretrained(plain, folder).eval()
        else:
            model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        config = model.config
        assert (config.problem_type, config.label_threshold) == ("multi_label_classification", 0.45)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for row, line in zip(rows, lines, strict=True):
            with torch.inference_mode():
                probabilities = model(**tokenizer(row["text"], return_tensors="pt")).logits[0].sigmoid().tolist()
            found = {config.id2label[k]: p for k, p in enumerate(probabilities)}
            assert line["probabilities"] == pytest.approx(found, abs=2e-5)


def test_a_text_without_any_label_in_the_file_is_no_data(tiny_llama: Path, tmp_path: Path) -> None:
    task, _, _ = TASKS["labels"]
    with pytest.raises(DataError, match="holds a label"):
        trained(tiny_llama, tmp_path, task, [{"text": p, "label": []} for p in PLACES])


@pytest.mark.parametrize("calibration", ["none", "prior"])
@pytest.mark.parametrize("base", ["tiny_llama", "tiny_llama_bos", "plain"])
def test_labels_by_words_are_scored_as_transformers_scores_each(
    base: str, calibration: str, request: pytest.FixtureRequest, tiny_llama: Path, tmp_path: Path
) -> None:
    """With BOS, and on a base without a chat template."""
    import shutil

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from luthier.data.template import Renderer
    from luthier.tasks.classification.schema import ClassificationConfig
    from luthier.tasks.registry import task_for

    if base == "plain":
        folder = tmp_path / "plain"
        shutil.copytree(tiny_llama, folder)
        (folder / "chat_template.jinja").unlink()
    else:
        folder = request.getfixturevalue(base)
    task, rows, _ = TASKS["words"]
    task = {**task, "calibration": calibration}
    run = trained(folder, tmp_path, task, rows)
    predict_file(run, tmp_path / "held.jsonl", tmp_path / "out.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    renderer = Renderer.load(run / "adapter")
    assert renderer.can_chat == (base != "plain")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), run / "adapter").eval()
    labels = ["far", "far 😀", "near"]
    plain: Any = task_for(ClassificationConfig(**task)).with_labels(labels)

    @torch.inference_mode()
    def scores(text: str) -> torch.Tensor:
        found = []
        for label in labels:
            (example,) = plain.examples(plain.parse({"text": text, "label": label}), renderer, 192)
            ids = torch.from_numpy(example.tokens.astype("int64"))[None]
            logprobs_LV = model(input_ids=ids).logits[0].double().log_softmax(dim=-1)
            at = torch.from_numpy(example.weights > 0).nonzero()[:, 0]
            found.append(logprobs_LV[at - 1, ids[0, at]].sum())
        return torch.stack(found)

    prior = scores("N/A") if calibration == "prior" else 0.0
    for row, line in zip(rows, lines, strict=True):
        wanted = (scores(row["text"]) - prior).softmax(dim=0).tolist()
        assert line["probabilities"] == pytest.approx(dict(zip(labels, wanted, strict=True)), abs=1e-4)


@pytest.mark.parametrize("method", [{"type": "full"}, {"type": "lokr"}, {"type": "prompt", "virtual_tokens": 4}])
def test_words_of_an_exclusive_method_are_predicted_as_they_were_judged(
    method: dict[str, Any], tiny_llama: Path, tmp_path: Path
) -> None:
    """The last runs padded, with positions before the prompt that are no tokens."""
    task, rows, _ = TASKS["words"]
    run = trained(tiny_llama, tmp_path, task, rows, method=method)
    judged, lines = judged_and_predicted(run, tmp_path)
    assert [line["label"] for line in lines] == judged
    scores, first = luthier.evaluate_run(run), json.loads((run / "eval.json").read_text())
    for who in ("base", "tuned"):
        assert scores[who]["accuracy"]["value"] == first[who]["accuracy"]["value"]


def test_examples_in_the_prompt_are_judged_too(tiny_llama: Path, tmp_path: Path) -> None:
    task, rows, _ = TASKS["words"]
    run = trained(tiny_llama, tmp_path, task, rows, evaluation={"rows": 4, "shots": 2})
    scores = json.loads((run / "eval.json").read_text())
    assert {"accuracy", "macro_f1"} <= scores["base_2_shot"].keys()
    assert "loss" not in scores["base_2_shot"]


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
