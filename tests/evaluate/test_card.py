from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from luthier.errors import RunError
from luthier.evaluate.card import write_card


def front_matter(card: str) -> dict[str, Any]:
    _, matter, _ = card.split("---\n", 2)
    return yaml.safe_load(matter)


def edit_recipe(run: Path, **changes: Any) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    (run / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **changes}), encoding="utf-8")


def test_the_card_tells_base_licence_scores_data_and_limits(chat_run: Path) -> None:
    card = write_card(chat_run).read_text(encoding="utf-8")
    matter = front_matter(card)
    assert matter["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert matter["license"] == "apache-2.0"
    assert matter["library_name"] == "peft"
    assert matter["pipeline_tag"] == "text-generation"
    assert matter["tags"] == ["luthier", "lora", "chat"]
    for expected in (
        "**Exact match on 96 held-out rows: 3% → 91%**",
        "| Exact match | 3.1% (1.1 to 8.8) | 25.0%",
        "Training: 621 rows, 45,821 tokens",
        "SHA-256 of the files and their split: `" + "ab" * 32,
        "| method.rank | 16 |",
        "AutoPeftModelForCausalLM",
        "## Limits",
    ):
        assert expected in card, expected


def test_the_card_holds_no_content_and_no_private_path(chat_run: Path) -> None:
    card = write_card(chat_run).read_text(encoding="utf-8")
    assert "/home/someone" not in card
    assert "Could you set" not in card
    assert "kitchen" not in card


def test_a_base_in_a_folder_shows_its_name_alone(chat_run: Path) -> None:
    edit_recipe(chat_run, base="/home/someone/private/models/tiny-phi")
    card = write_card(chat_run).read_text(encoding="utf-8")
    assert front_matter(card)["base_model"] == "tiny-phi"
    assert "license" not in front_matter(card)
    assert "/home/someone" not in card


def test_a_classifier_says_so(classification_run: Path) -> None:
    card = write_card(classification_run).read_text(encoding="utf-8")
    assert front_matter(card)["pipeline_tag"] == "text-classification"
    assert "AutoPeftModelForSequenceClassification.from_pretrained(" in card
    assert 'subfolder="classifier"' in card


def test_a_run_that_got_worse_or_was_not_judged_says_so(chat_run: Path) -> None:
    evaluation = (chat_run / "eval.json").read_text(encoding="utf-8")
    (chat_run / "eval.json").write_text(evaluation.replace('"better"', '"worse"'), encoding="utf-8")
    assert "By exact match it is worse than its base." in write_card(chat_run).read_text(encoding="utf-8")
    (chat_run / "eval.json").unlink()
    card = write_card(chat_run).read_text(encoding="utf-8")
    assert "Whether it is better than its base is not known" in card
    assert "None: this run was not judged" in card


def test_names_cannot_become_markup(chat_run: Path) -> None:
    edit_recipe(chat_run, method={"type": "lora", "note": "a | b\n# <img src=x> `c`"})
    card = write_card(chat_run).read_text(encoding="utf-8")
    assert "a \\| b # &lt;img src=x> 'c'" in card


def test_an_empty_folder_has_a_card_and_no_folder_has_none(tmp_path: Path) -> None:
    assert "Not recorded." in write_card(tmp_path).read_text(encoding="utf-8")
    with pytest.raises(RunError, match="no run folder"):
        write_card(tmp_path / "absent")
