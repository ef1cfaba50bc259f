"""What a slot's tensors are called in PEFT's files, and the base's modules without the bank's wrappers."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from luthier.base.adapter_files import PREFIX
from luthier.base.encoder import Encoder
from luthier.engine.bank import Bank
from luthier.engine.slot import Slot
from luthier.engine.wrappers import BankModule

TOKENS = "token_adapter.trainable_tokens_delta"
"""What PEFT calls the rows of trained tokens within an embedding or output layer."""

HEAD = "score"
"""What transformers calls the head of a decoder's sequence or token classifier."""

OF_HEAD = "head."
"""What a slot puts before the names of its head's parameters. An encoder's head may have several modules, each under
its name in transformers' classifier."""


def peft_name(parameter: str, bank: Bank) -> str:
    """The file's name, with `PREFIX`, of a tensor as `Slot.tensors` and `Slot.parameters` name it."""
    if isinstance(bank.model, Encoder) and parameter.startswith(OF_HEAD):
        return PREFIX + parameter.removeprefix(OF_HEAD)
    if parameter in ("head.weight", "head.bias"):
        return f"{PREFIX}{HEAD}.{parameter.partition('.')[2]}"
    if parameter == "token_rows.input":
        return f"{PREFIX}{bank.input_name}.{TOKENS}"
    if parameter == "token_rows.output":
        return f"{PREFIX}{bank.output_name}.{TOKENS}"
    return PREFIX + parameter


def is_stored(parameter: str, slot: Slot) -> bool:
    """Whether a parameter has a place in PEFT's files. A classifier has no output layer; its rows are never trained."""
    return not (slot.head is not None and parameter == "token_rows.output")


def to_peft(slot: Slot, bank: Bank) -> dict[str, Tensor]:
    """The slot's tensors, and the buffers of its trained modules, under the names of PEFT's files."""
    tensors: dict[str, Tensor] = {
        peft_name(name, bank): tensor for name, tensor in slot.tensors().items() if is_stored(name, slot)
    }
    for module, copied in slot.saved_modules.items():
        tensors |= {f"{PREFIX}{module}.{name}": tensor for name, tensor in copied.state_dict().items()}
    return tensors


def module_names(model: nn.Module) -> list[str]:
    """Names of all modules as they were before the bank wrapped any, parents before children."""
    return list(_names(model, ""))


def _names(module: nn.Module, prefix: str) -> Iterator[str]:
    for child_name, child in module.named_children():
        name = f"{prefix}{child_name}"
        yield name
        yield from _names(child.base if isinstance(child, BankModule) else child, f"{name}.")
