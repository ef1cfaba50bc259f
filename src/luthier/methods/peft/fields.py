"""Is this a method that the installed `peft` has and the engine can run, and are its fields right? Needs no model.

Importing this module does not import peft; its functions do, and peft imports torch.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from luthier.errors import RecipeError, nearest
from luthier.types import ExclusiveSpec

VIRTUAL_TOKENS = frozenset({"PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING"})
"""Methods that put virtual tokens before every sequence."""

_BY_LUTHIER = {
    "peft_type": "the method's name says it",
    "task_type": "the recipe's task says it",
    "auto_mapping": "it names classes to load, and the recipe's base says which",
    "base_model_name_or_path": "the recipe's base says it",
    "revision": "the recipe's base says it",
    "inference_mode": "a run trains",
    "peft_version": "the installed peft says it",
    "total_step": "it follows from the data and train.epochs",
    "rank_pattern": "",
    "tokenizer_name_or_path": "the recipe's base says it",
}
"""Fields that Luthier fills in, and why."""

_REFUSED = {
    "CARTRIDGE": "it begins from keys and values of a text that is run through the base first",
    "CPT": "its loss is its own, over labels of the context",
    "MULTITASK_PROMPT_TUNING": "every row would need the number of its task",
    "POLY": "every row would need the number of its task",
    "SHADOW": "a second network runs beside the base",
    "XLORA": "it mixes adapters that are trained already",
    "ADAPTION_PROMPT": "its prompts are attended to outside of the attention that is measured and cached",
}
"""Methods that the shared loop cannot run, and why."""

STEPS_IF_UNKNOWN = 1_000_000
"""For a config that wants the number of steps, held against base and fields before the data is known."""

_IN_BANK = {"LORA": "lora", "IA3": "ia3"}
_ADVICE = "`pip show peft` says which version is installed; its documentation lists the fields"


def check_fields(spec: ExclusiveSpec) -> None:
    """Refuse an unknown method, an unknown field, or values that peft's own config refuses.

    Raises:
        RecipeError: naming the nearest known name, or peft's own reason.
    """
    known = known_types()
    name = spec.peft_type
    if name not in known:
        raise RecipeError(
            f"method.name: peft has no method {name.lower()!r}{nearest(name.lower(), [k.lower() for k in known])}",
            "one of " + ", ".join(sorted(k.lower() for k in known)),
        )
    if name in _REFUSED:
        raise RecipeError(
            f"method.name: {name.lower()} cannot run here: {_REFUSED[name]}",
            "a method that trains on rows by themselves",
            "choose another, such as prefix, lokr or boft",
        )
    config_class = known[name]
    fields = {field.name for field in dataclasses.fields(config_class)} - set(_hidden(name))
    for option in spec.options:
        if option in _hidden(name):
            raise RecipeError(
                f"method.config.{option} is filled in by Luthier: {_BY_LUTHIER[option]}", fix="leave it out"
            )
        if option not in fields:
            raise RecipeError(
                f"method.config.{option} is not a field of {config_class.__name__}{nearest(option, fields)}",
                "one of " + ", ".join(sorted(fields)),
                _ADVICE,
            )
    if spec.options.get("boft_n_butterfly_factor", 1) != 1:
        raise RecipeError(
            f"method.config.boft_n_butterfly_factor: found {spec.options['boft_n_butterfly_factor']!r}; more than one "
            "factor needs an extension that peft compiles as it loads, and without it takes 1 in silence",
            "1",
            "leave it out; Luthier compiles nothing",
        )
    make_config(spec, task_type="CAUSAL_LM", total_steps=spec.total_steps or STEPS_IF_UNKNOWN)


def make_config(spec: ExclusiveSpec, *, task_type: str, total_steps: int | None, tokenizer: str | None = None) -> Any:
    """peft's own config object.

    Raises:
        RecipeError: for values that the field's type or peft itself does not take.
    """
    config_class = known_types()[spec.peft_type]
    values = dict(spec.options)
    if "total_step" in config_class.__dataclass_fields__:
        values["total_step"] = total_steps
    if "tokenizer_name_or_path" in config_class.__dataclass_fields__:
        values["tokenizer_name_or_path"] = tokenizer
        if str(values.get("prompt_tuning_init")).endswith("TEXT") and tokenizer is None:
            values["tokenizer_name_or_path"] = "-"
    try:
        return config_class(task_type=task_type, **values)
    except (ValueError, TypeError, ImportError, AssertionError, KeyError) as error:
        raise RecipeError(
            f"method: peft does not take these fields of {spec.peft_type.lower()}: {first_line(error)}",
            fix=_ADVICE,
        ) from None


def first_line(error: BaseException) -> str:
    """The first line of an error, short enough for one message."""
    text = str(error).strip() or type(error).__name__
    return " ".join(text.splitlines()[0].split())[:300]


def known_types() -> dict[str, type[Any]]:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def _hidden(name: str) -> dict[str, str]:
    hidden = dict(_BY_LUTHIER)
    if name != "ADALORA":
        del hidden["rank_pattern"]
    else:
        hidden["rank_pattern"] = "training finds it"
    return hidden
