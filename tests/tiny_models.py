"""Tiny random models as folders: what a real base's folder holds, in a few hundred kilobytes.

The tokenizer is a byte-level BPE that knows every byte, so that any text survives `decode(encode(text))`. Weights are
seeded float32 and larger than usual (`WEIGHT_STD`), so that a wrong position or mask moves the logits visibly.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
THINK, END_THINK = "<think>", "</think>"
PHI_SYSTEM, PHI_USER, PHI_ASSISTANT, PHI_END, PHI_BOS = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<s>"
SPECIAL_TOKENS = (
    END_OF_TEXT,
    IM_START,
    IM_END,
    PHI_BOS,
    PHI_SYSTEM,
    PHI_USER,
    PHI_ASSISTANT,
    PHI_END,
)
PLAIN_ADDED_TOKENS = (THINK, END_THINK)
"""Added but not special, as in Qwen3: they stay in decoded text."""

VOCAB_SIZE = 320
"""Rows of the embedding: more than the tokenizer's ids, as in many real models."""

WEIGHT_STD = 0.1
SLIDING_WINDOW = 24
ORIGINAL_MAX_POSITIONS = 32
MAX_POSITIONS = 128

_MERGES = (
    ("Ġ", "t"),
    ("h", "e"),
    ("i", "n"),
    ("Ġ", "a"),
    ("Ġt", "he"),
    ("o", "u"),
    ("e", "r"),
    ("r", "e"),
    ("Ġ", "s"),
    ("o", "n"),
    ("a", "n"),
    ("a", "t"),
    ("Ġ", "w"),
    ("in", "g"),
    ("l", "l"),
    ("s", "s"),
    ("e", "n"),
    ("i", "s"),
    ("u", "s"),
    ("us", "er"),
    ("Ġ", "b"),
    ("an", "t"),
    ("s", "t"),
    ("i", "st"),
)

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a tiny assistant<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML with a default system turn, and without the `generation` tag."""

PHI_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
"""Phi-3's shape: the template itself writes BOS, and a finished conversation ends with the end of text."""

