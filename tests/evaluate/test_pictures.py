"""The pictures that a report takes from RUN/exhibits."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from luthier.evaluate import pictures
from luthier.evaluate.pictures import read_pictures
from luthier.evaluate.record import RunRecord
from luthier.evaluate.report import render


def folder(path: Path, index: object, **files: bytes) -> RunRecord:
    (path / "exhibits").mkdir()
    (path / "exhibits/index.json").write_text(index if isinstance(index, str) else json.dumps(index), encoding="utf-8")
    for name, content in files.items():
        (path / "exhibits" / name.replace("_", ".")).write_bytes(content)
    return RunRecord(path)


def test_pictures_are_whole_in_the_page_and_captions_escaped(tmp_path: Path) -> None:
    record = folder(
        tmp_path,
        [{"file": "a.svg", "caption": "Row <1>"}, {"file": "b.png", "caption": "B"}],
        a_svg=b"<svg/>",
        b_png=b"\x89P",
    )
    found = read_pictures(record)
    assert [picture.caption for picture in found] == ["Row <1>", "B"]
    assert found[0].address == "data:image/svg+xml;base64," + base64.b64encode(b"<svg/>").decode()
    page = render(record)
    assert f'<img src="{found[1].address}" alt="B">' in page
    assert "Row &lt;1&gt;" in page
    assert "<svg/>" not in page


def test_what_is_no_picture_of_the_folder_stays_out(tmp_path: Path) -> None:
    (tmp_path / "secret.svg").write_bytes(b"<svg/>")
    names = ["../secret.svg", "tune.mid", "large.png"]
    index = [{"file": name, "caption": "x"} for name in names]
    record = folder(tmp_path, index, tune_mid=b"MThd", large_png=b"x" * (pictures.MAX_BYTES + 1))
    assert read_pictures(record) == []
    assert record.notes == []


def test_a_broken_index_is_a_note(tmp_path: Path) -> None:
    for n, index in enumerate(["{broken", "[1]", [{"file": "gone.svg", "caption": "x"}]]):
        (tmp_path / str(n)).mkdir()
        record = folder(tmp_path / str(n), index)
        assert "exhibits/index.json cannot be read" in render(record)
        assert read_pictures(RunRecord(tmp_path)) == []
