"""Two processes of one thread each against one process of one thread, and what the way through ranks itself costs.

    python benchmarks/ranks.py --data DIR [--sizes 2] [--batch-size 16] [--steps 16] [--repeats 3]

banking77 as completion, LoRA r=16. Three sides: `plain` (one process, no ranks), `1` (one process through rounds and
sums) and each of `--sizes`, by gloo on this machine. Prints tokens/s, their ratio to `plain`, each process's peak
memory, and the largest relative difference of the loss curves. Wanted: 1.7 times with two processes on two cores, and
`1` within 3% of `plain`.
"""

from __future__ import annotations

import argparse
import statistics
from contextlib import nullcontext
from pathlib import Path

import torch
from sets import render
from side import Measured, measure, report, run_ranks

from luthier.base.fetch import resolve
from luthier.base.load import load_base
from luthier.data.template import Renderer
from luthier.distributed.torch_ranks import connected
from luthier.engine.engine import Engine
from luthier.engine.job import TrainingJob
from luthier.engine.ranks import ALONE
from luthier.types import AdapterSpec, TrainSpec

PLAIN = 0
"""The size of the side without ranks."""


def train(arguments: argparse.Namespace) -> None:
    """One process of one side."""
    torch.set_num_threads(arguments.threads)
    folder = resolve(arguments.base)
    examples = render(arguments.data, "banking77", "train", Renderer.load(folder))
    base = load_base(folder)
    spec = TrainSpec(
        epochs=1000.0, max_steps=arguments.steps, batch_size=arguments.batch_size, learning_rate=5e-4, seed=1
    )
    job = TrainingJob("job", base.bank.add(AdapterSpec(rank=16, alpha=32.0), 1), examples, spec)
    size = arguments.size
    meeting = connected(arguments.rank, size, arguments.meeting, torch.device("cpu")) if size else nullcontext(ALONE)
    with meeting as ranks:
        engine = Engine(base, ranks=ranks)
        engine.add(job)
        measured = measure(engine)
    report(measured)


def run_side(arguments: argparse.Namespace, size: int) -> Measured:
    """Start a side's processes and read what the first measured."""
    flags = ["--data", str(arguments.data), "--steps", str(arguments.steps), "--threads", str(arguments.threads)]
    flags += ["--batch-size", str(arguments.batch_size), "--base", arguments.base]
    return Measured(**run_ranks(Path(__file__), flags, size)[0])


def compare(arguments: argparse.Namespace) -> None:
    sides = [PLAIN, 1, *arguments.sizes]
    runs: dict[int, list[Measured]] = {size: [] for size in sides}
    for _ in range(arguments.repeats):
        for size in sides:
            runs[size].append(run_side(arguments, size))
    rates = {size: statistics.median(run.tokens_per_second() for run in runs[size]) for size in sides}
    print(f"{'processes':<12}{'tok/s':>10}{'ratio':>9}{'MiB each':>10}{'loss differs':>14}")
    for size in sides:
        peak = statistics.median(run.peak_bytes for run in runs[size]) / 2**20
        pairs = zip(runs[size][0].losses, runs[PLAIN][0].losses, strict=True)
        differs = max(abs(a - b) / abs(b) for a, b in pairs)
        name = str(size) if size else "plain"
        print(f"{name:<12}{rates[size]:>10.1f}{rates[size] / rates[PLAIN]:>8.3f}x{peak:>10.0f}{differs:>14.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets")
    parser.add_argument("--sizes", nargs="*", type=int, default=[2], help="numbers of processes")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--size", type=int, help="run one process of the side of this size (0: plain)")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--meeting", default="")
    arguments = parser.parse_args()
    if arguments.size is None:
        compare(arguments)
    else:
        train(arguments)


if __name__ == "__main__":
    main()
