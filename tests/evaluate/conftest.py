"""Run folders as a training leaves them."""

from __future__ import annotations

from pathlib import Path

import pytest
from evaluate_runs import build_chat_run, build_classification_run


@pytest.fixture
def chat_run(tmp_path: Path) -> Path:
    return build_chat_run(tmp_path / "first")


@pytest.fixture
def classification_run(tmp_path: Path) -> Path:
    return build_classification_run(tmp_path / "classes")
