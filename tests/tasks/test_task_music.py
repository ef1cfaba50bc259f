"""task: music: rows, prompts, and scores of what is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from task_checks import check_exchange, check_missing_packages
from tiny_templates import write_family

from luthier.data.rows import RowError
from luthier.data.template import Renderer
from luthier.evaluate.metrics import RowScore, evaluation
from luthier.tasks.exhibit import Judged
from luthier.tasks.music.exhibit import exhibits
from luthier.tasks.music.schema import MusicConfig
from luthier.tasks.registry import task_for
from luthier.tasks.shapes import Shaper

TASK = task_for(MusicConfig())
WHOLE = task_for(MusicConfig(given="nothing"))
HEADER = "X:1\nT:Dew on the Sill 🎵 露\nR:jig\nM:6/8\nL:1/8\nK:G"
BODY = "|:GAB d2 B|c2 A AGF|GAB d2 e|d2 B G3:|"
ROW = {"abc": f"{HEADER}\n{BODY}\n"}


@pytest.mark.parametrize("family", ["chatml", "llama3", "mistral"])
def test_the_header_is_the_prompt_and_the_music_carries_loss(family: str, tmp_path: Path) -> None:
    prompt = check_exchange(TASK, ROW, BODY, family, tmp_path)
    assert f"Write a tune in ABC notation.\n\n{HEADER}" in prompt.text
    assert BODY not in prompt.text
    assert prompt.reference == BODY


def test_a_whole_tune_is_asked_for_in_words(tmp_path: Path) -> None:
    prompt = check_exchange(WHOLE, ROW, BODY, "chatml", tmp_path)
    assert "Title: Dew on the Sill 🎵 露\nRhythm: jig\nMetre: 6/8\nKey: G" in prompt.text
    assert prompt.reference == ROW["abc"].strip()
    asked = WHOLE.parse({**ROW, "prompt": "A jig, please."})
    renderer = Renderer.load(write_family(tmp_path, "chatml"))
    assert "Title" not in WHOLE.prompts(asked, renderer)[0].text
    assert "A jig, please.\n\nX:1" in TASK.prompts(asked, renderer)[0].text
    assert TASK.parse({**ROW, "instruction": "Play!"}).prompt == "Play!"


def test_columns_fill_in_what_the_tune_lacks() -> None:
    record = TASK.parse({"abc": BODY, "title": "Two\nlines", "metre": "6/8", "key": "G", "rhythm": None})
    assert record.header == "X:1\nT:Two lines\nM:6/8\nK:G"
    assert record.body == BODY
    assert TASK.parse({**ROW, "title": "Other", "key": "D"}).header == HEADER
    assert TASK.parse({"abc": f"X:7\nL:1/8\nK:G\n{BODY}", "metre": "6/8"}).header == "X:7\nM:6/8\nL:1/8\nK:G"
    assert TASK.parse_query({"key": "D", "metre": "4/4"}).header == "X:1\nM:4/4\nK:D"
    assert TASK.parse_query({"abc": HEADER}).body == ""
    assert WHOLE.parse_query({"prompt": "Anything."}).header == ""


@pytest.mark.parametrize(
    ("row", "field", "said"),
    [
        ({"abc": ""}, "abc", "empty"),
        ({"abc": 3}, "abc", "a number"),
        ({"abc": "X:1\nT:a\nM:4/4\nABcd|"}, "abc", "no K: field"),
        ({"abc": HEADER}, "abc", "ends with its header"),
        ({"abc": f"{ROW['abc']}\n{ROW['abc']}"}, "abc", "holds 2 tunes"),
        ({"abc": f"{HEADER}\n{BODY}\n\nA fine tune."}, "abc", "line 8 is empty"),
        ({"abc": BODY, "key": 5}, "key", "is 5"),
        ({**ROW, "prompt": " "}, "prompt", "empty"),
    ],
)
def test_what_does_not_hold_is_named(row: dict[str, Any], field: str, said: str) -> None:
    with pytest.raises(RowError) as caught:
        TASK.parse(row)
    assert caught.value.field == field
    assert said in caught.value.message


def test_rows_are_recognized_and_mapped() -> None:
    assert Shaper("music").shape({"abc": "x", "other": 1}) == {"abc": "x"}
    mapped = Shaper("music", fields={"abc": "completion"}).shape({"prompt": "p", "completion": "c"})
    assert mapped == {"abc": "c", "prompt": "p"}
    assert Shaper("music").shape({"title": "t", "key": "G"}, is_query=True) == {"title": "t", "key": "G"}
    with pytest.raises(RowError, match="abc"):
        Shaper("music").shape({"tune": "x"})


def test_a_tune_that_is_too_long_is_cut_refused_or_left_out(tmp_path: Path) -> None:
    renderer = Renderer.load(write_family(tmp_path, "chatml"))
    record = TASK.parse({"abc": f"{HEADER}\n" + f"{BODY}\n" * 40})
    (cut,) = TASK.examples(record, renderer, 200, "end")
    assert cut.num_tokens == 200
    assert renderer.end_of_turn_id not in cut.tokens[cut.weights > 0]
    assert TASK.examples(record, renderer, 200, "drop") == []
    for size, truncation in ((200, "error"), (20, "end")):
        with pytest.raises(RowError) as caught:
            TASK.examples(record, renderer, size, truncation)  # type: ignore[arg-type]
        assert caught.value.kind == "truncated"


def test_scores_of_tunes_and_of_garbage() -> None:
    record = TASK.parse(ROW)
    perfect = {"valid": (1.0, 1.0), "bars_fit": (4.0, 4.0), "key_agreement": (18.0, 18.0)}
    assert TASK.mark(record, BODY).ratios == perfect
    for garbage in ("", "Sure! Here is your tune.", "|:GAB 😀", "<svg/>", "{" * 500, "GAB\n\nGAB", "X:2\nK:G\nGAB"):
        marks = TASK.mark(record, garbage)
        assert marks.ratios == {"valid": (0.0, 1.0), "bars_fit": (0.0, 4.0), "key_agreement": (0.0, 18.0)}, garbage
        assert marks.reference_ratios == perfect
    short = TASK.mark(record, "GAB d2|c2 A AG^F|^GAB d3|")
    assert short.ratios == {"valid": (1.0, 1.0), "bars_fit": (2.0, 3.0), "key_agreement": (12.0, 13.0)}
    # Without its metre a tune has no bars to fit: it does not get around the score so.
    whole = WHOLE.parse(ROW)
    assert WHOLE.mark(whole, "X:1\nK:G\nGAB|").ratios["bars_fit"] == (0.0, 4.0)


def test_what_is_predicted_says_whether_it_holds() -> None:
    record = TASK.parse_query({"abc": HEADER})
    found = TASK.present(record, f"{BODY}\n")
    assert found == {"abc": f"{HEADER}\n{BODY}", "valid": True, "bars": 4, "fitting_bars": 4}
    found = TASK.present(record, "Once upon a time")
    assert (found["valid"], found["problem"]) == (False, "line 7, column 2: 'nce upon a t'; expected ABC notation")


def test_references_have_scores_of_their_own() -> None:
    record = TASK.parse({"abc": f"{HEADER}\n{BODY}\nGAB d2|"})
    rows = {
        who: [
            RowScore(row, ratios=marks.ratios, reference_ratios=marks.reference_ratios)
            for row in range(8)
            for marks in [TASK.mark(record, reply)]
        ]
        for who, reply in (("base", "no tune"), ("tuned", BODY))
    }
    scores = evaluation(rows)
    assert scores["reference"]["bars_fit"]["value"] == pytest.approx(0.8)
    assert scores["base"]["valid"]["value"] == 0.0
    assert scores["base"]["valid"]["high"] > 0.2  # Wilson's of 8 rows
    assert scores["tuned"]["bars_fit"] == {"value": 1.0, "low": 1.0, "high": 1.0, "rows": 8}
    assert scores["comparison"]["valid"]["verdict"] == "better"


def test_the_missing_package_is_named_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    check_missing_packages("music", TASK.needs, "mido, which is not installed", monkeypatch)


def test_exhibits_are_pictures_midi_and_abc() -> None:
    record = TASK.parse({"abc": f"{HEADER}\n{BODY}".replace("T:", "T:<script>&")})
    rows = [Judged(row, record, {"base": "Once upon <a> time", "tuned": "GAB d2|c2 A AGF|"}) for row in range(30)]
    found = {exhibit.name: exhibit for exhibit in exhibits(TASK, rows)}
    assert len([name for name in found if name.endswith(".svg")]) == 6
    assert {"row-0-tuned.mid", "row-0-reference.mid", "row-0-base.abc", "row-29.svg"} <= found.keys()
    assert "row-0-base.mid" not in found
    picture = ElementTree.fromstring(found["row-0.svg"].content)
    texts = [element.text or "" for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert "tuned" in texts
    assert any(text.startswith("cannot be read: line 7, column 2: 'nce upon <a>") for text in texts)
    assert any("1 of 2 bars fit" in text for text in texts)
    assert len([e for e in picture.iter() if e.get("class") == "wrong"]) == 1
    assert len([e for e in picture.iter() if e.get("class") == "note"]) == 18 + 9
    assert exhibits(TASK, []) == []
