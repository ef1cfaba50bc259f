"""The pictures that a run keeps in RUN/exhibits, as a report that stands alone shows them."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass

from luthier.evaluate.record import RunRecord

EXHIBITS, INDEX = "exhibits", "index.json"
MAX_BYTES = 2_000_000
"""Of one picture; a larger one stays out of the page."""

_TYPES = {".png": "image/png", ".svg": "image/svg+xml"}


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture whose whole content is its address: an image so shown runs no script and loads nothing."""

    caption: str
    address: str


def read_pictures(record: RunRecord) -> list[Picture]:
    """The pictures that RUN/exhibits/index.json names, in its order; none where there is no such file."""
    folder = record.path / EXHIBITS
    if not (folder / INDEX).exists():
        return []
    found = []
    try:
        for entry in json.loads((folder / INDEX).read_text(encoding="utf-8")):
            path = folder / str(entry["file"])
            kind = _TYPES.get(path.suffix)
            if kind is None or path.parent != folder or path.stat().st_size > MAX_BYTES:
                continue
            content = base64.b64encode(path.read_bytes()).decode("ascii")
            found.append(Picture(str(entry["caption"]), f"data:{kind};base64,{content}"))
    except (OSError, ValueError, TypeError, KeyError) as error:
        record.notes.append(f"{EXHIBITS}/{INDEX} cannot be read: {error}")
    return found
