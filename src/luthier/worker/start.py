"""The slot of a job that goes on from an adapter: its values, and what of the recipe they do not agree with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from luthier.base.adapter_files import check_same_head
from luthier.base.load import Base
from luthier.base.own import OwnBase
from luthier.checkpoints.peft_format import slot_from_adapter
from luthier.engine.bank import Bank
from luthier.engine.own import OwnSlot
from luthier.engine.slot import Slot
from luthier.errors import RecipeError
from luthier.methods.peft.layer import PeftBase
from luthier.methods.registry import METHODS
from luthier.types import HEAD_NOUNS, AdapterSpec, HeadKind
from luthier.worker.progress import Progress


def started_slot(base: Base, start: str, spec: AdapterSpec, name: str, progress: Progress) -> Slot:
    """A slot of the bank with the values of an adapter or of a run's.

    Args:
        base: The resident base.
        start: The recipe's `start_from`.
        spec: The recipe's method.
        name: The run's, for what is said.
        progress: Hears of what holds instead of the recipe's word.

    Raises:
        RecipeError: when the adapter is not what the recipe's method goes on from.
    """
    if spec.init != "default":
        raise RecipeError(
            f"method.init is {spec.init}, and start_from names an adapter, which has its values already",
            "one of the two",
            "set method.init: default, or leave start_from out",
        )
    slot = slot_from_adapter(base, adapter_folder(start), spec.dropout, lora_plus_ratio=spec.lora_plus_ratio)
    check_same_head(start, _head_of(slot.spec), _head_of(spec))
    found, asked = _fit(slot.spec), _fit(spec)
    if found != asked:
        raise RecipeError(
            f"start_from: {start} is {found}",
            f"{asked}, as the recipe says",
            "set method (and the task) to what the adapter has",
        )
    _check_extras(base.bank, start, slot, spec)
    if other := _differences(base.bank, slot, spec):
        progress.note(f"{name} goes on with what {start} has, not the recipe: {'; '.join(other)}", "warning")
    return slot


def started_own_slot(base: OwnBase, start: str | None) -> OwnSlot:
    """The slot of an exclusive job, with the values of an adapter of peft where there is one to go on from."""
    if start is not None:
        assert isinstance(base, PeftBase), "own weights go on from a base, as was said before loading"
        base.start_from(adapter_folder(start))
    return base.slot


def adapter_folder(start: str) -> Path:
    """Where the adapter lies that `start_from` names: an adapter's folder, or that of a run with one."""
    folder = Path(start)
    return folder / "adapter" if (folder / "adapter").exists() else folder


def _head_of(spec: AdapterSpec) -> HeadKind | None:
    return spec.head if spec.num_classes is not None else None


def _fit(spec: AdapterSpec) -> str:
    """What an adapter must have in common with the recipe that goes on from it."""
    size = METHODS[spec.method].describe(replace(spec, lora_plus_ratio=1.0))  # how it learns may change
    head = f"{spec.num_classes or 'no'} {HEAD_NOUNS[spec.head]}"
    return ", ".join(part for part in (spec.method, size, head) if part)


def _check_extras(bank: Bank, start: str, slot: Slot, spec: AdapterSpec) -> None:
    """Every module and token that the recipe asks for must be in the adapter."""
    found: dict[str, set[Any]] = {
        "modules_to_save": set(slot.saved_modules),
        "new_tokens": set(slot.token_rows.ids_K.tolist()) if slot.token_rows is not None else set(),
    }
    wanted: dict[str, set[Any]] = {
        "modules_to_save": set(bank.resolve_modules(spec.modules_to_save)),
        "new_tokens": set(spec.new_tokens),
    }
    for name, has in found.items():
        if has != wanted[name] and (name == "new_tokens" or wanted[name] - has):
            raise RecipeError(
                f"start_from: {start} has {sorted(has) or 'none'} where method.{name} asks for "
                f"{sorted(wanted[name]) or 'none'}",
                "the modules and tokens that the adapter was trained with",
                f"set method.{name} as it was when the adapter was trained",
            )


def _differences(bank: Bank, slot: Slot, spec: AdapterSpec) -> list[str]:
    """What of the adapter holds instead of the recipe's method, so that none of it is passed over in silence."""
    other = []
    if (slot.spec.alpha, slot.spec.rank_stabilized) != (spec.alpha, spec.rank_stabilized):
        other.append(f"alpha {slot.spec.alpha:g}{' (rank-stabilized)' if slot.spec.rank_stabilized else ''}")
    if set(slot.adapters) != set(bank.resolve_targets(spec)):
        other.append("targets " + ", ".join(sorted({name.rsplit(".", 1)[-1] for name in slot.adapters})))
    if set(slot.saved_modules) != set(bank.resolve_modules(spec.modules_to_save)):
        other.append("modules_to_save " + ", ".join(sorted(slot.saved_modules)))
    return other
