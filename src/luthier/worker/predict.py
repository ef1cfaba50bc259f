"""What a head says about texts: classes with their probabilities.

Shapes: C sequences, K classes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from luthier.base.load import Base
from luthier.data.rows import RowError
from luthier.data.template import Renderer
from luthier.engine.own import OwnSlot
from luthier.engine.pack import PackItem, pack
from luthier.engine.slot import Slot
from luthier.engine.step import class_probabilities
from luthier.errors import ModelError
from luthier.tasks.classification.render import ClassificationTask
from luthier.tasks.classification.schema import LabelledText


def predict(base: Base, slot: Slot | OwnSlot, renderer: Renderer, folder: Path, texts: list[str]) -> dict[str, Any]:
    """Classify texts as they were trained on.

    Raises:
        ModelError: for an adapter without a head, or a text that the renderer refuses.
    """
    if slot.head is None:
        raise ModelError("this model has no head to predict with", fix="chat with it")
    labels = _labels(folder)
    task = ClassificationTask(labels=tuple(labels))
    most = base.max_positions or 2**31 - 1
    items = []
    for at, text in enumerate(texts):
        try:
            (example, *_) = task.examples(LabelledText(text, labels[0]), renderer, most, "end", at)
        except (RowError, ValueError) as error:
            reason = error.found if isinstance(error, RowError) else "it has no tokens"
            raise ModelError(f"input[{at}]: {reason}") from None
        items.append(PackItem(example, slot.index))
    probabilities_CK = class_probabilities(base, pack(items, base.device))
    rows = []
    for row_K in probabilities_CK.tolist():
        scores = dict(zip(labels, row_K, strict=True))
        best: str = labels[row_K.index(max(row_K))]
        rows.append({"label": best, "probabilities": scores})
    return {"predictions": rows, "num_tokens": sum(item.example.num_tokens for item in items)}


def _labels(folder: Path) -> list[str]:
    beside = folder / "classifier" / "config.json"  # an adapter's; a whole classifier has them in its own
    config = json.loads((beside if beside.exists() else folder / "config.json").read_text(encoding="utf-8"))
    names = {int(index): label for index, label in config["id2label"].items()}
    return [names[index] for index in range(len(names))]
