"""Fixtures of the data tests: a tiny tokenizer with a chat template."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import CHATML_TEMPLATE, IM_END, IM_START, write_tokenizer

from luthier.data.template import Renderer


@pytest.fixture(scope="session")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    """A byte-level tokenizer with ChatML and a default system turn."""
    folder: Path = tmp_path_factory.mktemp("tokenizers") / "chatml"
    write_tokenizer(folder, template=CHATML_TEMPLATE, bos=IM_START, eos=IM_END, pad=IM_END)
    return Renderer.load(folder)
