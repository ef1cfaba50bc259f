"""A rank of the comparison in `tests/worker/test_zero.py`: `python zero_jobs.py RANK SIZE RENDEZVOUS OUT BASE`.

BASE is a tiny base with biases.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from engine.conftest import random_examples, run_all
from torch import Tensor

from luthier.base.load import Base, load_base
from luthier.distributed.held_states import held_states
from luthier.distributed.torch_ranks import connected
from luthier.distributed.zero import ZeroOptimizer
from luthier.distributed.zero_config import zero_config
from luthier.engine.engine import Engine
from luthier.engine.job import TrainingJob
from luthier.engine.optimizer import JobOptimizer
from luthier.engine.ranks import Ranks
from luthier.methods.exclusive.layer import load_own
from luthier.types import AdapterSpec, ExclusiveSpec, TrainSpec

IN_BFLOAT16 = " in bfloat16"

SETTINGS = [
    *(("full", stage, "none") for stage in (1, 2, 3)),
    ("full", 2, "optimizer"),
    ("full", 3, "parameters"),
    *(("full", stage, "own") for stage in (2, 3)),
    ("last_layers", 3, "none"),
    *(("lora", stage, "none") for stage in (1, 2, 3)),
    *(("bias", stage, "none") for stage in (1, 2, 3)),
    *((f"full{IN_BFLOAT16}", stage, "none") for stage in (1, 2, 3)),
    (f"last_layers{IN_BFLOAT16}", 2, "optimizer"),
    (f"lora{IN_BFLOAT16}", 2, "none"),
    (f"lora{IN_BFLOAT16}", 3, "none"),
    *((method, stage, "none") for method in ("dora", "ia3", "qlora") for stage in (1, 2)),
]
"""Method, stage and what is offloaded; or "own": nothing, and DeepSpeed's values are a user's."""

OWN = {
    2: {
        "overlap_comm": True,
        "contiguous_gradients": False,
        "reduce_scatter": False,
        "parameter_alignment": True,
        "reduce_bucket_size": 3000,
        "allgather_bucket_size": 4000,
    },
    3: {
        "overlap_comm": True,
        "sub_group_size": 20_000,
        "reduce_bucket_size": 5000,
        "stage3_prefetch_bucket_size": 2000,
        "stage3_param_persistence_threshold": 100,
        "stage3_max_live_parameters": 20_000,
        "stage3_max_reuse_distance": 0,
    },
}

ADAPTERS = {
    "lora": AdapterSpec(rank=4, alpha=8.0, dropout=0.1),
    "dora": AdapterSpec(method="dora", rank=2, alpha=4.0),
    "ia3": AdapterSpec(method="ia3", targets="default"),
    "qlora": AdapterSpec(rank=4, alpha=8.0),
}
"""Methods of the bank; qlora over a base in NF4."""

TRAIN = TrainSpec(
    epochs=9.0, max_steps=5, batch_size=5, learning_rate=1e-2, seed=1, micro_batch_tokens=40, weight_decay=0.1
)
"""Batches of five in parts of 40 tokens: ranks have different numbers of them, and one batch of two."""


def outcome(folder: Path, method: str, stage: int, offload: str, ranks: Ranks) -> dict[str, Tensor]:
    """Losses, norms, what was learnt and its moments, of a job of the method on a tiny base."""
    base: Base
    is_narrow, method = method.endswith(IN_BFLOAT16), method.removesuffix(IN_BFLOAT16)
    dtype = "bfloat16" if is_narrow else "float32"
    if method in ADAPTERS:
        quantization = "nf4" if method == "qlora" else None
        base = load_base(
            folder, dtype=dtype, quantization=quantization, use_reference=stage == 3, wants_fast_body=False
        )
        slot = base.bank.add(ADAPTERS[method], 1)
    else:
        own = load_own(folder, ExclusiveSpec(method, num_layers=1), seed=1, dtype=dtype, has_masters=not stage)
        base, slot = own, own.slot  # type: ignore[assignment]
    base.head_is_plain = base.head_is_plain and stage < 3
    largest = max(p.numel() for p in slot.parameters().values()) if method in ADAPTERS else 0
    own = {"zero_optimization": OWN[stage]} if offload == "own" else {}
    away = "none" if own else offload
    steps_narrow = is_narrow and method not in ADAPTERS
    config = (
        zero_config(stage, away, 1.0, is_bfloat16=steps_narrow, largest_kept_whole=largest, own=own) if stage else {}
    )

    def make(parameters, spec, total_steps, ratios, hooks, flat):  # type: ignore[no-untyped-def]
        return ZeroOptimizer(parameters, spec, total_steps, ratios, base, ranks, config)

    job = TrainingJob("job", slot, random_examples(17, 3), TRAIN, make if stage else JobOptimizer)
    engine = Engine(base, ranks=ranks)
    engine.add(job)
    job.optimizer.shard()
    held: list[list[int]] = []
    step = job.optimizer.step

    def counted(norm: float | None = None) -> tuple[float, float]:
        states = held_states(base, job.optimizer)
        held.append([states.weights, states.gradients, states.optimizer])
        return step(norm)

    job.optimizer.step = counted  # type: ignore[method-assign]
    reports = run_all(engine)["job"]
    with job.optimizer.consolidated() as whole:
        values, moments = dict(whole), job.optimizer.state()
    job.optimizer.gather()
    found = {
        "losses": torch.tensor([report.loss for report in reports]),
        "norms": torch.tensor([report.grad_norm for report in reports]),
        "tokens": torch.tensor([report.num_tokens for report in reports]),
        "held": torch.tensor(held[-1]),
    }
    found |= {name: tensor.detach().clone() for name, tensor in slot.parameters().items()}
    if ranks.rank == 0:
        assert not stage or values.keys() == slot.parameters().keys()
        assert all(torch.equal(values[name].to(found[name].dtype), found[name]) for name in values)
        found |= {name: tensor.clone() for name, tensor in moments.items()}
    return found


def main(rank: int, size: int, rendezvous: str, out: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    with connected(rank, size, rendezvous, torch.device("cpu")) as ranks:
        found = {setting: outcome(folder, *setting, ranks) for setting in SETTINGS}
    torch.save(found, out)


if __name__ == "__main__":
    given = sys.argv[1:]
    main(int(given[0]), int(given[1]), given[2], Path(given[3]), Path(given[4]))
