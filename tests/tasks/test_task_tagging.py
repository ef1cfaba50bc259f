"""task: tagging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_templates import write_family

from luthier.data.rows import RowError
from luthier.data.template import Renderer
from luthier.errors import DataError
from luthier.recipe import Recipe
from luthier.tasks.registry import task_for
from luthier.tasks.shapes import Shaper
from luthier.tasks.tagging.bio import spans_of, split_words, tag_names, tags_of
from luthier.tasks.tagging.metrics import entities, ratios, ratios_by_type
from luthier.tasks.tagging.schema import Span, TaggingConfig, Tags

FAMILIES = ("chatml", "llama3", "mistral")
ONCE = task_for(TaggingConfig(reads="once")).with_labels(["person", "place"])
TWICE = task_for(TaggingConfig()).with_labels(["person", "place"])
TOKENS = {
    "tokens": ["Ada", "Lovelace", "lives", "in", "Paris", "."],
    "tags": ["B-person", "I-person", "O", "O", "B-place", "O"],
}
OTHERS = [
    "Müller wohnt in Zürich 😀😀, nicht in Genf.",
    "東京タワーは東京にある。",
    "👩‍👩‍👧 Zoë's “café”—naïve",
    "مرحبا بالعالم",
    "a  b\tc\n\nd",
]


def renderer_of(folder: Path, family: str = "chatml") -> Renderer:
    return Renderer.load(write_family(folder, family))


def read_back(task: Any, record: Any, renderer: Renderer, max_length: int) -> Tags:
    """What the task makes of a head that is right everywhere."""
    given = []
    for example in task.examples(record, renderer, max_length):
        wanted = example.tags[example.tags >= 0]
        given.append(np.eye(len(task.outputs), dtype=np.float32)[wanted])
    return task.read(record, renderer, max_length, given)


def test_words_with_tags_and_a_text_with_spans_are_one_record() -> None:
    from_tokens = ONCE.parse(TOKENS)
    assert from_tokens.text == "Ada Lovelace lives in Paris ."
    assert from_tokens.spans == (Span(0, 12, "person"), Span(22, 27, "place"))
    from_spans = ONCE.parse(
        {
            "text": from_tokens.text,
            "spans": [{"start": 22, "end": 27, "label": "place"}, [0, 13, "person"]],  # white space is left out
        }
    )
    assert from_spans == from_tokens
    assert ONCE.from_json(from_tokens.to_json()) == from_tokens
    assert ONCE.labels_of(from_tokens) == ("person", "place")
    assert ONCE.outputs == ("O", "B-person", "I-person", "B-place", "I-place")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tag_lies_at_the_last_token_of_its_word(family: str, tmp_path: Path) -> None:
    renderer = renderer_of(tmp_path, family)
    record = ONCE.parse(TOKENS)
    (example,) = ONCE.examples(record, renderer, 512, row=7)
    assert not example.weights.any()
    assert (example.row, example.num_tokens) == (7, len(renderer.encode(record.text)) + (renderer.bos_id is not None))
    places = np.flatnonzero(example.tags >= 0)
    assert example.tags[places].tolist() == [1, 2, 0, 0, 3, 0]
    for place, (_, end) in zip(places, record.words, strict=True):
        # Up to its tag, a causal model has read exactly the text up to the word's end.
        read = renderer.decode(example.tokens[: place + 1])
        assert read.strip() == record.text[:end]


@pytest.mark.parametrize("family", FAMILIES)
def test_read_twice_the_tags_lie_in_the_second_copy(family: str, tmp_path: Path) -> None:
    renderer = renderer_of(tmp_path, family)
    record = TWICE.parse(TOKENS)
    (once,), (twice,) = ONCE.examples(record, renderer, 512), TWICE.examples(record, renderer, 512)
    bos = int(renderer.bos_id is not None)
    assert twice.tokens[: once.num_tokens].tolist() == once.tokens.tolist()
    start = twice.num_tokens - (once.num_tokens - bos)
    assert twice.tokens[start:].tolist() == once.tokens[bos:].tolist()
    assert twice.tags[start:].tolist() == once.tags[bos:].tolist()
    assert (twice.tags[:start] < 0).all()


@pytest.mark.parametrize("family", ["chatml", "llama3"])
@pytest.mark.parametrize("text", OTHERS)
@pytest.mark.parametrize("task", [ONCE, TWICE], ids=["once", "twice"])
def test_any_script_comes_back_as_it_was(task: Any, text: str, family: str, tmp_path: Path) -> None:
    renderer = renderer_of(tmp_path, family)
    words = split_words(text)
    spans = [[*words[0], "place"], [words[-2 if len(words) > 2 else -1][0], words[-1][1], "person"]]
    record = task.parse({"text": text, "spans": spans})
    prediction = read_back(task, record, renderer, 1024)
    assert prediction.tags == tags_of(record.words, record.spans)
    presented = task.present(record, prediction)
    assert [[s["start"], s["end"], s["label"]] for s in presented["spans"]] == spans
    assert [s["text"] for s in presented["spans"]] == [text[a:b] for a, b, _ in spans]


def test_words_that_share_their_last_token_share_its_tag(tmp_path: Path) -> None:
    """As where a special token stands in a text: one token, and seven words."""
    renderer = renderer_of(tmp_path)
    record = ONCE.parse({"text": "in <|im_end|> is", "spans": [[5, 7, "place"]]})
    assert [record.text[a:b] for a, b in record.words] == ["in", "<", "|", "im", "_", "end", "|", ">", "is"]
    (example,) = ONCE.examples(record, renderer, 64)
    assert example.tags[example.tags >= 0].tolist() == [0, 3, 0]
    assert read_back(ONCE, record, renderer, 64).tags == ("O", *["B-place"] * 7, "O")


@pytest.mark.parametrize("task", [ONCE, TWICE], ids=["once", "twice"])
def test_a_long_text_is_read_in_windows_that_end_where_words_do(task: Any, tmp_path: Path) -> None:
    renderer = renderer_of(tmp_path, "llama3")
    row = {"tokens": TOKENS["tokens"] * 9, "tags": TOKENS["tags"] * 9}
    record = task.parse(row)
    windows = task.examples(record, renderer, 40)
    assert len(windows) > 2
    assert max(window.num_tokens for window in windows) <= 40
    assert sum(int((window.tags >= 0).sum()) for window in windows) == len(record.words)
    assert all(window.tags[-1] >= 0 for window in windows)
    assert read_back(task, record, renderer, 40).tags == tuple(row["tags"])
    assert task.examples(record, renderer, 40, "drop") == []
    with pytest.raises(RowError) as caught:
        task.examples(record, renderer, 40, "error")
    assert caught.value.kind == "truncated"


def test_a_word_longer_than_a_window_is_read_at_its_end(tmp_path: Path) -> None:
    renderer = renderer_of(tmp_path)
    record = ONCE.parse({"tokens": ["x" * 90, "Paris"], "tags": ["O", "B-place"]})
    assert read_back(ONCE, record, renderer, 16).tags == ("O", "B-place")


@pytest.mark.parametrize(
    ("row", "field", "said"),
    [
        ({"tokens": "Ada", "tags": []}, "tokens", "a list of words"),
        ({"tokens": [], "tags": []}, "tokens", "empty list"),
        ({"tokens": ["a", ""], "tags": ["O", "O"]}, "tokens[1]", "empty"),
        ({"tokens": ["a", 5], "tags": ["O", "O"]}, "tokens[1]", "a number"),
        ({"tokens": ["a"], "tags": ["O", "O"]}, "tags", "2 tags for 1 tokens"),
        ({"tokens": ["a"], "tags": ["person"]}, "tags[0]", "B-type"),
        ({"tokens": ["a"], "tags": ["S-person"]}, "tags[0]", "BIOES"),
        ({"tokens": ["a"], "tags": [3]}, "tags[0]", "names of the tags"),
        ({"tokens": ["a"], "tags": ["B-persn"]}, "tags[0]", "did you mean 'person'"),
        ({"text": "Ada", "spans": "none"}, "spans", "a list"),
        ({"text": "Ada", "spans": [{"start": 0, "end": 9, "label": "person"}]}, "spans[0]", "of a text of 3"),
        ({"text": "Ada", "spans": [{"start": 2, "end": 2, "label": "person"}]}, "spans[0]", "start before its end"),
        ({"text": "Ada", "spans": [{"start": "0", "end": 2, "label": "person"}]}, "spans[0]", "in characters"),
        ({"text": "Adam", "spans": [[0, 3, "person"]]}, "spans[0]", "cuts the word 'Adam'"),
        ({"text": "a  b", "spans": [[1, 2, "person"]]}, "spans[0]", "nothing but white space"),
        ({"text": "a b c", "spans": [[0, 3, "person"], [2, 5, "place"]]}, "spans", "over each other"),
        ({"text": "Ada", "spans": [[0, 3, "planet"]]}, "spans[0]", "not one of the 2 types"),
        ({"text": "  ", "spans": []}, "text", "empty"),
    ],
)
def test_what_does_not_hold_is_named(row: dict[str, Any], field: str, said: str) -> None:
    with pytest.raises(RowError, match=None) as caught:
        ONCE.parse(row)
    assert caught.value.field == field
    assert said in caught.value.message


def test_types_are_settled_once_and_at_least_one() -> None:
    for labels in ([], ["a", "a"]):
        with pytest.raises(DataError, match="each once"):
            task_for(TaggingConfig()).with_labels(labels)
    named = task_for(TaggingConfig(labels=["place"]))
    assert named.outputs == tag_names(["place"]) == ("O", "B-place", "I-place")
    with pytest.raises(RowError, match="'person' is not one of"):
        named.parse(TOKENS)


def test_a_query_needs_no_tags_and_passes_over_unknown_ones() -> None:
    shaper = Shaper("tagging", fields={"tokens": "words"})
    assert ONCE.parse_query(shaper.shape({"words": ["Ada"]}, is_query=True)).spans == ()
    assert ONCE.parse_query({"tokens": ["Ada"], "tags": ["B-planet"]}).spans == ()


def test_tags_and_spans_are_one_another() -> None:
    words = ((0, 1), (2, 3), (4, 5), (6, 7))
    for tags in (("B-x", "I-x", "O", "B-y"), ("B-x", "B-x", "I-x", "O"), ("O",) * 4):
        assert tags_of(words, spans_of(words, tags)) == tags
    # An I without its B begins an entity, as in seqeval.
    assert spans_of(words, ("I-x", "I-y", "O", "I-y")) == (Span(0, 1, "x"), Span(2, 3, "y"), Span(6, 7, "y"))


def test_words_of_plain_texts() -> None:
    def words(text: str) -> list[str]:
        return [text[a:b] for a, b in split_words(text)]

    assert words("Zoë's 3.5-litre") == ["Zoë", "'", "s", "3", ".", "5", "-", "litre"]
    assert words("東京 is Tokyo都") == ["東", "京", "is", "Tokyo", "都"]
    assert words("snake_case 😀😀") == ["snake", "_", "case", "😀", "😀"]


def test_counts_equal_seqevals() -> None:
    from seqeval.metrics import f1_score, precision_score, recall_score

    draw = np.random.default_rng(0)
    names = tag_names(["a", "b", "c"])
    true = [[names[i] for i in draw.integers(len(names), size=draw.integers(1, 12))] for _ in range(60)]
    found = [[t if draw.random() < 0.6 else names[draw.integers(len(names))] for t in row] for row in true]
    rows = [ratios(entities(f), entities(t)) for f, t in zip(found, true, strict=True)]
    for name, score in (("f1", f1_score), ("precision", precision_score), ("recall", recall_score)):
        above, below = np.sum([row[name] for row in rows], axis=0)
        assert above / below == pytest.approx(score(true, found), abs=1e-12)
    by_type = [ratios_by_type(entities(f), entities(t)) for f, t in zip(found, true, strict=True)]
    theirs = f1_score(true, found, average=None)
    for label, expected in zip("abc", theirs, strict=True):
        above, below = np.sum([row[label]["f1"] for row in by_type if label in row], axis=0)
        assert above / below == pytest.approx(expected, abs=1e-12)


def test_seqeval_finds_the_entities_that_are_presented() -> None:
    draw = np.random.default_rng(1)
    names = tag_names(["a", "b"])
    for _ in range(200):
        tags = tuple(names[i] for i in draw.integers(len(names), size=8))
        words = tuple((2 * k, 2 * k + 1) for k in range(8))
        ours = {(span.label, span.start // 2, (span.end - 1) // 2) for span in spans_of(words, tags)}
        assert ours == entities(tags)


def test_marks_say_what_a_person_reads() -> None:
    record = ONCE.parse(TOKENS)
    marks = ONCE.mark(record, Tags(("B-person", "O", "O", "O", "B-place", "O"), (0.9,) * 6))
    assert marks.reference == "Ada Lovelace [person]\nParis [place]"
    assert marks.reply == "Ada [person]\nParis [place]"
    assert marks.is_right is False
    assert marks.ratios == {"f1": (2.0, 4.0), "precision": (1.0, 2.0), "recall": (1.0, 2.0)}
    assert marks.parts["person"]["recall"] == (0.0, 1.0)
    assert marks.is_exact is None


def test_a_recipe_takes_other_columns() -> None:
    recipe = Recipe.model_validate({"task": "tagging", "data": {"train": "x", "fields": {"tags": "ner_tags"}}})
    shaper = Shaper("tagging", fields=recipe.data.fields)
    assert ONCE.parse(shaper.shape({"tokens": ["Ada"], "ner_tags": ["B-person"]})).spans == (Span(0, 3, "person"),)
    assert ONCE.parse(shaper.shape({"tokens": '["Ada"]', "ner_tags": '["O"]'})).spans == ()  # as a CSV column holds it
