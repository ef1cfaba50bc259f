"""Cost at scale on one CUDA GPU: a step's time and memory against the number of jobs, the rank and the length.

    python benchmarks/gpu_scale.py [--json FILE] [--plot FILE]
    python benchmarks/gpu_scale.py --show FILE --plot FILE         the picture of an earlier call

Model and settings as in `gpu_vs_peers.py`. One thing changes at a time:

    jobs      1 to 128 jobs with one sequence of 256 tokens each, rank 16, joint
    rank      1 to 256, one job with 8 sequences of 512 tokens
    length    one job with one sequence of 256 to 16,384 tokens, rank 16
"""

from __future__ import annotations

import argparse
import gc
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_cases import RANK, phi3_mini, timed
from gpu_luthier import device_facts, joint_step, random_examples

from luthier.base.load import Base
from luthier.engine.engine import Engine
from luthier.engine.job import TrainingJob
from luthier.types import AdapterSpec, TrainSpec

AXES = {
    "jobs": (1, 2, 4, 8, 16, 32, 64, 128),
    "rank": (1, 4, 16, 64, 256),
    "length": (256, 1024, 4096, 16384),
}
TITLES = {
    "jobs": "jobs, 256 tokens each",
    "rank": "rank, 8 sequences of 512 tokens",
    "length": "tokens of one sequence",
}


@dataclass(frozen=True)
class Point:
    """Attributes:
    axis, value: What changes, and what it is here.
    seconds: Of a step of every job, the median.
    peak_gib: Of the whole process's tensors.
    """

    axis: str
    value: int
    num_tokens: int
    seconds: float
    peak_gib: float


def main() -> None:
    """Measure every point, or show what was measured before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the points")
    parser.add_argument("--plot", type=Path, help="where to draw them")
    parser.add_argument("--show", type=Path, help="read the points from here, and run nothing")
    options = parser.parse_args()
    if options.show:
        kept = json.loads(options.show.read_text())
    else:
        kept = device_facts() | {"points": [asdict(point) for point in measure()]}
        if options.json:
            options.json.write_text(json.dumps(kept, indent=1) + "\n")
    for row in kept["points"]:
        rate = row["num_tokens"] / row["seconds"]
        print(f"{row['axis']:<8}{row['value']:>7}{row['seconds'] * 1e3:>10.1f} ms{rate:>9.0f}/s{row['peak_gib']:>8.1f}")
    if options.plot:
        plot(kept, options.plot)


def measure() -> list[Point]:
    base = Base(phi3_mini())
    points = []
    for axis, values in AXES.items():
        for value in values:
            num_jobs = value if axis == "jobs" else 1
            rank = value if axis == "rank" else RANK
            lengths = {"jobs": [256], "rank": [512] * 8, "length": [value]}[axis]
            try:
                points.append(_point(base, axis, value, num_jobs, rank, lengths))
                print(points[-1], flush=True)
            except torch.OutOfMemoryError:
                print(f"{axis} {value}: out of memory", flush=True)
            for slot in list(base.bank.slots.values()):
                base.bank.remove(slot)
            gc.collect()
            torch.cuda.empty_cache()
    return points


def _point(base: Base, axis: str, value: int, num_jobs: int, rank: int, lengths: list[int]) -> Point:
    engine = Engine(base)
    spec = AdapterSpec(rank=rank, alpha=16.0)
    for number in range(num_jobs):
        train = TrainSpec(
            epochs=1e6, max_steps=5000, batch_size=len(lengths), learning_rate=1e-4, schedule="constant",
            micro_batch_tokens=sum(lengths), seed=number,
        )  # fmt: skip
        engine.add(TrainingJob(str(number), base.bank.add(spec, number), random_examples(lengths * 4, number), train))
    seconds, peak = timed(joint_step(engine, num_jobs), 5, warm_up=4)
    return Point(axis, value, num_jobs * sum(lengths), seconds, peak)


def plot(kept: dict[str, Any], path: Path) -> None:
    """Time above, memory below; a dashed line shows what growing in step with the first point would be."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, len(AXES), figsize=(11, 6), squeeze=False)
    for column, axis in enumerate(AXES):
        rows = [row for row in kept["points"] if row["axis"] == axis]
        values = [row["value"] for row in rows]
        for line, (name, unit) in enumerate((("seconds", "seconds a step"), ("peak_gib", "peak GiB"))):
            axes = grid[line][column]
            heights = [row[name] for row in rows]
            axes.plot(values, heights, marker="o", color="#2a6f97")
            if line == 0:
                linear = [heights[0] * value / values[0] for value in values]
                axes.plot(values, linear, linestyle="--", color="#999999", linewidth=1, label="in proportion")
                axes.legend(frameon=False, fontsize=8)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_ylabel(unit if column == 0 else "")
            axes.set_xlabel(TITLES[axis] if line else "")
            axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Phi-3-mini's shape, LoRA, bfloat16, one {kept['gpu']}, {kept['date']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
