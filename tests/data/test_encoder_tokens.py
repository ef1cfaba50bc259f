"""What an encoder reads: the tokens that its tokenizer puts around a text, once, and no more than it has positions."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import ENCODER_POSITIONS, write_tiny_encoder
from tiny_templates import write_family

from luthier.data.encoders import is_encoder, num_positions
from luthier.data.rows import RowError
from luthier.data.template import Renderer
from luthier.errors import RecipeError
from luthier.tasks.classification.schema import ClassificationConfig
from luthier.tasks.registry import task_for
from luthier.tasks.tagging.schema import TaggingConfig

CLASSIFY = task_for(ClassificationConfig()).with_labels(["cold", "warm"])
TAG = task_for(TaggingConfig()).with_labels(["place"])


@pytest.fixture(scope="module", params=["bert", "roberta"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_encoder(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="module")
def renderer(folder: Path) -> Renderer:
    return Renderer.load(folder)


def tokens_of(renderer: Renderer, text: str, max_length: int = 2048, truncation: str = "end") -> list[int]:
    record = CLASSIFY.parse({"text": text, "label": "cold"})
    (example,) = CLASSIFY.examples(record, renderer, max_length, truncation)  # type: ignore[arg-type]
    return example.tokens.tolist()


def test_the_ends_stand_once(folder: Path, renderer: Renderer) -> None:
    """The folder names no special token; they are those of tokenizer.json's own post-processor."""
    first, last = ("[CLS]", "[SEP]") if folder.name == "bert" else ("<s>", "</s>")
    ids = renderer.encode("two lamps")
    expected = [renderer.token_id(first), *ids, renderer.token_id(last)]
    assert tokens_of(renderer, "two lamps") == expected
    for text in (f"{first}two lamps", f"two lamps{last}", f"{first}two lamps{last}"):
        assert tokens_of(renderer, text) == expected
    with pytest.raises(RowError) as caught:
        tokens_of(renderer, f"{first}{last}")
    assert caught.value.kind == "empty"


def test_transformers_gives_equal_tokens_from_what_a_run_saves(
    folder: Path, renderer: Renderer, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    renderer.save(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    again = Renderer.load(tmp_path)
    for text in ("two lamps", "東京 😀", " in  Rome."):
        assert tokenizer(text).input_ids == tokens_of(renderer, text) == tokens_of(again, text)
    assert (tokenizer.pad_token_id, tokenizer.model_max_length) == (renderer.pad_id, ENCODER_POSITIONS)
    assert again.longest(2048) == ENCODER_POSITIONS
    assert renderer.pad_id == (1 if folder.name == "roberta" else 0)


def test_a_text_is_cut_between_its_ends(renderer: Renderer) -> None:
    text = "two plus two is four"
    first, last = renderer.bos_id, renderer.sep_id
    ids = renderer.encode(text)
    assert tokens_of(renderer, text, 8, "end") == [first, *ids[:6], last]
    assert tokens_of(renderer, text, 8, "start") == [first, *ids[-6:], last]
    record = CLASSIFY.parse({"text": text, "label": "cold"})
    assert CLASSIFY.examples(record, renderer, 8, "drop") == []
    with pytest.raises(RowError, match="tokens long") as caught:
        CLASSIFY.examples(record, renderer, 8, "error")
    assert caught.value.kind == "truncated"
    assert len(tokens_of(renderer, text * 40)) == ENCODER_POSITIONS  # whatever train.max_length allows


def test_tags_are_read_once_and_in_windows_with_ends(renderer: Renderer) -> None:
    words = ["in", *"Rome", "or", *"Oslo", "😀"]
    record = TAG.parse({"tokens": words, "tags": ["B-place"] + ["O"] * (len(words) - 1)})
    (example,) = TAG.examples(record, renderer, 2048)
    ids = renderer.encode(record.text)
    assert example.tokens.tolist() == [renderer.bos_id, *ids, renderer.sep_id]
    assert example.tags is not None
    assert example.tags[0] == example.tags[-1] == -1
    windows = TAG.examples(record, renderer, 12)
    assert len(windows) > 1
    assert [token for window in windows for token in window.tokens[1:-1]] == ids
    for window in windows:
        assert (window.tokens[0], window.tokens[-1]) == (renderer.bos_id, renderer.sep_id)
        assert window.num_tokens <= 12
    assert sum(int((window.tags != -1).sum()) for window in windows if window.tags is not None) == len(words)
    assert max(
        window.num_tokens for window in TAG.examples(TAG.parse_query({"text": "a b " * 90}), renderer, 2048)
    ) == (ENCODER_POSITIONS)
    twice = task_for(TaggingConfig(reads="twice")).with_labels(["place"])
    (example,) = twice.examples(record, renderer, 2048)
    assert example.tokens.tolist() == [renderer.bos_id, *ids, *renderer.encode("\n"), *ids, renderer.sep_id]


@pytest.mark.parametrize("family", ["chatml", "llama3"])
def test_a_base_that_writes_has_no_such_end(family: str, tmp_path: Path) -> None:
    renderer = Renderer.load(write_family(tmp_path, family))
    assert renderer.sep_id is None
    assert renderer.longest(10**6) == 10**6


def test_what_config_json_says() -> None:
    assert is_encoder({"model_type": "bert"})
    assert not is_encoder({"model_type": "bert", "is_decoder": True})
    assert not is_encoder({"model_type": "llama"})
    assert num_positions({"model_type": "bert", "max_position_embeddings": 512}) == 512
    assert num_positions({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}) == 512
    assert num_positions({"model_type": "bert"}) is None


def test_the_tasks_that_write_are_refused() -> None:
    from luthier.data.encoders import check_encoder_task

    for config in (ClassificationConfig(), ClassificationConfig(multiple=True), TaggingConfig()):
        check_encoder_task(config.type, task_for(config).objective, "bert")
    with pytest.raises(RecipeError, match=r"an encoder \(bert\), .* the task is classification with head: words"):
        check_encoder_task("classification", task_for(ClassificationConfig(head="words")).objective, "bert")
