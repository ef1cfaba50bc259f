"""The shapes in which rows come, and how each becomes what a task parses.

| format         | columns                                                    | tasks            |
|----------------|------------------------------------------------------------|------------------|
| chat           | messages, optionally tools (OpenAI's fine-tuning rows)      | chat             |
| sharegpt       | conversations of {from, value}, optionally system and tools | chat             |
| prompt         | prompt, completion, optionally system                       | chat, completion |
| instruction    | instruction, output, optionally input and system            | chat, completion |
| dpo            | input, preferred_output, non_preferred_output (OpenAI's DPO) | preference       |
| preference     | chosen, rejected, mostly prompt; optionally system and tools | preference       |
| qa             | context, question, answers, optionally id                   | qa               |
| translation    | source, target, optionally source_lang and target_lang      | translation      |
| tokens         | tokens, tags (BIO)                                          | tagging          |
| spans          | text, spans of {start, end, label} in characters            | tagging          |
| abc            | abc, optionally prompt or instruction, title, rhythm, metre, key | music       |
| svg            | svg, and prompt, instruction or description                 | art              |
| text           | text                                                        | text             |
| classification | text, label                                                 | classification   |

Columns of other names are mapped by the recipe's `data.fields`, or composed by `data.template`. Columns beyond these
are left alone. Where a row holds one format more than another, the first in the table's order counts.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
import jinja2.sandbox

from luthier.data.rows import RowError, preview
from luthier.errors import RecipeError, nearest

_NO_ANSWER = "?"
"""Stands for the answer in a row that has none."""

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
    "function_call": "function_call",
    "observation": "tool",
    "tool": "tool",
}


@dataclass(frozen=True)
class Format:
    """One shape of rows: the columns that it needs, those that it may have, and the tasks that take it.

    Attributes:
        answers: Those of the needed columns that a row to predict for may lack.
    """

    needs: tuple[str, ...]
    tasks: tuple[str, ...]
    may_have: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()

    def needed(self, is_query: bool) -> tuple[str, ...]:
        """The columns that a row, or a row to predict for, cannot do without."""
        return tuple(name for name in self.needs if not (is_query and name in self.answers))

    @property
    def columns(self) -> tuple[str, ...]:
        return self.needs + self.may_have


FORMATS: dict[str, Format] = {
    "chat": Format(("messages",), ("chat",), ("tools",)),
    "sharegpt": Format(("conversations",), ("chat",), ("system", "tools")),
    "prompt": Format(("prompt", "completion"), ("chat", "completion"), ("system",), ("completion",)),
    "instruction": Format(("instruction", "output"), ("chat", "completion"), ("input", "system"), ("output",)),
    "dpo": Format(
        ("input", "preferred_output", "non_preferred_output"),
        ("preference",),
        answers=("preferred_output", "non_preferred_output"),
    ),
    "preference": Format(
        ("chosen", "rejected"), ("preference",), ("prompt", "system", "tools"), ("chosen", "rejected")
    ),
    "qa": Format(("context", "question", "answers"), ("qa",), ("id",), ("answers",)),
    "translation": Format(("source", "target"), ("translation",), ("source_lang", "target_lang"), ("target",)),
    "tokens": Format(("tokens", "tags"), ("tagging",), (), ("tags",)),
    "spans": Format(("text", "spans"), ("tagging",), (), ("spans",)),
    "abc": Format(("abc",), ("music",), ("prompt", "instruction", "title", "rhythm", "metre", "key"), answers=("abc",)),
    "svg": Format(("svg",), ("art",), ("prompt", "instruction", "description"), answers=("svg",)),
    "text": Format(("text",), ("text",)),
    "classification": Format(("text", "label"), ("classification",), (), ("label",)),
}
"""Every format by its name in a recipe."""


def recognize(columns: Sequence[str], task: str | None = None) -> str | None:
    """The format that these columns are in, or None.

    Args:
        columns: Column names of a row or a file.
        task: Consider only formats that this task takes. Without it, text with a label is classification.
    """
    order = sorted(FORMATS, key=lambda name: name == "text")  # text is also a part of classification
    matches = [name for name in order if task is None or task in FORMATS[name].tasks]
    return next((name for name in matches if set(FORMATS[name].needs) <= set(columns)), None)


def convert(row: Mapping[str, Any], format: str, task: str, is_query: bool = False) -> Mapping[str, Any]:
    """A row of a known format as the mapping that the task parses.

    Chat is given {messages, tools}, completion {prompt, completion}; the other tasks are given the columns of the
    format. Values are checked by the task; here only what must be taken apart is.

    Args:
        is_query: The row is to be predicted for, and may lack the answer.

    Raises:
        RowError: where a column is missing or cannot be taken apart.
    """
    shape = FORMATS[format]
    for name in shape.needed(is_query):
        if row.get(name) is None:
            raise _missing(name, row, f"columns of format {format!r}: {', '.join(shape.needs)}")
    converter = _CONVERTERS.get((format, task))
    if converter is not None:
        # A conversation is taken apart as a whole; an answer that is missing is put in and taken off by the task.
        missing = {name: _NO_ANSWER for name in shape.answers if row.get(name) is None} if is_query else {}
        return converter({**row, **missing})
    return {name: row[name] for name in shape.columns if row.get(name) is not None}


@dataclass(frozen=True)
class Shaper:
    """How the rows of one dataset become what its task parses: the plain values of the recipe's `data` section.

    Attributes:
        task: Name of the task.
        format: Name of a format, or "auto" to recognize each row by its columns.
        fields: Field of the task or format -> column that holds it.
        template: Field of the task or format -> jinja2 template over the row's columns.

    Raises:
        RecipeError: where the task does not take the format, or a template does not parse.
    """

    task: str
    format: str = "auto"
    fields: Mapping[str, str] = field(default_factory=dict)
    template: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        accepted = [name for name, shape in FORMATS.items() if self.task in shape.tasks]
        if self.format != "auto" and self.format not in accepted:
            raise RecipeError(
                f"data.format: {self.format!r} does not go with task {self.task!r}",
                f"auto, {', '.join(accepted)}",
                "choose one of these formats, or another task",
            )
        known = dict.fromkeys(column for name in accepted for column in FORMATS[name].columns)
        for section, mapping in (("fields", self.fields), ("template", self.template)):
            for name in mapping:
                if name not in known:
                    raise RecipeError(
                        f"data.{section}: {name!r} is not a field of task {self.task!r}{nearest(name, known)}",
                        f"one of {', '.join(known)}",
                    )
        for name, source in self.template.items():
            _compile(name, source)

    def shape(self, row: Mapping[str, Any] | str, is_query: bool = False) -> Mapping[str, Any]:
        """Map, compose and convert one raw row.

        Args:
            is_query: The row is to be predicted for: columns of the answer may be missing, and are not composed.

        Raises:
            RowError: where a column is missing, or no format fits.
        """
        if isinstance(row, str) and self.task == "text":
            row = {"text": row}
        if not isinstance(row, Mapping):
            raise RowError("", f"the row is {preview(row)}", "an object with named columns")
        shaped = dict(row)
        answers = self._answers() if is_query else frozenset[str]()
        for name, column in self.fields.items():
            if name in answers and column not in row:
                continue
            if column not in row:
                raise _missing(column, row, f"the column that data.fields maps onto {name!r}")
            shaped[name] = row[column]
        visible = dict(shaped)
        for name, source in self.template.items():
            if name not in answers:
                shaped[name] = _compose(name, source, visible)
        return convert(shaped, self._format_of(shaped, is_query), self.task, is_query)

    def _answers(self) -> frozenset[str]:
        return frozenset(name for shape in FORMATS.values() if self.task in shape.tasks for name in shape.answers)

    def _format_of(self, row: Mapping[str, Any], is_query: bool = False) -> str:
        if self.format != "auto":
            return self.format
        accepted = {name: shape for name, shape in FORMATS.items() if self.task in shape.tasks}
        # What the recipe names itself says more than columns that merely happen to be there.
        named = {*self.fields, *self.template}
        candidates = [name for name, shape in accepted.items() if named <= set(shape.columns)] or list(accepted)
        present = {name for name, value in row.items() if value is not None}
        found = next((name for name in candidates if set(accepted[name].needed(is_query)) <= present), None)
        if found is not None:
            return found
        closest = max(candidates, key=lambda name: len(present & set(accepted[name].columns)))
        if present & set(accepted[closest].columns):
            return closest  # `convert` names what it lacks
        choices = "; ".join(f"{', '.join(accepted[name].needs)} ({name})" for name in candidates)
        close = [hint for name in candidates for need in accepted[name].needs if (hint := nearest(need, map(str, row)))]
        raise RowError(
            "",
            f"the columns are {', '.join(map(str, row)) or 'none'}{close[0] if close else ''}",
            f"one of: {choices}",
            "rename the columns, or map them with `data.fields` or `data.template` in the recipe",
        )


def shape_row(row: Mapping[str, Any] | str, shaper: Shaper) -> Mapping[str, Any]:
    """`shaper.shape(row)`, for callers that map a function over rows."""
    return shaper.shape(row)


def _missing(name: str, row: Mapping[str, Any], expected: str) -> RowError:
    others = [str(column) for column in row if column != name]
    found = (
        "is null"
        if name in row
        else f"is missing{nearest(name, others)}; the columns are {', '.join(others) or 'none'}"
    )
    return RowError(name, found, expected, "add the column, or map another onto it with `data.fields`")


@functools.lru_cache(maxsize=256)
def _compile(name: str, source: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    try:
        return environment.from_string(source)
    except jinja2.exceptions.TemplateSyntaxError as error:
        raise RecipeError(
            f"data.template.{name} does not parse: {error.message}", "a jinja2 template, as in 'Q: {{ question }}'"
        ) from None


def _compose(name: str, source: str, row: Mapping[str, Any]) -> str:
    try:
        return _compile(name, source).render(row)
    except jinja2.exceptions.UndefinedError as error:
        raise RowError(
            name,
            f"data.template.{name} cannot be filled: {error.message}; the columns are {', '.join(map(str, row))}",
            "a row with every column that the template names",
            "correct the template, or add the column",
        ) from None
    except (jinja2.exceptions.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise RowError(
            name, f"data.template.{name} fails on this row: {error}", "values that the template can use"
        ) from None


def _with_system(row: Mapping[str, Any], messages: list[dict[str, Any]]) -> dict[str, Any]:
    system = row.get("system")
    if system is not None and system != "":
        messages = [{"role": "system", "content": system}, *messages]
    tools = {"tools": row["tools"]} if row.get("tools") is not None else {}
    return {"messages": messages, **tools}


def _prompt_as_chat(row: Mapping[str, Any]) -> Mapping[str, Any]:
    for name in ("prompt", "completion"):
        require_text(row[name], name)
    return _with_system(row, _exchange(row["prompt"], row["completion"]))


def _instruction_as_chat(row: Mapping[str, Any]) -> Mapping[str, Any]:
    question, extra, answer = _instruction_parts(row)
    return _with_system(row, _exchange(f"{question}\n\n{extra}" if extra else question, answer))


def _instruction_as_completion(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Headed sections as in Stanford Alpaca, without its preamble."""
    question, extra, answer = _instruction_parts(row)
    parts = [row["system"]] if row.get("system") else []
    parts.append(f"### Instruction:\n{question}")
    if extra:
        parts.append(f"### Input:\n{extra}")
    return {"prompt": "\n\n".join([*parts, "### Response:\n"]), "completion": answer}


