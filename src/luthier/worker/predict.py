"""What a head says about texts: a class or labels, with the probabilities of all.

Shapes: C sequences, K classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from luthier.base.adapter_files import CLASSIFIER_FOLDER, MULTILABEL
from luthier.base.folder import read_json
from luthier.base.load import Base
from luthier.data.rows import RowError
from luthier.data.template import Renderer
from luthier.engine.own import OwnSlot
from luthier.engine.pack import PackItem, pack
from luthier.engine.slot import Slot
from luthier.engine.step import head_probabilities
from luthier.errors import ModelError
from luthier.tasks.classification.schema import ClassificationConfig
from luthier.tasks.registry import task_for
from luthier.tasks.task import Task
from luthier.types import DEFAULT_THRESHOLD


def predict(base: Base, slot: Slot | OwnSlot, renderer: Renderer, folder: Path, texts: list[str]) -> dict[str, Any]:
    """Classify texts as they were trained on.

    Raises:
        ModelError: for an adapter without a head, or a text that the renderer refuses.
    """
    if slot.head is None:
        raise ModelError("this model has no head to predict with", fix="chat with it")
    task = _task(folder)
    most = base.max_positions or 2**31 - 1
    items = []
    for at, text in enumerate(texts):
        try:
            (example,) = task.queries(task.parse_query({"text": text}), renderer, most, at)
        except (RowError, ValueError) as error:
            reason = error.found if isinstance(error, RowError) else "it has no tokens"
            raise ModelError(f"input[{at}]: {reason}") from None
        items.append(PackItem(example, slot.index))
    probabilities_CK = head_probabilities(base, pack(items, base.device)).cpu().numpy()
    # Unrounded, and in the order of the classes.
    order = {label: k for k, label in enumerate(task.labels)}
    rows = []
    for row_K in probabilities_CK:
        prediction = task.read(None, renderer, most, [row_K[None]])
        row = task.present(None, prediction)
        rows.append(row | {"probabilities": dict(sorted(prediction.items(), key=lambda pair: order[pair[0]]))})
    return {"predictions": rows, "num_tokens": sum(item.example.num_tokens for item in items)}


def _task(folder: Path) -> Task:
    """The task of a head's config: an adapter's in a folder of its own, a whole classifier's beside its weights."""
    beside = folder / CLASSIFIER_FOLDER / "config.json"
    config = read_json(beside if beside.exists() else folder / "config.json")
    names = {int(index): label for index, label in config["id2label"].items()}
    labels = [names[index] for index in range(len(names))]
    options: dict[str, Any] = {}
    if config.get("problem_type") == MULTILABEL:
        options = {"multiple": True, "threshold": config.get("label_threshold", DEFAULT_THRESHOLD)}
    return task_for(ClassificationConfig(labels=labels, **options))
