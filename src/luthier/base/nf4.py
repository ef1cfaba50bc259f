"""A base whose linear layers are held in NF4: what QLoRA trains over.

As in the paper (arXiv:2305.14314), every linear layer but the output layer is quantized, with double quantization;
embeddings, norms and the output layer stay in the compute dtype. transformers and bitsandbytes quantize each weight as
it is read, so that at no time the whole base lies there in full precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from luthier.errors import ModelError
from luthier.extras import require_bitsandbytes
from luthier.ops.nf4 import COMPUTE_DTYPES, Nf4Weight
from luthier.ops.product import frozen_product


class Nf4Linear(nn.Module):
    """y = W x + b with a frozen W in NF4.

    bitsandbytes' own layer is not used: on some processors its forward repacks the weight for itself.

    Attributes:
        weight: Not a parameter: nothing trains, moves or casts it.
        bias: Frozen parameter [O] in the compute dtype, or None.
    """

    def __init__(self, weight: Nf4Weight, bias_O: Tensor | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = nn.Parameter(bias_O.detach(), requires_grad=False) if bias_O is not None else None
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O] in the dtype of x."""
        return frozen_product(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def load_nf4(model_class: Any, folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """The transformers model in `folder` with its linear layers in NF4.

    Args:
        model_class: An auto class of transformers.
        dtype: Of all that is not quantized, and of the products. Weights are rounded to it before they are quantized.

    Raises:
        RecipeError: without bitsandbytes.
        ModelError: for a base without a linear layer to quantize.
        OSError, ValueError, KeyError: as transformers raises them.
    """
    require_bitsandbytes("a base in NF4")
    if dtype not in COMPUTE_DTYPES:
        raise ValueError(f"NF4 computes in float32, bfloat16 or float16, not in {dtype}")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = model_class.from_pretrained(
        folder,
        dtype=dtype,
        quantization_config=config,
        device_map={"": device},
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
    )
    weights = _taken_over(model, dtype)
    if not weights:
        raise ModelError(
            f"{folder} has no linear layer that NF4 could hold",
            "a base whose layers are torch.nn.Linear",
            "train with `method: lora`, which takes the base as it is",
        )
    hold_in_nf4(model, weights, dtype)
    _let_go_of_the_file(model)
    return model


@torch.no_grad()
def _let_go_of_the_file(model: nn.Module) -> None:
    """Copy what was not quantized.

    On a CPU safetensors gives views of the mapped file: one embedding would keep all of its pages, those of the
    quantized layers included.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def hold_in_nf4(model: nn.Module, weights: Mapping[str, Nf4Weight], dtype: torch.dtype) -> None:
    """Replace these linear layers of a model by ones in NF4 that compute in `dtype`."""
    for name, weight in weights.items():
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, child, Nf4Linear(replace(weight, dtype=dtype), getattr(owner, child).bias))


def nf4_weights(model: nn.Module) -> dict[str, Nf4Weight]:
    """The weights in NF4 by their layer's name, in the model's order; the bank has not wrapped the model yet."""
    return {name: module.weight for name, module in model.named_modules() if isinstance(module, Nf4Linear)}


@torch.no_grad()
def dequantize_into(model: nn.Module, weights: Mapping[str, Nf4Weight]) -> None:
    """Give the linear layers of a plain model the values that a base in NF4 computes with."""
    for name, weight in weights.items():
        target_OI: Any = model.get_submodule(name).weight
        target_OI.copy_(weight.dense(target_OI.dtype))


def _taken_over(model: Any, dtype: torch.dtype) -> dict[str, Nf4Weight]:
    """The weights that bitsandbytes' layers hold; what transformers notes about them goes."""
    from bitsandbytes.nn import Linear4bit

    weights = {}
    for name, module in model.named_modules():
        if not isinstance(module, Linear4bit):
            continue
        kind = getattr(module, "source_cls", nn.Linear)
        if not issubclass(kind, nn.Linear):
            raise ModelError(
                f"{name} of this base is a {kind.__name__}",
                "layers of the type torch.nn.Linear",
                "choose another base; `luthier models` lists some",
            )
        weights[name] = Nf4Weight(module.weight.data, module.weight.quant_state, dtype)  # type: ignore[attr-defined]
    for note in ("hf_quantizer", "quantization_method"):
        if hasattr(model, note):
            delattr(model, note)
    model.is_quantized = model.is_loaded_in_4bit = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return weights