def _prompt_as_completion(row: Mapping[str, Any]) -> Mapping[str, Any]:
    system = row.get("system")
    prompt = f"{require_text(system, 'system')}\n\n{require_text(row['prompt'], 'prompt')}" if system else row["prompt"]
    return {"prompt": prompt, "completion": row["completion"]}


def _instruction_parts(row: Mapping[str, Any]) -> tuple[str, str, str]:
    extra = row.get("input")
    return (
        require_text(row["instruction"], "instruction"),
        "" if extra is None else require_text(extra, "input", may_be_empty=True),
        require_text(row["output"], "output"),
    )


def _exchange(question: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _sharegpt_as_chat(row: Mapping[str, Any]) -> Mapping[str, Any]:
    turns = unpack_json(row["conversations"])
    if not isinstance(turns, list | tuple):
        raise RowError("conversations", f"is {preview(turns)}", "a list of {from, value} objects")
    return _with_system(row, [_sharegpt_turn(turn, f"conversations[{i}]") for i, turn in enumerate(turns)])


def _sharegpt_turn(turn: Any, where: str) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise RowError(where, f"is {preview(turn)}", "an object {from, value}")
    for name in ("from", "value"):
        if turn.get(name) is None:
            hint = nearest(name, map(str, turn))
            raise RowError(f"{where}.{name}", f"is missing{hint}", "a {from, value} object")
    role = _SHAREGPT_ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
    if role is None:
        raise RowError(f"{where}.from", f"is {preview(turn['from'])}", f"one of {', '.join(_SHAREGPT_ROLES)}")
    weight = {"weight": turn["weight"]} if turn.get("weight") is not None else {}
    if role != "function_call":
        return {"role": role, "content": turn["value"], **weight}
    calls = unpack_json(turn["value"])
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, Mapping) and "name" in call for call in calls):
        raise RowError(
            f"{where}.value", f"is {preview(turn['value'])}", 'JSON as in {"name": "...", "arguments": {...}}'
        )
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": c["name"], "arguments": c.get("arguments", {})}} for c in calls],
        **weight,
    }


def unpack_json(value: Any) -> Any:
    """A list or object that a CSV or Parquet column holds as JSON text; any other value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def require_text(value: Any, name: str, may_be_empty: bool = False) -> str:
    """`value` if it is a text with visible characters.

    Raises:
        RowError: kind "schema" for another type, "empty" for nothing but white space.
    """
    if not isinstance(value, str):
        raise RowError(
            name, f"is {preview(value)}, {_a(type(value).__name__)}", "a text", "write it as a string in quotes"
        )
    if not may_be_empty and not value.strip():
        raise RowError(name, "is empty", "some text", "fill it in, or take the row out", kind="empty")
    return value


def _a(name: str) -> str:
    plain = {"NoneType": "null", "int": "a number", "float": "a number", "bool": "a truth value", "dict": "an object"}
    return plain.get(name, f"a {name}")


_CONVERTERS: dict[tuple[str, str], Callable[[Mapping[str, Any]], Mapping[str, Any]]] = {
    ("sharegpt", "chat"): _sharegpt_as_chat,
    ("prompt", "chat"): _prompt_as_chat,
    ("prompt", "completion"): _prompt_as_completion,
    ("instruction", "chat"): _instruction_as_chat,
    ("instruction", "completion"): _instruction_as_completion,
}
