"""A base's model from a folder of safetensors, held in the type or the quantization that is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from luthier.base.encoder import Encoder, load_encoder
from luthier.base.folder import read_json
from luthier.base.fp8 import prepare_fp8
from luthier.base.nf4 import hold_in_nf4, load_nf4, nf4_weights
from luthier.data.encoders import is_encoder
from luthier.errors import ModelError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def torch_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The type of that name; a type is itself."""
    return DTYPES[dtype] if isinstance(dtype, str) else dtype


def load_model(
    folder: Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    quantization: str | None = None,
    quantized_from: str | torch.dtype | None = None,
) -> Any:
    """The model itself: a causal one as transformers gives it, or an `Encoder`.

    Args:
        dtype, quantization, quantized_from: As `load_base` takes them.

    Raises:
        ModelError: when the folder holds no such model.
        RecipeError: for NF4 without bitsandbytes.
    """
    from transformers import AutoModelForCausalLM

    _check_full_precision(folder)
    if _holds_encoder(folder):
        return _load_encoder(folder, torch.device(device), torch_dtype(dtype), quantization)
    wanted, place = torch_dtype(dtype), torch.device(device)
    source = torch_dtype(quantized_from or dtype)
    try:
        if quantization is None:
            model = _load_plain(folder, place, wanted)
        elif quantization == "fp8":
            model = _load_plain(folder, place, wanted)
            prepare_fp8(model)
        elif source == wanted:
            model = load_nf4(AutoModelForCausalLM, folder, place, wanted)
        else:
            weights = nf4_weights(load_nf4(AutoModelForCausalLM, folder, place, source))
            model = _load_plain(folder, place, wanted)
            hold_in_nf4(model, weights, wanted)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{folder} does not load as a causal language model: {error}",
            "a folder with config.json and safetensors weights of an architecture that transformers knows",
        ) from error
    return model


def _check_full_precision(folder: Path) -> None:
    """Refuse a base that is stored quantized: its weights are not there to be held as they were."""
    config = Path(folder) / "config.json"
    stored = read_json(config).get("quantization_config") if config.is_file() else None
    if stored:
        method = stored.get("quant_method", "some way") if isinstance(stored, dict) else "some way"
        raise ModelError(
            f"{folder} is stored quantized already ({method})",
            "weights in float32, bfloat16 or float16",
            "name the model that it was made of; `method: {type: qlora}` holds that in 4 bits as it is loaded",
        )


def _holds_encoder(folder: Path) -> bool:
    config = Path(folder) / "config.json"
    return config.is_file() and is_encoder(read_json(config))


def _load_encoder(folder: Path, device: torch.device, dtype: torch.dtype, quantization: str | None) -> Encoder:
    if quantization is not None:
        raise ModelError(
            f"{folder} is an encoder, and is to be held in {quantization.upper()}",
            "an encoder in float32, bfloat16 or float16: they are small",
            "leave quantization out; `method: lora` in place of qlora",
        )
    try:
        return load_encoder(Path(folder), dtype).to(device)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{folder} does not load as an encoder: {error}",
            "a folder with config.json and safetensors weights of an architecture that transformers knows",
        ) from error


def _load_plain(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, local_files_only=True
    )
    return model.to(device)  # type: ignore[arg-type]
