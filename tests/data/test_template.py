"""The renderer's tokens and files, held against transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_templates import FAMILIES, write_family

from luthier.data.rows import RowError
from luthier.data.template import Renderer
from luthier.errors import ModelError

MESSAGES = [
    {"role": "user", "content": "What is <b>two</b> plus two?"},
    {"role": "assistant", "content": "It is four."},
    {"role": "user", "content": "Good morning! 🎻"},
]
TOOLS = [{"type": "function", "function": {"name": "lights", "description": "<é>", "parameters": {"type": "object"}}}]


def reference(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_renders_and_tokenizes_as_transformers(name: str, tmp_path: Path) -> None:
    renderer = Renderer.load(write_family(tmp_path, name))
    theirs = reference(tmp_path)
    tools = TOOLS if name in ("llama3", "qwen3") else None  # templates that know tools by themselves
    for messages in (MESSAGES, MESSAGES[:2]):
        for prompt in (False, True):
            expected = theirs.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt, tokenize=False)
            assert renderer.render_chat(messages, tools, add_generation_prompt=prompt) == expected
    ids = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert renderer.chat_prompt(MESSAGES) == ids
    for text in ("Good morning", "  two\n\nspaces ", FAMILIES[name].eos + "x", "🎻é"):
        assert renderer.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
        bos = [] if renderer.bos_id is None else [renderer.bos_id]
        assert bos + renderer.encode(text) == theirs(text)["input_ids"]
    assert renderer.vocabulary_size == len(theirs)


@pytest.mark.parametrize("name", FAMILIES)
def test_saved_files_give_the_same_in_transformers_and_here(name: str, tmp_path: Path) -> None:
    renderer = Renderer.load(write_family(tmp_path / "base", name), new_tokens=["<device>", "<room>"])
    renderer.save(tmp_path / "adapter")
    again, theirs = Renderer.load(tmp_path / "adapter"), reference(tmp_path / "adapter")
    assert again.fingerprint == renderer.fingerprint
    assert again.stop_ids == renderer.stop_ids
    assert (again.bos_id, again.eos_id, again.pad_id) == (renderer.bos_id, renderer.eos_id, renderer.pad_id)
    text = "Turn on <device> in <room>, please."
    assert renderer.encode(text) == again.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    for tools in (None, TOOLS):
        expected = theirs.apply_chat_template(MESSAGES, tools=tools, add_generation_prompt=True, tokenize=False)
        assert renderer.render_chat(MESSAGES, tools, True) == again.render_chat(MESSAGES, tools, True) == expected


def test_new_tokens_are_added_once(tmp_path: Path) -> None:
    folder = write_family(tmp_path, "chatml")
    before = Renderer.load(folder)
    after = Renderer.load(folder, new_tokens=["<device>", "<|im_end|>"])
    assert after.vocabulary_size == before.vocabulary_size + 1
    assert after.encode("a<device>b")[1:-1] == [after.token_id("<device>")]
    assert "<device>" in after.decode(after.encode("a<device>b"))  # an ordinary token: decoding keeps it
    assert after.fingerprint != before.fingerprint
    with pytest.raises(ModelError, match="does not know"):
        before.token_id("<device>")


def test_templates_by_name(tmp_path: Path) -> None:
    folder = write_family(tmp_path, "chatml")
    (folder / "chat_template.jinja").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = [
        {"name": "default", "template": "plain{{ messages[0].content }}"},
        {"name": "tool_use", "template": "tools{{ tools | length }}"},
    ]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    renderer = Renderer.load(folder)
    user = [{"role": "user", "content": "x"}]
    assert renderer.render_chat(user) == "plainx"
    assert renderer.render_chat(user, TOOLS) == "tools1"
    settings["chat_template"] = "one{{ messages[0].content }}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert Renderer.load(folder).render_chat(user) == "onex"


def test_stops_are_read_from_generation_config(tmp_path: Path) -> None:
    folder = write_family(tmp_path, "generation-tag")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 0, "pad_token_id": 1}))
    renderer = Renderer.load(folder)
    assert renderer.stop_ids == (0, 1, 2)
    assert renderer.pad_id == 1


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    folder = write_family(tmp_path, "chatml")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=32)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert 4 < len(Renderer.load(folder).encode("Turn on the lights in the kitchen")) < 32


def test_a_special_token_that_only_the_settings_name(tmp_path: Path) -> None:
    folder = write_family(tmp_path, "chatml")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**settings, "pad_token": {"__type": "AddedToken", "content": "<pad>"}})
    )
    renderer = Renderer.load(folder)
    assert renderer.encode("<pad>") == [renderer.pad_id] == reference(folder)("<pad>")["input_ids"]


def test_missing_files_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no tokenizer\.json"):
        Renderer.load(tmp_path)
    folder = write_family(tmp_path, "chatml")
    (folder / "chat_template.jinja").unlink()
    renderer = Renderer.load(folder)
    assert not renderer.can_chat
    assert renderer.encode("still works")
    with pytest.raises(ModelError, match="has no chat template") as caught:
        renderer.chat_prompt(MESSAGES)
    assert "task: completion" in caught.value.fix
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        Renderer.load(folder)


def test_a_template_that_does_not_parse(tmp_path: Path) -> None:
    folder = write_family(tmp_path, "chatml")
    (folder / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(ModelError, match="does not parse: line 1"):
        Renderer.load(folder).chat_prompt(MESSAGES)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ messages.append(1) }}",
        "{{ namespace(_x=1) }}",
    ],
)
def test_templates_run_in_a_sandbox(attack: str, tmp_path: Path) -> None:
    folder = write_family(tmp_path, "chatml")
    (folder / "chat_template.jinja").write_text(attack)
    renderer = Renderer.load(folder)
    with pytest.raises(RowError) as caught:
        renderer.render_chat(MESSAGES)
    assert caught.value.kind == "template"


def test_what_transformers_offers_to_templates(tmp_path: Path) -> None:
    folder = write_family(tmp_path, "chatml")
    (folder / "chat_template.jinja").write_text(
        "{%- set ns = namespace(n=0) -%}{%- for m in messages -%}"
        "{%- if loop.index0 == 1 -%}{%- continue -%}{%- endif -%}{%- set ns.n = ns.n + 1 -%}"
        "{%- generation -%}{%- set hidden = 1 -%}{{ m.content }}{%- endgeneration -%}{{ hidden is defined }}"
        "{%- endfor -%}{{ ns.n }}{{ strftime_now('%%') }}{{ {'a': '<é>'} | tojson(indent=2) }}{{ dict(a=1) }}"
        "\n{% if true %}\n  x\n{% endif %}\n"
    )
    expected = reference(folder).apply_chat_template(MESSAGES, tokenize=False)
    assert Renderer.load(folder).render_chat(MESSAGES) == expected


def test_a_reply_is_tokenized_as_it_follows_a_served_prompt(tmp_path: Path) -> None:
    for name in ("chatml", "mistral"):
        renderer = Renderer.load(write_family(tmp_path / name, name))
        for prompt, reply in [
            ("Good mor", "ning"),
            ("two\n", "\nfour"),
            ("two", " plus"),
            ("two ", "plus"),
            ("two ", " x"),
        ]:
            ids = renderer.encode(prompt)
            both = ids + renderer.continuation(prompt, ids, reply)
            assert renderer.decode(both) == prompt + reply


def test_core_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, luthier.data.template, luthier.tasks.registry\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'heavy import'\n"
        "assert 'luthier.tasks' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_the_engine_imports_needs_no_pydantic() -> None:
    code = (
        "import sys, luthier.data.template, luthier.tasks.chat.metrics, luthier.tasks.text.metrics\n"
        "import luthier.tasks.classification.metrics, luthier.tasks.completion.metrics, luthier.tasks.task\n"
        "assert 'pydantic' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_half_a_character_is_the_rows_fault(tmp_path: Path) -> None:
    renderer = Renderer.load(write_family(tmp_path, "chatml"))
    with pytest.raises(RowError, match="half of a character"):
        renderer.encode("a\ud83d")
    with pytest.raises(RowError, match="half of a character"):
        renderer.chat_prompt([{"role": "user", "content": "a\ud83d"}])


def test_row_errors_survive_pickling() -> None:
    import pickle

    error = RowError("text", "is empty", "some text", "fill it in", kind="empty")
    again = pickle.loads(pickle.dumps(error))
    assert (again.field, again.found, again.expected, again.fix, again.kind) == (
        "text",
        "is empty",
        "some text",
        "fill it in",
        "empty",
    )


@pytest.mark.real
def test_the_real_base_is_rendered_as_transformers_renders_it(real_base: Path, tmp_path: Path) -> None:
    renderer, theirs = Renderer.load(real_base), reference(real_base)
    assert renderer.chat_prompt(MESSAGES) == theirs.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_dict=False
    )
    # Its pad, EOS and end of turn are one token, and it is supervised.
    assert renderer.stop_ids == (renderer.pad_id,) == (renderer.eos_id,)
    ((tokens, weights),) = renderer.chat_examples(MESSAGES[:2])
    assert renderer.decode(tokens[weights > 0], skip_special=False) == "It is four.<|im_end|>"
    renderer.save(tmp_path)
    text = "In 2024 the capital\n\nof France: Paris 🎻"
    assert reference(tmp_path)(text)["input_ids"] == theirs(text)["input_ids"] == renderer.encode(text)
