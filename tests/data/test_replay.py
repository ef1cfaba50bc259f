"""General text mixed into the training of another: how much, which of it, and what it is checked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.data.prepare import PreparedData, prepare
from luthier.data.replay import Mixed
from luthier.data.template import Renderer
from luthier.errors import DataError, RecipeError
from luthier.recipe import DataConfig, Recipe, validate
from luthier.tasks.completion.schema import CompletionConfig
from luthier.tasks.config import TaskConfig
from luthier.tasks.registry import task_for
from luthier.tasks.text.schema import TextConfig


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def prepared(
    folder: Path, renderer: Renderer, num_general: int = 60, task: TaskConfig | None = None, **replay: Any
) -> PreparedData:
    own = write(folder / "own.jsonl", [f"own text number {n} " + "word " * (n % 7) for n in range(40)])
    general = write(folder / "general.jsonl", [f"general text {n} " + "thing " * (n % 5) for n in range(num_general)])
    data = DataConfig.model_validate({"train": own, "replay": {"file": general, **replay}})
    return prepare(data, task_for(task or TextConfig()), renderer, max_length=64, folder=folder / "cache")


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_the_share_is_reached_by_whole_examples(share: float, tmp_path: Path, chatml: Renderer) -> None:
    data = prepared(tmp_path, chatml, share=share)
    mixed, replay = data.mixed, data.replay
    assert mixed is not None
    assert replay is not None
    replayed = mixed.total_tokens - data.train.total_tokens
    assert replayed == mixed.num_replayed_tokens
    assert mixed.total_tokens == sum(mixed[i].num_tokens for i in range(len(mixed))) == int(mixed.num_tokens.sum())
    wanted = share / (1 - share) * data.train.total_tokens
    assert wanted <= replayed < wanted + int(replay.train.num_tokens.max())
    own = [example.tokens.tolist() for example in data.train]
    assert [mixed[i].tokens.tolist() for i in range(len(own))] == own
    general = [example.tokens.tolist() for example in replay.train]
    chosen = [mixed[i].tokens.tolist() for i in range(len(own), len(mixed))]
    assert all(tokens in general for tokens in chosen)
    assert len(set(map(tuple, chosen))) == len(chosen)  # none twice while there are others
    assert data.report_json()["replay"]["share_of_tokens"] == pytest.approx(replayed / mixed.total_tokens, abs=1e-6)
    with pytest.raises(IndexError):
        mixed[len(mixed)]


def test_which_are_replayed_follows_from_the_seed(tmp_path: Path, chatml: Renderer) -> None:
    data = prepared(tmp_path, chatml, share=0.2)
    assert data.replay is not None

    def chosen(seed: int) -> list[list[int]]:
        assert data.replay is not None
        mixed = Mixed(data.train, data.replay.train, 0.2, seed)
        return [mixed[i].tokens.tolist() for i in range(len(data.train), len(mixed))]

    assert chosen(1) == chosen(1)
    assert chosen(1) != chosen(2)


def test_too_little_text_repeats_and_says_so(tmp_path: Path, chatml: Renderer) -> None:
    data = prepared(tmp_path, chatml, num_general=3, share=0.5, validation=0)
    assert data.mixed is not None
    assert data.replay is not None
    assert data.mixed.num_passes > 1
    assert any("repeats within the epoch" in warning for warning in data.report.warnings)
    counts = [data.mixed[i].tokens.tolist() for i in range(len(data.train), len(data.mixed))]
    times = [counts.count(example.tokens.tolist()) for example in data.replay.train]
    assert max(times) - min(times) <= 1  # all as often as the others, but for a begun pass


def test_rows_held_out_of_the_replayed_text_are_not_trained_on(tmp_path: Path, chatml: Renderer) -> None:
    data = prepared(tmp_path, chatml, share=0.5, validation=0.25)
    assert data.replay is not None
    assert data.replay.validation is not None
    assert data.mixed is not None
    held_out = {tuple(example.tokens.tolist()) for example in data.replay.validation}
    assert len(held_out) == 15
    assert not held_out & {tuple(data.mixed[i].tokens.tolist()) for i in range(len(data.mixed))}


def test_the_datas_hash_knows_the_replayed_text(tmp_path: Path, chatml: Renderer) -> None:
    first = prepared(tmp_path, chatml, share=0.2)
    assert prepared(tmp_path, chatml, share=0.2).data_hash == first.data_hash
    assert prepared(tmp_path, chatml, share=0.3).data_hash != first.data_hash
    assert prepared(tmp_path, chatml, num_general=61, share=0.2).data_hash != first.data_hash
    plain = prepare(
        DataConfig(train=str(tmp_path / "own.jsonl")),
        task_for(TextConfig()),
        chatml,
        max_length=64,
        folder=tmp_path / "c",
    )
    assert plain.data_hash != first.data_hash
    assert plain.examples is plain.train


def test_what_does_not_hold_is_refused(tmp_path: Path, chatml: Renderer) -> None:
    with pytest.raises(RecipeError, match=r"data\.replay: task completion"):
        prepared(tmp_path, chatml, task=CompletionConfig())
    general = write(tmp_path / "broken.jsonl", ["good", " "])
    data = DataConfig.model_validate({"train": str(tmp_path / "own.jsonl"), "replay": {"file": general}})
    with pytest.raises(DataError, match=r"broken\.jsonl, line 2"):
        prepare(data, task_for(TextConfig()), chatml, max_length=64, folder=tmp_path / "cache")
    for values in (
        {"file": []},
        {"file": "a", "share": 0},
        {"file": "a", "share": 1},
        {"share": 0.1},
        {"file": "a", "rate": 1},
    ):
        with pytest.raises(RecipeError, match="replay"):
            validate(Recipe, {"data": {"train": "x", "replay": values}}, "the recipe")
