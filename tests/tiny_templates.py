"""Tiny tokenizers with small chat templates in the manner of well-known families, as model folders.

The templates are written for these tests; each keeps the one habit of its family that makes loss masks hard.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

LINES = [
    "You are a helpful assistant.",
    "The capital of France is Paris, and the river there is the Seine.",
    "Turn on the lights in the kitchen, please. Good morning! What is two plus two? It is four.",
    "system user assistant model tool final analysis function name arguments think end return",
]


@dataclass(frozen=True)
class Family:
    """One family's habits: special tokens, chat template, and what its tokenizer adds."""

    template: str
    tokens: tuple[str, ...]
    eos: str
    stops: tuple[str, ...]
    bos: str | None = None
    adds_bos: bool = False
    has_system: bool = True
    metaspace: bool = False
    rstrip: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)


CHATML_DEFAULT_SYSTEM = """\
{% for message in messages %}{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful assistant.<|im_end|>
' }}{% endif %}{{ '<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

LLAMA3 = """\
{{- bos_token }}
{%- if tools is not none %}{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}
    {%- for tool in tools %}{{- tool | tojson(indent=4) }}{%- endfor %}{{- '<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
    {%- if message.tool_calls %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}' }}
    {%- else %}{{- message.content | trim }}{%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""

QWEN3 = """\
{%- set ns = namespace(last_user=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set ns.last_user = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'assistant' %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.last_user %}{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' }}
        {%- if loop.first and tools %}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}{%- endif %}
        {{- content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

PHI3 = """\
{% for message in messages %}{{ '<|' + message['role'] + '|>
' + message['content'] + '<|end|>
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>
' }}{% else %}{{ eos_token }}{% endif %}"""

GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}
    {{- message['content'] | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

MISTRAL = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}{%- set turns = messages[1:] %}
{%- else %}{%- set turns = messages %}{%- endif %}
{{- bos_token }}
{%- for message in turns %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.last and system is defined %}{{- '[INST] ' + system + '\n\n' + message['content'] + '[/INST]' }}
        {%- else %}{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}
    {%- else %}{{- ' ' + message['content'] | trim + eos_token }}{%- endif %}
{%- endfor %}"""

CHANNELS = """\
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- if message.thinking and loop.last %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}
        {%- endif %}
        {{- '<|start|>assistant<|channel|>final<|message|>' + message.content }}
        {{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
    {%- else %}{{- '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""

THINK_PROMPT = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}{{- '<|Assistant|>' + message.content.split('</think>')[-1] + eos_token }}
    {%- elif message.role == 'user' %}{{- '<|User|>' + message.content }}
    {%- else %}{{- message.content }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|Assistant|><think>\n' }}{%- endif %}"""

NO_END = """\
{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '
' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"""

GENERATION_TAG = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}
    {%- else %}{{- message.content + '<|im_end|>' }}{%- endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

_IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

FAMILIES: dict[str, Family] = {
    "chatml": Family(CHATML_DEFAULT_SYSTEM, _IM, "<|im_end|>", ("<|im_end|>",), bos="<|im_start|>"),
    "generation-tag": Family(GENERATION_TAG, _IM, "<|endoftext|>", ("<|endoftext|>", "<|im_end|>")),
    "llama3": Family(
        LLAMA3,
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|end_of_text|>",
        ("<|end_of_text|>", "<|eot_id|>"),
        bos="<|begin_of_text|>",
        adds_bos=True,
    ),
    "qwen3": Family(QWEN3, (*_IM, "<think>", "</think>"), "<|im_end|>", ("<|im_end|>",)),
    "phi3": Family(
        PHI3,
        ("<s>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
        "<|endoftext|>",
        ("<|endoftext|>", "<|end|>"),
        bos="<s>",
        metaspace=True,
        rstrip=("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    ),
    "gemma": Family(
        GEMMA,
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        "<eos>",
        ("<eos>", "<end_of_turn>"),
        bos="<bos>",
        adds_bos=True,
        has_system=False,
    ),
    "mistral": Family(
        MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]"), "</s>", ("</s>",), bos="<s>", adds_bos=True, metaspace=True
    ),
    "channels": Family(
        CHANNELS,
        ("<|start|>", "<|end|>", "<|return|>", "<|message|>", "<|channel|>"),
        "<|return|>",
        ("<|return|>",),
    ),
    "think-prompt": Family(
        THINK_PROMPT,
        ("<s>", "</s>", "<|User|>", "<|Assistant|>", "<think>", "</think>"),
        "</s>",
        ("</s>",),
        bos="<s>",
        adds_bos=True,
    ),
    "no-end": Family(NO_END, ("<|endoftext|>",), "<|endoftext|>", ("<|endoftext|>",)),
}


def write_family(folder: Path, name: str) -> Path:
    """Write tokenizer.json, tokenizer_config.json, generation_config.json and the template; return the folder."""
    family = FAMILIES[name]
    folder.mkdir(parents=True, exist_ok=True)
    _tokenizer(family).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": family.eos, **family.extra}
    if family.bos:
        settings["bos_token"] = family.bos
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(family.template)
    return folder


def _tokenizer(family: Family) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token=None, byte_fallback=family.metaspace))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if family.metaspace:
        # As in Llama 2 and Phi-3: a space is put before each stretch of text between special tokens.
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        alphabet = sorted({*"".join(LINES), *map(chr, range(33, 127)), "▁", "\n", "\t", *"Éé🎻"})
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=list(family.tokens), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    # As in Phi-3: white space after these tokens is swallowed by them.
    tokenizer.add_special_tokens([AddedToken(token, rstrip=True, special=True) for token in family.rstrip])
    if family.adds_bos and family.bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, tokenizer.token_to_id(family.bos))]
        )
    return tokenizer
