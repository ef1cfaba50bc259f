"""Which methods the service takes, what a worker must hold for them, and from which tuned models they go on."""

from __future__ import annotations

from typing import Any

from luthier.errors import RecipeError
from luthier.extras import require_bitsandbytes
from luthier.methods.config import BANK_TYPES, InBank, OfPeft, OwnWeights
from luthier.registry.problems import InvalidRequestError
from luthier.store.held_base import HeldBase
from luthier.store.tables import Model

Method = InBank | OwnWeights | OfPeft

LAYER_FIELDS = frozenset({"target_modules", "exclude_modules", "modules_to_save", "layers_pattern"})
"""Fields of peft's that name layers: a list of names, for as one text they are a pattern that can run for ages."""
TEXT_FIELDS = frozenset(
    {
        "act_fn",
        "bias",
        "encoder_reparameterization_type",
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "variant",
        "wavelet_family",
    }
)
"""Fields of peft's whose texts are words or a prompt. Elsewhere a text may be a path, or a module to import."""


def check_method(method: Method) -> None:
    """Refuse what this installation does not run.

    Raises:
        InvalidRequestError: for NF4 without bitsandbytes, and for fields of peft's that reach beyond the job.
    """
    if method.quantization is not None:
        try:
            require_bitsandbytes(f"method {method.type}")
        except RecipeError as error:
            raise _refused(f"{error.found}; choose a method over the base as it is.") from None
    if method.type not in BANK_TYPES:
        for name, value in method.exclusive_spec().options.items():  # type: ignore[union-attr]
            if not _is_plain(name, value):
                raise _refused(f"luthier.method.config.{name} is not served, or not in this form; leave it out.")


def held_base(base: str, method: Method, parent: Model | None) -> tuple[HeldBase, str | None]:
    """What a worker must hold for a job, and the key prefix of the files that it begins from.

    Args:
        base: The base's name.
        parent: The tuned model to go on from.

    Raises:
        InvalidRequestError: when the method cannot go on from the parent.
    """
    quantization = method.quantization or ""
    if parent is None:
        return HeldBase(base, quantization), None
    is_of_peft = method.type not in BANK_TYPES and not method.exclusive_spec().owns_weights  # type: ignore[union-attr]
    if parent.form == "model":
        if parent.task == "classification":
            raise _misfit(parent, method, "is a whole classifier, which nothing can be tuned over; tune its base again")
        if is_of_peft:
            raise _misfit(parent, method, "has weights of its own; go on from it with lora, qlora, dora, ia3 or full")
        return HeldBase(base, quantization, parent.blob), None
    if parent.form == "layers":
        if not is_of_peft:
            raise _misfit(parent, method, "is layers of peft's; go on from it with the method that made them")
        return HeldBase(base), parent.blob
    if method.type not in BANK_TYPES:
        raise _misfit(parent, method, "is an adapter; go on from it with the method that made it")
    if quantization != parent.quantization:
        how = parent.quantization.upper() if parent.quantization else "as it is"
        raise _misfit(parent, method, f"was tuned over the base {how}; go on from it in the same way")
    return parent.held_base, parent.blob


def goes_on(parent_task: str, task: str) -> bool:
    """Whether a job of one task may go on from a model that was tuned for another: a chat model learns preferences,
    and what learnt them is a chat model."""
    return parent_task == task or {parent_task, task} == {"chat", "preference"}


def inherited_method(parent_method: dict[str, Any]) -> dict[str, Any]:
    """The method of a job that goes on from a tuned model and names none: the one that made it.

    Args:
        parent_method: As the spec of the model's job has it.
    """
    # How it began does not matter any more: its values are there.
    return {name: value for name, value in parent_method.items() if name != "init"}


def _is_plain(name: str, value: Any) -> bool:
    if name in LAYER_FIELDS:
        return value == "all-linear" or (isinstance(value, list) and all(isinstance(item, str) for item in value))
    if isinstance(value, str):
        return name in TEXT_FIELDS
    if isinstance(value, dict):
        return name.endswith("_pattern") and all(isinstance(item, int | float) for item in value.values())
    if isinstance(value, list):
        return all(isinstance(item, int | float) for item in value)
    return value is None or isinstance(value, int | float)


def _refused(message: str) -> InvalidRequestError:
    return InvalidRequestError(message, param="luthier", code="method_not_served")


def _misfit(parent: Model, method: Method, why: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{parent.id} {why}; found method {method.type}.", param="luthier.method", code="method_does_not_fit"
    )
