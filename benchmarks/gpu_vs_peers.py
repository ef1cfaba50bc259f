"""Speed and memory on one CUDA GPU, beside the peers in the same call.

    python benchmarks/gpu_vs_peers.py [--sides luthier peft liger] [--cases ...] [--json FILE] [--profile]

Model: Phi-3-mini's shape (3.8e9 parameters) with random weights, LoRA of rank 16 on every linear layer of the blocks,
AdamW, random tokens, loss on every token. Each side runs in a process of its own; a figure is the median of the timed
steps after warm-up. Luthier runs through its engine: planning, packing, forward, backward, reports, optimizer.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

VOCABULARY = 32064
FLOPS_PER_TOKEN = 4 * 3.72e9
"""Forward, and backward to the inputs, of the frozen matrices; attention comes on top."""
ATTENTION_FLOPS = 3.5 * 2 * 3072 * 32
"""Per token and token of its sequence: two causal products forward, five backward."""


@dataclass(frozen=True)
class Case:
    """Attributes:
    jobs: Jobs in one joint step; peers run them one after another.
    batch, length: Sequences of a job's step, and tokens of each.
    recompute: Blocks whose activations are recomputed; peers recompute all or none.
    micro_batch: Sequences of one forward; the gradient of the step is the same.
    fp8: Whether Luthier holds the base in fp8.
    """

    jobs: int
    batch: int
    length: int
    recompute: int = 0
    micro_batch: int = 0
    fp8: bool = False

    @property
    def num_tokens(self) -> int:
        return self.jobs * self.batch * self.length

    @property
    def limit(self) -> float:
        """Tokens a second at 740 TFLOP/s, what the GPU reaches on this model's matrices in bfloat16."""
        return 740e12 / (FLOPS_PER_TOKEN + ATTENTION_FLOPS * self.length)


CASES = {
    "1x256": Case(1, 1, 256),
    "4x256": Case(1, 4, 256),
    "4x2048": Case(1, 4, 2048),
    "8x2048": Case(1, 8, 2048),
    "8x2048-fp8": Case(1, 8, 2048, fp8=True),
    "16x2048-recompute": Case(1, 16, 2048, recompute=32, micro_batch=8),
    "16x2048-partly": Case(1, 16, 2048, recompute=8, micro_batch=2),
    "16-jobs-4x256": Case(16, 4, 256),
    "64-jobs-1x256": Case(64, 1, 256),
}


@dataclass(frozen=True)
class Result:
    side: str
    case: str
    step_seconds: float
    tokens_per_second: float
    peak_gib: float
    share_of_limit: float


def phi3_mini() -> Any:
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


