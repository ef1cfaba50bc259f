"""Rendering chat templates in a sandbox, as transformers renders them, without importing transformers.

The environment follows the one documented at https://huggingface.co/docs/transformers/chat_templating_writing: an
immutable sandbox with trimmed blocks, loop controls, `raise_exception`, `strftime_now`, a `tojson` that leaves HTML
alone, and the tag `{% generation %}`. That tag marks what the assistant wrote in some templates; most lack it, so here
it is a block that changes nothing, and loss masks never depend on it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from luthier.data.rows import RowError
from luthier.errors import ModelError

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""Names under which data and templates know a message's reasoning; the first is the one a record keeps."""


class GenerationBlock(jinja2.ext.Extension):
    """Accepts `{% generation %} ... {% endgeneration %}` and renders what is inside, in a scope of its own."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class SafeNamespace(jinja2.utils.Namespace):
    """Jinja's namespace without attributes that start with an underscore, which could reach Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # No named parameter, so that a template may store one called `self`.
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(self, values)  # type: ignore[arg-type]

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: str) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a chat template may not store {name!r} in a namespace")


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=1)
def chat_environment() -> jinja2.Environment:
    """The sandbox in which chat templates run."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_make_dict, namespace=SafeNamespace
    )
    return environment


@functools.lru_cache(maxsize=64)
def compile_template(source: str) -> jinja2.Template:
    """Compile a chat template.

    Raises:
        ModelError: where the template is not valid jinja2.
    """
    try:
        return chat_environment().from_string(source)
    except jinja2.exceptions.TemplateSyntaxError as error:
        raise ModelError(
            f"the chat template does not parse: line {error.lineno}: {error.message}",
            "a jinja2 template, as in chat_template.jinja beside tokenizer.json",
            "mend the template, or copy it anew from the base",
        ) from None


def render_template(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool,
    special_tokens: Mapping[str, str],
) -> str:
    """Render a conversation with a chat template, as transformers' `apply_chat_template(tokenize=False)` does.

    Keys whose value is None are left out, for templates test whether a key is there.

    Raises:
        RowError: where the template refuses the conversation (kind "template").
    """
    template = compile_template(source)
    try:
        return template.render(
            messages=[_message(message) for message in messages],
            tools=None if tools is None else [dict(tool) for tool in tools],
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **special_tokens,
        )
    except (
        jinja2.exceptions.TemplateError,
        TypeError,
        ValueError,
        LookupError,
        ArithmeticError,
        AttributeError,
    ) as error:
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise RowError(
            "messages",
            f"the base's chat template refuses this conversation ({roles}): {error}",
            "a conversation in the form that the template knows",
            "change the turns as the message says, or choose a base whose template takes them",
            kind="template",
        ) from None


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in message.items() if value is not None and key != "weight"}
    if reasoning := plain.get(REASONING_FIELDS[0]):
        plain = {"thinking": reasoning, **plain}  # the name that gpt-oss's template reads
    return plain