THINK_TEMPLATE = (
    "{%- set ns = namespace(last_user=-1) %}"
    "{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last_user = loop.index0 %}{%- endif %}"
    "{%- endfor %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'assistant' %}"
    "{%- set content = message.content %}{%- set reasoning = '' %}"
    "{%- if message.reasoning_content is string %}{%- set reasoning = message.reasoning_content %}"
    "{%- elif '</think>' in content %}"
    "{%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last_user and (loop.last or reasoning) %}"
    "{{- '<|im_start|>assistant\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}"
    "{%- else %}{{- '<|im_start|>assistant\\n' + content }}{%- endif %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
"""Qwen3's behaviour: the reasoning of earlier assistant turns disappears once a later user turn follows."""


def build_tokenizer(add_bos: str | None = None) -> Tokenizer:
    """A byte-level BPE with the special tokens of ChatML and Phi-3.

    Args:
        add_bos: A special token that encoding with special tokens prepends, or None for none.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = [left + right for left, right in _MERGES]
    names = list(SPECIAL_TOKENS) + alphabet + merged
    vocab = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(_MERGES)))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in PLAIN_ADDED_TOKENS])
    if add_bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{add_bos} $A",
            pair=f"{add_bos} $A {add_bos} $B",
            special_tokens=[(add_bos, vocab[add_bos])],
        )
    return tokenizer


def write_tokenizer(
    folder: Path,
    *,
    template: str | None,
    bos: str | None,
    eos: str,
    pad: str,
    add_bos: bool = False,
) -> Tokenizer:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja; no torch is needed."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(bos if add_bos else None)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "unk_token": END_OF_TEXT,
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return tokenizer


def write_tiny_llama(
    folder: Path,
    *,
    tied: bool = False,
    template: str | None = CHATML_TEMPLATE,
    add_bos: bool = False,
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """A two-layer Llama with grouped heads, in SmolLM2's manner: pad, eos and end of turn are one token.

    Args:
        tied: Share the embedding with the output layer.
        template: The chat template, or None for a model without one.
        add_bos: Let the tokenizer prepend `<s>`.
        overrides: Fields of LlamaConfig to set otherwise.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = write_tokenizer(
        folder,
        template=template,
        bos=PHI_BOS if add_bos else IM_START,
        eos=IM_END,
        pad=IM_END,
        add_bos=add_bos,
    )
    config = LlamaConfig(**(_common(tokenizer, IM_END, PHI_BOS if add_bos else IM_START, tied) | overrides))
    return _save(LlamaForCausalLM, config, folder, seed)


def write_tiny_phi3(
    folder: Path, *, tied: bool = False, sliding_window: int | None = SLIDING_WINDOW, seed: int = 0, **overrides: Any
) -> Path:
    """A two-layer Phi-3: fused projections, LongRoPE past 32 positions, a sliding window, BOS in its template."""
    from transformers import Phi3Config, Phi3ForCausalLM

    tokenizer = write_tokenizer(folder, template=PHI_TEMPLATE, bos=PHI_BOS, eos=END_OF_TEXT, pad=END_OF_TEXT)
    fields = _common(tokenizer, END_OF_TEXT, PHI_BOS, tied)
    head_dim = fields["hidden_size"] // fields["num_attention_heads"]
    half = head_dim // 2
    fields |= {
        "eos_token_id": [tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(PHI_END)],
        "sliding_window": sliding_window,
        "original_max_position_embeddings": ORIGINAL_MAX_POSITIONS,
        "max_position_embeddings": MAX_POSITIONS,
        "rope_scaling": {
            "type": "longrope",
            "rope_type": "longrope",
            "short_factor": [1.0 + 0.05 * index for index in range(half)],
            "long_factor": [2.0 + 0.5 * index for index in range(half)],
        },
    }
    return _save(Phi3ForCausalLM, Phi3Config(**(fields | overrides)), folder, seed)


def write_tiny_qwen3(folder: Path, *, tied: bool = True, seed: int = 0, **overrides: Any) -> Path:
    """A two-layer Qwen3 (norms on queries and keys) whose template drops the reasoning of earlier turns."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = write_tokenizer(folder, template=THINK_TEMPLATE, bos=None, eos=IM_END, pad=END_OF_TEXT)
    fields = _common(tokenizer, IM_END, None, tied) | {"head_dim": 16, "pad_token_id": 0}
    return _save(Qwen3ForCausalLM, Qwen3Config(**(fields | overrides)), folder, seed)


def _common(tokenizer: Tokenizer, eos: str, bos: str | None, tied: bool) -> dict[str, Any]:
    assert tokenizer.get_vocab_size() <= VOCAB_SIZE
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "initializer_range": WEIGHT_STD,
        "bos_token_id": tokenizer.token_to_id(bos) if bos else None,
        "eos_token_id": tokenizer.token_to_id(eos),
        "pad_token_id": tokenizer.token_to_id(eos),
    }


def _save(model_class: Any, config: Any, folder: Path, seed: int) -> Path:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).to(torch.float32)
        # Norm weights of exactly one hide a norm that is skipped or applied twice.
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(parameter, 0.7, 1.3)
    model.save_pretrained(folder, safe_serialization=True)
    return folder


ENCODER_TOKENS = {
    "bert": ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    "roberta": ("<s>", "<pad>", "</s>", "<unk>", "<mask>"),
}
"""Special tokens of two families, in the order of their ids."""

ROBERTA_LIKE = ("roberta", "xlm-roberta", "camembert", "mpnet")
ENCODER_POSITIONS = 96


def write_encoder_tokenizer(folder: Path, architecture: str) -> Tokenizer:
    """A byte-level BPE that puts [CLS] and [SEP] (or <s> and </s>) around a text.

    As in many folders of encoders, tokenizer_config.json names no special token: transformers knows them by the class.
    """
    folder.mkdir(parents=True, exist_ok=True)
    special = ENCODER_TOKENS["roberta" if architecture in ROBERTA_LIKE else "bert"]
    first, last = ("<s>", "</s>") if architecture in ROBERTA_LIKE else ("[CLS]", "[SEP]")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*special, *alphabet, *(left + right for left, right in _MERGES)]
    vocab = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(_MERGES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} $B {last}",
        special_tokens=[(first, vocab[first]), (last, vocab[last])],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 512}', encoding="utf-8")
    return tokenizer


def write_tiny_encoder(folder: Path, architecture: str, *, seed: int = 0, **overrides: Any) -> Path:
    """A two-layer encoder as it is published: a model for masked words, with a tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForMaskedLM

    tokenizer = write_encoder_tokenizer(folder, architecture)
    padding = 1 if architecture in ROBERTA_LIKE else 0
    fields: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": ENCODER_POSITIONS + (padding + 1 if padding else 0),
        "initializer_range": WEIGHT_STD,
        "pad_token_id": padding,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if architecture == "distilbert":
        fields |= {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
    if architecture == "electra":
        fields |= {"embedding_size": 16}
    if architecture == "modernbert":  # its base on the Hub pools by the mean, and its window is short here
        ends = {"cls_token_id": 2, "sep_token_id": 3}
        fields |= {"classifier_pooling": "mean", "local_attention": 8, "global_attn_every_n_layers": 2, **ends}
    assert tokenizer.get_vocab_size() <= VOCAB_SIZE
    config = AutoConfig.for_model(architecture, **(fields | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = AutoModelForMaskedLM.from_config(config).to(torch.float32)
        for name, parameter in model.named_parameters():
            if "norm" in name.lower() and parameter.ndim == 1:
                torch.nn.init.uniform_(parameter, 0.7, 1.3)
    model.save_pretrained(folder, safe_serialization=True)
    return folder
