"""Loss curves of the fast paths beside the plain path's, on one CUDA GPU, over the same batches and initial adapter.

    python benchmarks/gpu_curves.py [--steps 200]

Model: SmolLM2-135M's shape with random weights in bfloat16; LoRA of rank 16 on every linear layer; a set of random
sequences small enough to be learnt. Prints the mean loss of every quarter, and the largest difference from the plain
path's.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch

from luthier.base.fp8 import prepare_fp8
from luthier.base.load import Base
from luthier.engine.engine import Engine
from luthier.engine.job import TrainingJob
from luthier.types import AdapterSpec, Example, TrainSpec


def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True, rope_theta=100000.0,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        made = LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
        torch.set_default_dtype(torch.float32)
    return made


def curve(base: Base, steps: int) -> np.ndarray:
    random = np.random.default_rng(0)
    examples = []
    for _ in range(32):
        length = int(random.integers(20, 120))
        weights = np.ones(length, dtype=np.float32)
        weights[0] = 0.0
        examples.append(Example(random.integers(0, 200, size=length).astype(np.int32), weights))
    spec = TrainSpec(epochs=1000.0, max_steps=steps, batch_size=8, learning_rate=2e-3, seed=1)
    engine = Engine(base)
    engine.add(TrainingJob("a", base.bank.add(AdapterSpec(rank=16), 0), examples, spec))
    losses = []
    while engine.has_work:
        losses += [report.loss for report in engine.step()]
    return np.array(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    plain: np.ndarray | None = None
    for name in ("plain", "fast", "fast, fp8 base"):
        made = model()
        if "fp8" in name:
            prepare_fp8(made)
        base = Base(made, wants_fast_body="fast" in name)
        if "fast" in name and base.fast_body is None:
            print(f"{name}: {base.fast_body_problem}")
        started = time.perf_counter()
        losses = curve(base, steps)
        seconds = time.perf_counter() - started
        plain = losses if plain is None else plain
        quarters = " ".join(f"{part.mean():.4f}" for part in np.array_split(losses, 4))
        difference = float(np.abs(losses - plain).max())
        print(f"{name:<16}{quarters}  largest difference {difference:.4f}  {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
