"""What `gpu_vs_peers.py` measures: the cases, the model, and how a step is timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

VOCABULARY = 32064
FLOPS_PER_TOKEN = 4 * 3.72e9
"""Forward, and backward to the inputs, of the frozen matrices; attention comes on top."""
ATTENTION_FLOPS = 3.5 * 2 * 3072 * 32
"""Per token and token of its sequence: two causal products forward, five backward."""
MATRIX_FLOPS = 740e12
"""A second, what an H200 reaches on this model's matrices in bfloat16."""
MEMORY_BYTES = 4.3e12
"""A second, what an H200 copies, reads and writes counted."""
WEIGHT_BYTES = 7.6e9
KEY_BYTES = 2 * 32 * 3072 * 2
"""Keys and values of one position in bfloat16."""
RANK = 16


@dataclass(frozen=True)
class Case:
    """A training step.

    Attributes:
        jobs: Jobs in one joint step; peers run them one after another.
        batch, length: Sequences of a job's step, and tokens of each.
        recompute: Blocks whose activations are recomputed; peers recompute all or none.
        micro_batch: Sequences of one forward; the gradient of the step is the same.
        base: How Luthier holds the base: "bf16", "fp8" or "nf4". Peers know bf16 and nf4.
    """

    jobs: int
    batch: int
    length: int
    recompute: int = 0
    micro_batch: int = 0
    base: str = "bf16"

    @property
    def num_tokens(self) -> int:
        return self.jobs * self.batch * self.length

    @property
    def limit(self) -> float:
        """Tokens a second at the rate of bfloat16 products."""
        return MATRIX_FLOPS / (FLOPS_PER_TOKEN + ATTENTION_FLOPS * self.length)


TRAINING = {
    "1x256": Case(1, 1, 256),
    "4x256": Case(1, 4, 256),
    "8x2048": Case(1, 8, 2048),
    "8x2048-fp8": Case(1, 8, 2048, base="fp8"),
    "16x2048-recompute": Case(1, 16, 2048, recompute=32, micro_batch=8),
    "16x2048-nf4-recompute": Case(1, 16, 2048, recompute=32, micro_batch=4, base="nf4"),
    "16-jobs-4x256": Case(16, 4, 256),
    "64-jobs-1x256": Case(64, 1, 256),
}

MIX = "mix"
"""Sequences of real lengths (`--lengths`), packed up to as many tokens as 8x2048 has."""
MIX_TOKENS, MIX_LONGEST = 8 * 2048, 2048

DECODE = "decode"
NUM_REQUESTS, NUM_ADAPTERS, NUM_PROMPT, NUM_NEW = 64, 16, 128, 256

CASES = (*TRAINING, MIX, DECODE)


def decode_limit() -> float:
    """Tokens a second if memory were all that a step waits for."""
    mean_length = NUM_PROMPT + NUM_NEW / 2
    return NUM_REQUESTS * MEMORY_BYTES / (WEIGHT_BYTES + NUM_REQUESTS * mean_length * KEY_BYTES)


@dataclass(frozen=True)
class Result:
    """Attributes:
    side: "luthier", or the peer.
    seconds: Of a step, the median; when decoding, of all requests.
    share_of_limit: Of what the hardware could do in bfloat16.
    """

    side: str
    case: str
    seconds: float
    tokens_per_second: float
    peak_gib: float
    share_of_limit: float


def phi3_mini() -> Any:
    """Phi-3-mini's shape with random weights in bfloat16."""
    from transformers import Phi3Config, Phi3ForCausalLM

    config = Phi3Config(
        vocab_size=VOCABULARY, hidden_size=3072, intermediate_size=8192, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, max_position_embeddings=4096, pad_token_id=32000, bos_token_id=1, eos_token_id=32000,
        use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = Phi3ForCausalLM._from_config(config, attn_implementation="sdpa")
        torch.set_default_dtype(torch.float32)
    return model


def timed(step: Callable[[], Any], repeats: int, warm_up: int = 3) -> tuple[float, float]:
    """Median seconds of a step, and peak GiB."""
    for _ in range(warm_up):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), peak_gib()


def peak_gib() -> float:
    return torch.cuda.max_memory_allocated() / 2**30


def training_result(side: str, name: str, step_seconds: float, peak: float) -> Result:
    """Of a whole case: `step_seconds` are those of all its jobs."""
    case = TRAINING[name]
    rate = case.num_tokens / step_seconds
    return Result(side, name, step_seconds, rate, peak, rate / case.limit)


def mix_result(side: str, rate: float, mean_length: float, peak: float) -> Result:
    """`mean_length` is that which a token meets: the mean over tokens, not over sequences."""
    limit = MATRIX_FLOPS / (FLOPS_PER_TOKEN + ATTENTION_FLOPS * mean_length)
    return Result(side, MIX, MIX_TOKENS / rate, rate, peak, rate / limit)


def decode_result(side: str, num_tokens: int, seconds: float, peak: float) -> Result:
    rate = num_tokens / seconds
    return Result(side, DECODE, seconds, rate, peak, rate / decode_limit())


def profiled(step: Callable[[], Any]) -> None:
    """Print where the time of two steps goes: kernels by name, and the longest times that the device waited."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        for _ in range(2):
            step()
        torch.cuda.synchronize()
    is_device = torch.profiler.DeviceType.CUDA if hasattr(torch.profiler, "DeviceType") else None
    rows = [row for row in found.key_averages() if row.device_type == is_device]
    for row in sorted(rows, key=lambda row: -row.self_device_time_total)[:26]:
        print(f"{row.self_device_time_total / 2e3:>9.2f} ms {row.count / 2:>6.0f} x {row.key[:100]}")
    print(f"{sum(row.self_device_time_total for row in rows) / 2e3:>9.2f} ms on the device")
    events = sorted((e for e in found.events() if e.device_type == is_device), key=lambda e: e.time_range.start)
    gaps, busy_until = [], 0.0
    for before, event in zip([None, *events], events, strict=False):
        if before is not None and event.time_range.start > busy_until:
            gaps.append((event.time_range.start - busy_until, before.name, event.name))
        busy_until = max(busy_until, event.time_range.end)
    print(f"{sum(gap for gap, *_ in gaps) / 2e3:>9.2f} ms between kernels, {len(gaps) // 2} gaps")
    for gap, before, after in sorted(gaps, reverse=True)[:8]:
        print(f"{gap / 1e3:>9.2f} ms from {before[:50]} to {after[:50]}")
