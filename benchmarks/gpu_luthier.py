"""Luthier's side of `gpu_vs_peers.py`: its engine with planning, packing, forward, backward, reports and optimizer."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_cases import (
    DECODE,
    MIX,
    MIX_LONGEST,
    MIX_TOKENS,
    NUM_ADAPTERS,
    NUM_NEW,
    NUM_PROMPT,
    NUM_REQUESTS,
    RANK,
    TRAINING,
    VOCABULARY,
    Case,
    Result,
    decode_result,
    mix_result,
    peak_gib,
    phi3_mini,
    profiled,
    timed,
    training_result,
)

from luthier.base.fp8 import prepare_fp8
from luthier.base.load import Base
from luthier.base.nf4 import hold_in_nf4
from luthier.engine.engine import Engine
from luthier.engine.job import TrainingJob
from luthier.engine.request import Request, SamplingParams
from luthier.engine.sample import Sampler
from luthier.ops.nf4 import quantize
from luthier.types import AdapterSpec, Example, TrainSpec

SPEC = AdapterSpec(rank=RANK, alpha=float(RANK))
ORDER = ("bf16", "fp8", "nf4")


def run(
    names: Sequence[str], repeats: int, lengths: Path | None, report: Callable[[Result], None], *, profile: bool
) -> None:
    """Measure the cases, those over one base after another."""
    base, held = None, ""
    for name in sorted(names, key=lambda name: ORDER.index(_kind(name))):
        if base is None or _kind(name) != held:
            del base
            _free()
            held = _kind(name)
            base = make_base(held)
            print("fast body:", base.fast_body_problem if base.fast_body is None else "on", flush=True)
        try:
            if name == DECODE:
                report(_decode(base, profile))
            elif name == MIX:
                report(_mix(base, lengths, repeats))
            else:
                report(_train(base, name, repeats, profile))
        except torch.OutOfMemoryError as error:
            print(f"luthier {name}: out of memory: {error}", flush=True)
        for slot in list(base.bank.slots.values()):
            base.bank.remove(slot)
        _free()


def make_base(kind: str) -> Base:
    """The model with its linear layers in bf16, fp8 or nf4."""
    model = phi3_mini()
    if kind == "fp8":
        prepare_fp8(model)
    elif kind == "nf4":
        layers = [(name, module) for name, module in model.model.named_modules() if type(module) is torch.nn.Linear]
        weights = {f"model.{name}": quantize(module.weight.data) for name, module in layers}
        hold_in_nf4(model, weights, torch.bfloat16)
        del layers
    return Base(model)


def add_job(engine: Engine, number: int, examples: list[Example], batch: int, micro_tokens: int) -> TrainingJob:
    """A job of its own in the engine, whose examples last for any number of steps."""
    spec = TrainSpec(
        epochs=1e6, max_steps=5000, batch_size=batch, learning_rate=1e-4, schedule="constant",
        micro_batch_tokens=micro_tokens, seed=number,
    )  # fmt: skip
    job = TrainingJob(f"job-{number}", engine.base.bank.add(SPEC, number), examples, spec)
    engine.add(job)
    return job


def random_examples(lengths: Sequence[int], seed: int) -> list[Example]:
    """Random tokens with loss on every one that has a token before it."""
    random = np.random.default_rng(seed)
    examples = []
    for length in lengths:
        weights = np.ones(length, dtype=np.float32)
        weights[0] = 0.0
        examples.append(Example(random.integers(0, VOCABULARY, size=length).astype(np.int32), weights))
    return examples


def joint_step(engine: Engine, num_jobs: int) -> Callable[[], None]:
    """One optimizer step of each of so many jobs."""

    def step() -> None:
        done = 0
        while done < num_jobs:
            done += len(engine.step())

    return step


def _train(base: Base, name: str, repeats: int, profile: bool) -> Result:
    case: Case = TRAINING[name]
    base.set_checkpointing(case.recompute > 0, case.recompute)
    engine = Engine(base, budget_tokens=case.num_tokens)
    for number in range(case.jobs):
        examples = random_examples([case.length] * (4 * case.batch), number)
        add_job(engine, number, examples, case.batch, (case.micro_batch or case.batch) * case.length)
    step = joint_step(engine, case.jobs)
    result = training_result("luthier", name, *timed(step, repeats))
    if profile:
        profiled(step)
    base.set_checkpointing(False)
    return result


def _mix(base: Base, lengths: Path | None, repeats: int) -> Result:
    if lengths is None:
        raise SystemExit("the mix wants --lengths FILE, a JSON list of tokens a sequence")
    found = [min(MIX_LONGEST, length) for length in json.loads(lengths.read_text())]
    batch = round(MIX_TOKENS / (sum(found) / len(found)))
    engine = Engine(base, budget_tokens=2 * MIX_TOKENS)
    add_job(engine, 0, random_examples(found, 0), batch, 2 * MIX_TOKENS)
    for _ in range(4):
        engine.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    started, num_tokens = time.perf_counter(), 0
    for _ in range(3 * repeats):  # more steps, for they differ in size
        num_tokens += sum(report.num_tokens for report in engine.step())
    torch.cuda.synchronize()
    rate = num_tokens / (time.perf_counter() - started)
    return mix_result("luthier", rate, sum(n * n for n in found) / sum(found), peak_gib())


def _decode(base: Base, profile: bool) -> Result:
    slots = [base.bank.add(SPEC, seed) for seed in range(NUM_ADAPTERS)]
    generator = torch.Generator(device="cuda").manual_seed(0)
    with torch.no_grad():
        for slot in slots:
            for factors in slot.adapters.values():
                factors.b_OR.normal_(0.0, 1e-3, generator=generator)

    def reply(num_new: int) -> int:
        random = np.random.default_rng(num_new)
        requests = [
            Request(
                f"request-{index}",
                random.integers(0, VOCABULARY, size=NUM_PROMPT).astype(np.int32),
                slots[index % NUM_ADAPTERS].index,
                SamplingParams(max_new_tokens=num_new),
            )
            for index in range(NUM_REQUESTS)
        ]
        replies = Sampler(base, lambda tokens: "").run(requests)
        return sum(len(reply.tokens) for reply in replies)

    reply(16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    num_tokens = reply(NUM_NEW)
    torch.cuda.synchronize()
    result = decode_result("luthier", num_tokens, time.perf_counter() - started, peak_gib())
    if profile:
        profiled(lambda: reply(12))
    return result


def _kind(name: str) -> str:
    return TRAINING[name].base if name in TRAINING else "bf16"


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def device_facts() -> dict[str, Any]:
    """What a committed result says of where it was measured."""
    import transformers

    return {
        "gpu": torch.cuda.get_device_name(),
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
