"""What both heads of classification have in common: the text as tokens, and how labels are written in rows.

    [BOS, where the tokenizer adds one] text
    [CLS] text [SEP]        for an encoder, whose head reads the first token

A causal base's head reads the hidden state at the last token. transformers' `*ForSequenceClassification` reads it at
the right-most token that is not the padding token; so that both are the same place, a text never ends in the padding
token here: what stands there of it is taken off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.data.rows import RowError, preview
from luthier.data.template import Renderer
from luthier.errors import nearest
from luthier.tasks.fit import cut_to, too_long
from luthier.tasks.shapes import require_text, unpack_json
from luthier.tasks.task import Truncation


def read_text(text: str, renderer: Renderer, max_length: int, truncation: Truncation) -> NDArray[np.int32] | None:
    """The text's tokens, or None where it is left out for its length.

    Raises:
        RowError: as `Task.examples`, and kind "empty" for a text without tokens.
    """
    if renderer.sep_id is not None:
        return _read_between(text, renderer, renderer.longest(max_length), truncation)
    ids = _strip_padding(renderer.with_bos(renderer.encode(text)), renderer.pad_id)
    if len(ids) > max_length and truncation == "error":
        raise too_long(len(ids), max_length)
    if len(ids) > max_length and truncation == "drop":
        return None
    tokens = np.asarray(ids, dtype=np.int32)
    weights = np.zeros(tokens.shape, dtype=np.float32)
    tokens, _ = cut_to(tokens, weights, renderer.bos_id, max_length, truncation)
    tokens = np.asarray(_strip_padding(tokens.tolist(), renderer.pad_id), dtype=np.int32)
    if len(tokens) <= int(renderer.bos_id is not None):
        raise _without_tokens(text)
    return tokens


def _read_between(text: str, renderer: Renderer, max_length: int, truncation: Truncation) -> NDArray[np.int32] | None:
    """`read_text` for an encoder: the tokens between those that its tokenizer puts around a text."""
    first, ids, last = renderer.between(renderer.encode(text))
    if not ids:
        raise _without_tokens(text)
    most = max(max_length - len(first) - len(last), 1)
    if len(ids) > most and truncation == "error":
        raise too_long(len(ids) + len(first) + len(last), max_length)
    if len(ids) > most and truncation == "drop":
        return None
    kept = ids[-most:] if truncation == "start" else ids[:most]
    return np.asarray([*first, *kept, *last], dtype=np.int32)


def _without_tokens(text: str) -> RowError:
    return RowError("text", f"{preview(text)} has no tokens of its own", "some text", kind="empty")


def parse_label(value: Any) -> str:
    """One label: a text, or a whole number.

    Raises:
        RowError: for anything else; a list is told how texts with several labels are learnt.
    """
    unpacked = unpack_json(value)
    if isinstance(unpacked, list | tuple) and all(isinstance(item, str) for item in unpacked):
        raise RowError(
            "label",
            f"is the list {preview(unpacked)}",
            "one label, since task.multiple is false",
            "set `task: {type: classification, multiple: true}` where a text may have several labels or none",
            kind="label",
        )
    return _parse_one(value, "label")


def parse_labels(value: Any) -> tuple[str, ...]:
    """Any number of labels, sorted and each once: a list (as JSON in a text column, too), or one label by itself.

    Raises:
        RowError: for anything else.
    """
    unpacked = unpack_json(value)
    if not isinstance(unpacked, list | tuple):
        if isinstance(value, str) and not value.strip():
            raise RowError("label", "is empty", "a label, or a list of labels", "write [] for none", kind="empty")
        return (_parse_one(value, "label"),)
    return tuple(sorted({_parse_one(item, f"label[{place}]") for place, item in enumerate(unpacked)}))


def _parse_one(value: Any, where: str) -> str:
    # A column of whole numbers with gaps is read as floats from CSV and Parquet.
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise RowError(where, f"is {preview(value)}", "a text or a whole number")
    return require_text(value, where).strip()


def unknown_label(label: str, labels: Sequence[str], *, in_training: bool = True) -> RowError:
    """The complaint about a label that is none of the task's.

    Args:
        in_training: The labels are the recipe's; otherwise they are those of the training rows.
    """
    if in_training:
        return RowError(
            "label",
            f"{label!r} is not one of the {len(labels)} labels{nearest(label, labels)}",
            f"one of {few(labels)}",
            "correct the label, or add it under task.labels",
            kind="label",
        )
    return RowError(
        "label",
        f"{label!r} does not occur in the training rows{nearest(label, labels)}",
        f"one of {few(labels)}",
        "add training rows of this class, or correct the label",
        kind="label",
    )


def few(labels: Sequence[str], limit: int = 10) -> str:
    """The first labels, and how many more there are."""
    shown = ", ".join(labels[:limit])
    return shown if len(labels) <= limit else f"{shown} and {len(labels) - limit} more"


def _strip_padding(ids: Sequence[int], pad_id: int) -> list[int]:
    end = len(ids)
    while end and ids[end - 1] == pad_id:
        end -= 1
    return list(ids[:end])
