"""Four different jobs together on one base, beside the same four one after another, on a CPU.

    python benchmarks/joint.py --data DIR [--batch-sizes 1 4 16] [--steps 16] [--repeats 3]

The jobs differ in rank, targets, learning rate and objective: two completions of banking77, one chat, one sequence
head. Each side runs in a process of its own. Prints tokens/s, their ratio, and peak memory beside that of a single job.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from pathlib import Path

import torch
from sets import render
from side import Measured, peak_bytes, report, run_side

from luthier.base.fetch import resolve
from luthier.base.load import Base, load_base
from luthier.data.template import Renderer
from luthier.engine.engine import Engine
from luthier.engine.job import TrainingJob
from luthier.types import AdapterSpec, Example, TrainSpec

JOBS: list[tuple[str, AdapterSpec, float]] = [
    ("banking77", AdapterSpec(rank=8, alpha=16.0), 5e-4),
    ("short_instructions", AdapterSpec(rank=16, alpha=32.0, targets=("q_proj", "v_proj")), 1e-3),
    ("banking77-head", AdapterSpec(rank=4, alpha=8.0), 3e-4),
    (
        "banking77",
        AdapterSpec(rank=16, alpha=16.0, rank_stabilized=True, targets=("gate_proj", "up_proj", "down_proj")),
        2e-4,
    ),
]

SIDES = ("one", "in-turn", "together")


def make_job(base: Base, index: int, examples: list[Example], batch_size: int, steps: int) -> TrainingJob:
    name, adapter, rate = JOBS[index]
    classes = max(example.class_index for example in examples) + 1
    adapter = dataclasses.replace(adapter, num_classes=classes or None)
    spec = TrainSpec(epochs=1000.0, max_steps=steps, batch_size=batch_size, learning_rate=rate, seed=index)
    return TrainingJob(f"{name}-{index}", base.bank.add(adapter, index), examples, spec)


def run(base: Base, jobs: list[TrainingJob]) -> tuple[list[float], list[float], list[int]]:
    engine = Engine(base)
    for job in jobs:
        engine.add(job)
    losses, seconds, tokens = [], [], []
    while engine.has_work:
        started = time.perf_counter()
        done = engine.step()
        seconds.append(time.perf_counter() - started)
        tokens.append(sum(step.num_tokens for step in done))
        losses += [step.loss for step in done]
    return losses, seconds, tokens


def run_one(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    folder = resolve(arguments.base)
    renderer = Renderer.load(folder)
    (batch_size,) = arguments.batch_sizes
    data = [render(arguments.data, name, "train", renderer) for name, _, _ in JOBS]
    base = load_base(folder)
    run(base, [make_job(base, i, data[i], batch_size, 2) for i in range(len(JOBS))])  # warm up
    for slot in list(base.bank.slots.values()):
        base.bank.remove(slot)
    losses: list[float] = []
    seconds: list[float] = []
    tokens: list[int] = []
    groups = {"one": [[0]], "in-turn": [[0], [1], [2], [3]], "together": [[0, 1, 2, 3]]}[arguments.side]
    for group in groups:
        jobs = [make_job(base, i, data[i], batch_size, arguments.steps) for i in group]
        for total, part in zip((losses, seconds, tokens), run(base, jobs), strict=True):
            total += part  # type: ignore[arg-type]
        for job in jobs:
            base.bank.remove(job.slot)
    report(Measured(losses, seconds, tokens, peak_bytes()))


def compare(arguments: argparse.Namespace) -> None:
    print(
        f"{'batch size':<12}{'in turn, tok/s':>15}{'together':>10}{'gain':>8}"
        f"{'one, MiB':>10}{'together':>10}{'ratio':>8}"
    )
    for batch_size in arguments.batch_sizes:
        runs: dict[str, list[Measured]] = {side: [] for side in SIDES}
        for _ in range(arguments.repeats):
            for side in SIDES:
                flags = [
                    "--data",
                    str(arguments.data),
                    "--batch-sizes",
                    str(batch_size),
                    "--steps",
                    str(arguments.steps),
                ]
                flags += ["--threads", str(arguments.threads), "--base", arguments.base, "--side", side]
                runs[side].append(run_side(Path(__file__), flags))
        rate = {side: statistics.median(r.tokens_per_second(warmup=0) for r in runs[side]) for side in SIDES}
        peak = {side: statistics.median(r.peak_bytes for r in runs[side]) / 2**20 for side in SIDES}
        print(
            f"{batch_size:<12}{rate['in-turn']:>15.1f}{rate['together']:>10.1f}"
            f"{rate['together'] / rate['in-turn']:>7.2f}x"
            f"{peak['one']:>10.0f}{peak['together']:>10.0f}{peak['together'] / peak['one']:>7.2f}x",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--side", choices=SIDES, help="run one side alone and print its result as JSON")
    arguments = parser.parse_args()
    if arguments.side:
        run_one(arguments)
    else:
        compare(arguments)


if __name__ == "__main__":
    main()
