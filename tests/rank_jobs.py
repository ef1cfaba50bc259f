"""A rank of a comparison in `tests/worker/test_ranks.py`: `python rank_jobs.py RANK SIZE RENDEZVOUS OUT BASE...`.

What it trains, and how, is what `outcomes` does in one process too.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from engine.conftest import adapter_of, add_job, random_examples, run_all, widen_norms
from torch import Tensor

from luthier.base.load import load_base
from luthier.distributed.torch_ranks import connected
from luthier.engine.engine import Engine
from luthier.engine.ranks import Ranks

GROUPS = ([0], [4], [3], [0, 1, 2, 5, 8])
"""Kinds of jobs that train together: lora, dora, a sequence head by themselves; then batches of 1 to 5 sequences, with
dropout, LoRA+ and a token head. A batch of 1 leaves a rank without any."""


def outcomes(folder: Path, ranks: Ranks) -> dict[str, Tensor]:
    """Loss curves, adapters and moments of every group's jobs, by name."""
    found: dict[str, Tensor] = {}
    for number, kinds in enumerate(GROUPS):
        engine = Engine(load_base(folder, dtype="float64"), ranks=ranks)
        jobs = [add_job(engine, kind, random_examples, num=7) for kind in kinds]
        curves = run_all(engine)
        for job in jobs:
            name = f"{folder.name} {number} {job.name}"
            found[f"{name} losses"] = torch.tensor([report.loss for report in curves[job.name]], dtype=torch.float64)
            found |= {f"{name} {part}": tensor for part, tensor in adapter_of(job).items()}
            found |= {f"{name} {part}": tensor for part, tensor in job.optimizer.state().items()}
    return found


def main(rank: int, size: int, rendezvous: str, out: Path, folders: list[Path]) -> None:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, connected(rank, size, rendezvous, torch.device("cpu")) as ranks:
        widen_norms(patch)
        found: dict[str, Tensor] = {}
        for folder in folders:
            found |= outcomes(folder, ranks)
    torch.save(found, out)


if __name__ == "__main__":
    given = sys.argv[1:]
    main(int(given[0]), int(given[1]), given[2], Path(given[3]), [Path(name) for name in given[4:]])
