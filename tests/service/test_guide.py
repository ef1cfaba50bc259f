"""The guide for those who come from OpenAI: its code runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from running import BASE, Service, chat_rows

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "moving-from-openai.md"


def test_the_guides_code_runs(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = tmp_path / "train.jsonl"
    train.write_bytes(chat_rows(20))
    for name, value in {
        "LUTHIER_URL": f"{service.url}/v1",
        "LUTHIER_KEY": service.keys["acme"],
        "LUTHIER_MODEL": BASE,
        "TRAIN_FILE": str(train),
    }.items():
        monkeypatch.setenv(name, value)
    blocks = re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(GUIDE), "exec"), scope)
