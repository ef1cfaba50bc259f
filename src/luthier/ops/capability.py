"""Which fast paths this process may take, found out once.

A fast path stands behind the signature of its plain reference; who calls it never asks about hardware.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch
from torch import Tensor


@cache
def kernels_problem() -> str:
    """Why the Triton kernels cannot run here, or an empty string."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if is_interpreted():
        return ""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.version.hip is not None:
        return "they are written for and tested on NVIDIA GPUs"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"the GPU's compute capability is {major}.{minor}; bfloat16 tensor cores came with 8.0"
    return ""


@cache
def is_interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU, which is how tests run them without a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None


def runs_kernels(x: Tensor) -> bool:
    """Whether operations on `x` run as Triton kernels."""
    if x.dtype not in (torch.bfloat16, torch.float32):
        return False
    return (x.is_cuda or is_interpreted()) and not kernels_problem()


@cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; under the interpreter some number, so that kernels cut their work as on a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


@cache
def fp8_problem() -> str:
    """Why products in fp8 (e4m3, a scale a row) cannot run here, or an empty string."""
    if kernels_problem():
        return kernels_problem()
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0):
        return "row-wise scaled fp8 products need compute capability 9.0"
    return "" if torch.cuda.is_available() else "there is no CUDA device"
