"""task: translation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from task_checks import check_exchange
from tiny_templates import write_family

from luthier.data.rows import RowError
from luthier.data.template import Renderer
from luthier.evaluate.corpus import FORMULAS
from luthier.tasks.registry import task_for
from luthier.tasks.translation.languages import bleu_tokenizer, language_name
from luthier.tasks.translation.metrics import sentence_statistics
from luthier.tasks.translation.schema import TranslationConfig

TASK = task_for(TranslationConfig())
ROW = {"source": "Good morning!", "target": "Guten Morgen!", "source_lang": "en", "target_lang": "de"}
HYPOTHESES = ["the cat sat on the mat", "", "ein Hund", "😀 ja", "completely other words", "the the the"]
REFERENCES = [["the cat is on the mat", "a cat sat on the mat"], ["x y", "y"], ["ein Hund", "der Hund"]]
REFERENCES += [["😀 ja!", "ja"], ["nothing shared", "so"], ["the cat", "the the dog"]]


@pytest.mark.parametrize("family", ["chatml", "llama3", "mistral"])
def test_the_source_is_the_prompt_and_the_translation_carries_loss(family: str, tmp_path: Path) -> None:
    prompt = check_exchange(TASK, ROW, "Guten Morgen!", family, tmp_path)
    assert "Translate from English to German:\n\nGood morning!" in prompt.text


def test_languages_come_from_the_row_or_the_recipe() -> None:
    task = task_for(TranslationConfig(source_lang="eng", target_lang="Klingon"))
    record = task.parse({"source": "a", "target": "b"})
    assert (record.source_lang, record.target_lang) == ("eng", "Klingon")
    assert task.parse({"source": "a", "target": "b", "target_lang": "fr"}).target_lang == "fr"
    with pytest.raises(RowError, match=r"task\.target_lang") as caught:
        TASK.parse({"source": "a", "target": "b", "source_lang": "en"})
    assert caught.value.field == "target_lang"
    plain = task_for(TranslationConfig(instruction="Into German:"))
    assert plain.parse({"source": "a", "target": "b"}).target_lang is None


@pytest.mark.parametrize(
    ("change", "field", "said"),
    [
        ({"source": ""}, "source", "empty"),
        ({"target": []}, "target", "a list of texts"),
        ({"target": ["a", " "]}, "target[1]", "empty"),
        ({"target": 3}, "target", "is 3"),
        ({"source_lang": 3}, "source_lang", "a number"),
    ],
)
def test_what_does_not_hold_is_named(change: dict[str, Any], field: str, said: str) -> None:
    with pytest.raises(RowError) as caught:
        TASK.parse({**ROW, **change})
    assert caught.value.field == field
    assert said in caught.value.message


def test_half_a_pair_is_never_trained(tmp_path: Path) -> None:
    renderer = Renderer.load(write_family(tmp_path, "chatml"))
    record = TASK.parse({**ROW, "target": "Guten " * 60})
    for truncation in ("end", "start", "error"):
        with pytest.raises(RowError) as caught:
            TASK.examples(record, renderer, 64, truncation)
        assert caught.value.kind == "truncated"
    assert TASK.examples(record, renderer, 64, "drop") == []


def test_names_of_languages() -> None:
    assert [language_name(code) for code in ("de", "deu", "de-AT", "zho_Hans", "tlh")] == [
        "German",
        "German",
        "German",
        "Chinese",
        "tlh",
    ]
    assert [bleu_tokenizer(code) for code in ("de", "zh", "ja", None)] == ["13a", "zh", "char", "13a"]


@pytest.mark.parametrize("num_references", [1, 2])
def test_scores_equal_sacrebleus(num_references: int) -> None:
    from sacrebleu.metrics import BLEU, CHRF

    references = [row[:num_references] for row in REFERENCES]
    rows = [sentence_statistics(h, r, "13a") for h, r in zip(HYPOTHESES, references, strict=True)]
    streams = [list(stream) for stream in zip(*references, strict=True)]
    draw = np.random.default_rng(0)
    # The corpus itself, each sentence alone, and samples with repeats, in one call.
    counts_BN = np.concatenate([np.ones((1, 6)), np.eye(6), draw.integers(0, 3, size=(20, 6)) + np.eye(6)[0]])
    for name, metric in (("chrf", CHRF()), ("bleu", BLEU())):
        sums_NK = np.array([row[name] for row in rows])
        found_B = FORMULAS[name](counts_BN @ sums_NK)
        for counts_N, found in zip(counts_BN.astype(int), found_B, strict=True):
            chosen = np.repeat(np.arange(6), counts_N)
            expected = metric.corpus_score([HYPOTHESES[i] for i in chosen], [[s[i] for i in chosen] for s in streams])
            assert found == pytest.approx(expected.score, abs=1e-9), (name, counts_N)


def test_the_signature_is_sacrebleus() -> None:
    records = [TASK.parse({**ROW, "target": ["a", "b"]}), TASK.parse(ROW)]
    signatures = TASK.signatures(records)
    assert "nrefs:2" in signatures["bleu"]
    assert "tok:13a" in signatures["bleu"]
    assert "nc:6" in signatures["chrf"]
    assert "version:" in signatures["chrf"]
    assert TASK.signatures([]) == {}


def test_marks_and_presents() -> None:
    record = TASK.parse({**ROW, "target": ["Guten Morgen!", "Morgen!"]})
    marks = TASK.mark(record, "Guten Morgen!")
    assert set(marks.statistics) == {"chrf", "bleu"}
    assert (marks.reference, marks.group) == ("Guten Morgen! | Morgen!", "English to German")
    assert FORMULAS["chrf"](np.array([marks.statistics["chrf"]]))[0] == pytest.approx(100.0)
    assert TASK.present(record, "x") == {"translation": "x"}
    query = TASK.parse_query({"source": "Hello", "source_lang": "en", "target_lang": "de"})
    assert query.targets == ()