def timed(step: Callable[[], Any], case: Case, repeats: int) -> tuple[float, float]:
    """Median seconds of a step, and peak GiB."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), torch.cuda.max_memory_allocated() / 2**30


def profiled(step: Callable[[], Any]) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        step()
        torch.cuda.synchronize()
    rows = [row for row in found.key_averages() if row.device_type != torch.profiler.DeviceType.CPU]
    for row in sorted(rows, key=lambda row: -row.self_device_time_total)[:26]:
        print(f"{row.self_device_time_total / 1e3:>9.2f} ms {row.count:>6} x {row.key[:100]}")
    print(f"{sum(row.self_device_time_total for row in rows) / 1e3:>9.2f} ms on the device")


def luthier_side(names: list[str], repeats: int, with_profile: bool) -> list[Result]:
    from luthier.base.fp8 import prepare_fp8
    from luthier.base.load import Base
    from luthier.engine.engine import Engine
    from luthier.engine.job import TrainingJob
    from luthier.types import AdapterSpec, Example, TrainSpec

    random = np.random.default_rng(0)
    results = []
    base: Base | None = None
    for name in sorted(names, key=lambda name: CASES[name].fp8):
        case = CASES[name]
        if base is None or case.fp8:
            base = None
            gc.collect()
            torch.cuda.empty_cache()
            model = phi3_mini()
            if case.fp8:
                prepare_fp8(model)
            base = Base(model)
            print("fast body:", base.fast_body_problem if base.fast_body is None else "on", flush=True)
        base.set_checkpointing(case.recompute > 0, case.recompute)
        engine = Engine(base, budget_tokens=case.num_tokens)
        for number in range(case.jobs):
            examples = [
                Example(random.integers(0, VOCABULARY, size=case.length).astype(np.int32), np.ones(case.length, "f4"))
                for _ in range(4 * case.batch)
            ]
            for example in examples:
                example.weights[0] = 0.0
            micro_tokens = (case.micro_batch or case.batch) * case.length
            spec = TrainSpec(
                epochs=1000.0, max_steps=500, batch_size=case.batch, learning_rate=1e-4, schedule="constant",
                micro_batch_tokens=micro_tokens, seed=number,
            )  # fmt: skip
            slot = base.bank.add(AdapterSpec(rank=16, alpha=16.0), number)
            engine.add(TrainingJob(f"job-{number}", slot, examples, spec))

        def step(engine: Any = engine, jobs: int = case.jobs) -> None:
            done = 0
            while done < jobs:
                done += len(engine.step())

        try:
            median, peak = timed(step, case, repeats)
            rate = case.num_tokens / median
            results.append(Result("luthier", name, median, rate, peak, rate / case.limit))
            print("RESULT", json.dumps(asdict(results[-1])), flush=True)
            if with_profile:
                profiled(step)
        except torch.OutOfMemoryError as error:
            print(f"luthier {name}: out of memory: {error}", flush=True)
        for job in list(engine.jobs.values()):
            base.bank.remove(job.slot)
        del engine, step
        gc.collect()
        torch.cuda.empty_cache()
    return results


def peft_side(side: str, names: list[str], repeats: int) -> list[Result]:
    from peft import LoraConfig, get_peft_model

    if side == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_phi3

        apply_liger_kernel_to_phi3()
    targets = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    config = LoraConfig(r=16, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    model: Any = get_peft_model(phi3_mini(), config).train()
    results = []
    for name in sorted(names, key=lambda name: CASES[name].recompute):
        case = CASES[name]
        if case.fp8:
            continue
        if case.recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

        def step(optimizer: Any = optimizer, case: Case = case) -> None:
            tokens = torch.randint(0, VOCABULARY, (case.batch, case.length), device="cuda")
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        try:
            median, peak = timed(step, case, repeats)
            rate = case.batch * case.length / median
            results.append(Result(side, name, median * case.jobs, rate, peak, rate / case.limit))
            print("RESULT", json.dumps(asdict(results[-1])), flush=True)
        except torch.OutOfMemoryError:
            print(f"{side} {name}: out of memory", flush=True)
        optimizer.zero_grad(set_to_none=True)
        del optimizer, step
        gc.collect()
        torch.cuda.empty_cache()
    return results


def run_side(side: str, arguments: argparse.Namespace) -> list[Result]:
    """A side in a process of its own, its lines passed on."""
    command = [
        sys.executable,
        __file__,
        "--side",
        side,
        "--cases",
        *arguments.cases,
        "--repeats",
        str(arguments.repeats),
    ]
    if arguments.profile:
        command.append("--profile")
    results = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith("RESULT "):
                results.append(Result(**json.loads(line.removeprefix("RESULT "))))
    if process.returncode:
        print(f"{side} ended with exit code {process.returncode}", flush=True)
    return results


def print_table(results: list[Result], cases: list[str]) -> None:
    print(f"{'case':<20}{'side':<10}{'step, ms':>10}{'tok/s':>10}{'GiB':>8}{'of limit':>10}{'of luthier':>12}")
    for case in cases:
        rows = [result for result in results if result.case == case]
        ours = next((row.tokens_per_second for row in rows if row.side == "luthier"), None)
        for row in rows:
            ratio = f"{row.tokens_per_second / ours:>11.2f}x" if ours else ""
            print(
                f"{case:<20}{row.side:<10}{row.step_seconds * 1e3:>10.1f}{row.tokens_per_second:>10.0f}"
                f"{row.peak_gib:>8.1f}{row.share_of_limit:>10.2f}{ratio}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", choices=("luthier", "peft", "liger"), default=["luthier", "peft"])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--profile", action="store_true", help="print where the time of a step goes")
    parser.add_argument("--side", help="run one side in this process")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device")
    if arguments.side == "luthier":
        luthier_side(arguments.cases, arguments.repeats, arguments.profile)
    elif arguments.side:
        peft_side(arguments.side, arguments.cases, arguments.repeats)
    else:
        results = [result for side in arguments.sides for result in run_side(side, arguments)]
        print_table(results, arguments.cases)
        if arguments.json:
            about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
            arguments.json.write_text(json.dumps({**about, "results": [asdict(r) for r in results]}, indent=1))


if __name__ == "__main__":
    main()
