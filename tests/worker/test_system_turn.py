"""Which system turn a run's chat begins with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from luthier.data.store import RecordWriter
from luthier.worker.system_turn import trained_system


def _write(run: Path, records: list[dict[str, Any]]) -> None:
    with RecordWriter(run / "data" / "key" / "train_records") as writer:
        for row, record in enumerate(records):
            writer.write(record, row)


def _chat(*systems: str) -> dict[str, Any]:
    turns = [{"role": "system", "content": system} for system in systems]
    return {"messages": [*turns, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([_chat("Be brief."), _chat("Be brief.")], "Be brief."),
        ([_chat("Be brief."), _chat("Be long.")], None),
        ([_chat("Be brief."), _chat()], None),
        ([_chat(), _chat()], None),
        ([{"prompt": "a", "completion": "b"}], None),
    ],
)
def test_only_a_system_turn_that_all_share_counts(
    tmp_path: Path, records: list[dict[str, Any]], expected: str | None
) -> None:
    _write(tmp_path, records)
    assert trained_system(tmp_path) == expected


def test_what_is_no_run_has_none(tmp_path: Path) -> None:
    assert trained_system(tmp_path) is None
    assert trained_system("smollm2-135m-instruct") is None
