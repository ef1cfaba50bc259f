"""A slot's values on the way into a checkpoint and back: the one place that asks whose slot it is.

A slot of the bank is written as PEFT's adapter files, an exclusive job's as its exact tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from luthier.base.load import Base
from luthier.checkpoints.own_files import read_trained, write_trained
from luthier.checkpoints.peft_format import load_values, write_adapter
from luthier.checkpoints.peft_names import is_stored
from luthier.engine.own import OwnSlot
from luthier.engine.slot import Slot


def write_slot(
    slot: Slot | OwnSlot,
    base: Base,
    folder: Path,
    *,
    base_name: str,
    labels: Sequence[str] | None = None,
    pad_token_id: int | None = None,
    threshold: float | None = None,
) -> None:
    """Write a slot so that `read_slot` restores it to the bit; arguments and errors as `write_adapter`."""
    if isinstance(slot, OwnSlot):
        write_trained(slot, folder)
    else:
        write_adapter(
            slot, base, folder, base_name=base_name, labels=labels, pad_token_id=pad_token_id, threshold=threshold
        )


def read_slot(slot: Slot | OwnSlot, base: Base, folder: Path) -> None:
    """Put a checkpoint's values into a slot that was made alike.

    Raises:
        ModelError: when they do not fit it, or are damaged.
    """
    if isinstance(slot, OwnSlot):
        read_trained(slot, folder)
    else:
        load_values(slot, base, folder)


def keeps_moments(parameter: str, slot: Slot | OwnSlot) -> bool:
    """Whether a checkpoint must hold this parameter's moments; of own weights some may never get a gradient."""
    return isinstance(slot, Slot) and is_stored(parameter, slot)
