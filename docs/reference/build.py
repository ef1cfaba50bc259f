"""Write docs/reference/recipe.md from the recipe's own models: their fields, types, bounds, defaults and docstrings.

    python docs/reference/build.py

`tests/test_docs.py` asserts that the page is up to date and every field documented.
"""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from luthier.compute import ZERO_TABLE, ComputeConfig
from luthier.deepspeed_file import FIELDS, Rule
from luthier.files import write_text
from luthier.methods.config import MethodConfig
from luthier.methods.exclusive.config import ExclusiveConfig
from luthier.recipe import DataConfig, EvaluationConfig, Recipe, ReplayConfig, TrainConfig
from luthier.tasks.config import TaskConfig

PAGE = Path(__file__).with_name("recipe.md")

HEAD = """# The recipe, field by field

Written by `python docs/reference/build.py` from the recipe's own models; a test keeps it up to date.

A recipe is a YAML or JSON file. Only `data.train` has no default; `RUN/recipe.yaml` of any run is the whole recipe with
every default written out. An unknown field is an error that names the nearest known one.
`--set train.epochs=3` overrides any field on the command line; the value is read as YAML.
Relative data paths are looked for in the current folder first, then in the recipe's own.
"""

_NAMES = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    type(None): "null",
    list[str]: "list of texts",
    dict[str, str]: "mapping of texts",
    dict[str, Any]: "mapping",
    tuple[float, float]: "two numbers",
}
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def page() -> str:
    """The whole page as Markdown."""
    parts = [HEAD, _section("Top level", Recipe)]
    parts += [_section("`data`", DataConfig), _section("`data.replay`", ReplayConfig)]
    parts += [_section(f"`task: {_type_of(task)}`", task) for task in choices(TaskConfig)]
    parts += [_method_section(method) for method in choices(MethodConfig)]
    parts += [_section("`train`", TrainConfig), _section("`evaluation`", EvaluationConfig)]
    parts += [_section("`compute`", ComputeConfig), _zero_table(), _deepspeed_table()]
    return "\n".join(parts)


def _zero_table() -> str:
    """Which methods train under which stage of ZeRO."""
    lines = ["Methods under ZeRO; `over NF4` are `qlora`, and `dora` and `ia3` with `quantization: nf4`:", ""]
    lines += ["| method | `zero: 1` | `zero: 2` | `zero: 3` |", "|---|---|---|---|"]
    for kind in dict.fromkeys(kind for kind, _ in ZERO_TABLE):
        cells = [ZERO_TABLE[kind, stage] for stage in (1, 2, 3)]
        lines.append(f"| {kind} | " + " | ".join(f"refused: {cell}" if cell else "yes" for cell in cells) + " |")
    return "\n".join(lines) + "\n"


_RULES = {
    "recipe": "the recipe's: {note}",
    "fixed": "{value} alone: {note}",
    "unused": "no effect: {note}",
    "refused": "refused, unless off: {note}",
    "passed": "DeepSpeed's",
}


def _deepspeed_table() -> str:
    """What becomes of the fields of a DeepSpeed file."""
    lines = ["### `compute.deepspeed`", ""]
    lines += ['Fields of a DeepSpeed file of your own; others are errors. `"auto"` leaves any of them to the recipe,']
    lines += ["to Luthier or to DeepSpeed's default. Those of the recipe must say what it says.", ""]
    lines += ["| what becomes of them | fields |", "|---|---|"]
    groups: dict[str, list[str]] = {}
    for name, rule in FIELDS.items():
        groups.setdefault(_rule_text(rule), []).append(f"`{name}`")
    lines += [f"| {text} | {', '.join(names)} |" for text, names in sorted(groups.items(), key=_by_kind)]
    return "\n".join(lines) + "\n"


def _rule_text(rule: Rule) -> str:
    note = f"`{rule.note}`" if rule.kind == "recipe" else rule.note
    note += "".join(f", {ours} as `{json.dumps(theirs)}`" for ours, theirs in rule.words.items())
    return _RULES[rule.kind].format(note=note, value=f"`{json.dumps(rule.value)}`")


def _by_kind(group: tuple[str, list[str]]) -> int:
    kinds = list(_RULES)
    return kinds.index(FIELDS[group[1][0].strip("`")].kind)


def choices(union: Any) -> list[type[BaseModel]]:
    """The models behind a field that is chosen by `type`: one, or the members of a discriminated union."""
    if isinstance(union, type):
        return [union]
    return [model for part in get_args(union) for model in (get_args(part) or [part]) if isinstance(model, type)]


def documented_fields(model: type[BaseModel]) -> dict[str, tuple[FieldInfo, str]]:
    """Name -> (field, what it means); `type`, which the heading says, is left out."""
    return {
        name: (field, field.description or _sections(field))
        for name, field in model.model_fields.items()
        if name != "type"
    }


def _section(title: str, model: type[BaseModel]) -> str:
    lines = [f"## {title}", "", " ".join((model.__doc__ or "").split())]
    fields = documented_fields(model)
    if fields:
        lines += ["", "| field | value | default | meaning |", "|---|---|---|---|"]
    for name, (field, meaning) in fields.items():
        cells = [f"`{name}`", _value(field), _default(field), " ".join(meaning.split())]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _method_section(method: type[BaseModel]) -> str:
    """A method's fields, and a link to its own page where there is one."""
    name = _type_of(method)
    section = _section(f"`method: {name}`", method)
    link = f"{name}.md" if (PAGE.parents[1] / "methods" / f"{name}.md").exists() else f"peft.md#{name}"
    is_described = not link.startswith("peft.md#") or issubclass(method, ExclusiveConfig)
    return section + (f"\n[Equation, cost and when to choose it](../methods/{link})\n" if is_described else "")


def _type_of(model: type[BaseModel]) -> str:
    return str(model.model_fields["type"].default)


def _sections(field: FieldInfo) -> str:
    """A field that is a section of its own is documented by its model."""
    return next((model.__doc__ or "" for model in choices(field.annotation) if issubclass(model, BaseModel)), "")


def _value(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {bound:g}"
        for part in field.metadata
        for name, sign in _BOUNDS.items()
        if (bound := getattr(part, name, None)) is not None
    ]
    return ", ".join([_type_text(field.annotation), *bounds])


def _type_text(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(annotation))
    if annotation in _NAMES:
        return _NAMES[annotation]
    if get_origin(annotation) in (Union, types.UnionType):
        are_models = all(hasattr(part, "model_fields") for part in get_args(annotation))
        return (", " if are_models else " or ").join(_type_text(part) for part in get_args(annotation))
    return f"`{_type_of(annotation)}`" if "type" in annotation.model_fields else "section"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    return "" if isinstance(default, BaseModel) else f"`{json.dumps(default, ensure_ascii=False)}`"


if __name__ == "__main__":
    write_text(PAGE, page())
