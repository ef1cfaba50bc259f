"""Which bases are encoders, told from config.json alone: they read a text in both directions and never write one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.errors import RecipeError
from luthier.types import Objective

_COUNTS_FROM_PADDING = frozenset({"roberta", "xlm-roberta", "camembert", "mpnet"})
"""A text's first position is the one after the padding token's id, as in fairseq."""

ENCODERS = _COUNTS_FROM_PADDING | {"bert", "distilbert", "electra", "modernbert"}
"""`model_type` of the encoders that are known here.

DeBERTa is none of them: its query and key layers read the table of relative positions too, rows of no job.
"""

HEAD_OBJECTIVES: tuple[Objective, ...] = ("sequence_head", "multilabel_head", "token_head")
"""What an encoder learns: a head reads what it makes of a text."""


def is_encoder(config: Mapping[str, Any]) -> bool:
    """Whether config.json describes an encoder. One that was turned into a decoder (`is_decoder`) is a causal model."""
    return config.get("model_type") in ENCODERS and not config.get("is_decoder")


def counts_from_padding(model_type: str) -> bool:
    """Whether positions of this architecture follow from the tokens: padding has none, and the first is past its id."""
    return model_type in _COUNTS_FROM_PADDING


def num_positions(config: Mapping[str, Any]) -> int | None:
    """Most tokens of a text, or None where config.json does not say."""
    rows = config.get("max_position_embeddings")
    if not isinstance(rows, int):
        return None
    if not counts_from_padding(str(config.get("model_type"))):
        return rows
    padding = config.get("pad_token_id")
    return rows - 1 - (padding if isinstance(padding, int) else 1)


def check_encoder_task(name: str, objective: Objective, model_type: str = "") -> None:
    """Refuse a task that an encoder cannot learn.

    Args:
        name: The task's, as in a recipe.
        model_type: The encoder's, where it is known.

    Raises:
        RecipeError: saying what an encoder learns, and what else to do.
    """
    if objective in HEAD_OBJECTIVES:
        return
    found = "classification with head: words" if name == "classification" else name
    kind = f" ({model_type})" if model_type else ""
    raise RecipeError(
        f"the base is an encoder{kind}, which reads texts and does not write, and the task is {found}",
        "task: classification (with head: linear) or task: tagging",
        "choose one of the two, or a base that writes; `luthier models` lists some",
    )
