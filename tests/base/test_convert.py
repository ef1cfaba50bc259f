"""A GGUF file becomes a plain folder that computes and tokenizes the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_gguf import write_gguf
from tokenizers import Tokenizer

from luthier.base.convert import convert_gguf
from luthier.base.folder import check_base_folder, check_tokenizer
from luthier.errors import ModelError

TEXTS = (
    "The user wants 12345 and 3.14.",
    "<|im_start|>user\nhi there<|im_end|>\n",
    "def f(x):\n    return x  # naïve 日本語 🎻\t\r\n   ",
    "I'll don't  two  spaces",
    " ",
    "",
)


@pytest.fixture(scope="module")
def converted(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    convert_gguf(write_gguf(tiny_llama, folder / "tiny.gguf"), folder / "base")
    return folder / "base"


def _logits(folder: Path) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    tokens_BT = torch.arange(5, 45).reshape(1, -1)
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(tokens_BT).logits.numpy()


def test_logits_stay_the_same(tiny_llama: Path, converted: Path) -> None:
    np.testing.assert_allclose(_logits(converted), _logits(tiny_llama), rtol=1e-5, atol=1e-5)


def test_tied_embeddings_stay_tied(tiny_llama_tied: Path, tmp_path: Path) -> None:
    convert_gguf(write_gguf(tiny_llama_tied, tmp_path / "tied.gguf"), tmp_path / "base")
    assert json.loads((tmp_path / "base" / "config.json").read_text())["tie_word_embeddings"] is True
    np.testing.assert_allclose(_logits(tmp_path / "base"), _logits(tiny_llama_tied), rtol=1e-5, atol=1e-5)


def test_the_folder_is_a_plain_base(converted: Path) -> None:
    check_base_folder(converted)
    check_tokenizer(converted)
    config = json.loads((converted / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"
    assert (converted / "generation_config.json").is_file()


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_stay_the_same(tiny_llama: Path, converted: Path, text: str) -> None:
    before, after = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (tiny_llama, converted))
    assert after.encode(text).ids == before.encode(text).ids
    assert after.decode(after.encode(text).ids, skip_special_tokens=False) == text


def test_transformers_reads_the_same_tokenizer(tiny_llama: Path, converted: Path) -> None:
    from transformers import AutoTokenizer

    before, after = AutoTokenizer.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(converted)
    messages = [{"role": "user", "content": "Hello 42"}]
    chat = after.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat == before.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert after(chat)["input_ids"] == before(chat)["input_ids"]
    assert (after.bos_token, after.eos_token, after.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")


def test_digits_are_split_one_by_one(converted: Path) -> None:
    tokens = Tokenizer.from_file(str(converted / "tokenizer.json")).encode("In 2024").tokens
    assert tokens[-4:] == ["2", "0", "2", "4"]


def test_an_unknown_pre_tokenizer_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    gguf = write_gguf(tiny_llama, tmp_path / "strange.gguf", pre="qwen2")
    with pytest.raises(ModelError, match=r"tokenizer\.ggml\.pre = 'qwen2'"):
        convert_gguf(gguf, tmp_path / "base")


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "no.gguf").write_bytes(b"this is no model at all" * 100)
    with pytest.raises(ModelError, match="cannot be read as GGUF"):
        convert_gguf(tmp_path / "no.gguf", tmp_path / "base")


@pytest.mark.real
def test_the_real_base_tokenizes_as_it_was_trained(real_base: Path) -> None:
    tokenizer = Tokenizer.from_file(str(real_base / "tokenizer.json"))
    assert tokenizer.encode("12345 and 3.14").tokens == [*"12345", "Ġand", "Ġ", "3", ".", "1", "4"]
    assert tokenizer.encode("<|im_start|>user\nhi<|im_end|>").tokens == [
        "<|im_start|>",
        "user",
        "Ċ",
        "hi",
        "<|im_end|>",
    ]
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.real
def test_the_real_base_knows_the_capital_of_france(real_base: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_base)
    model = AutoModelForCausalLM.from_pretrained(real_base)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    reply_BT = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    reply = tokenizer.decode(reply_BT[0, prompt["input_ids"].shape[1] :])
    assert reply == "The capital of France is Paris.<|im_end|>"
