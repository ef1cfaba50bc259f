"""Exclusive jobs on tiny models: bases, examples, and a loop that runs them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from luthier.base.own import OwnBase
from luthier.engine.engine import Engine
from luthier.engine.job import StepReport, TrainingJob, total_steps
from luthier.methods.exclusive.layer import load_own
from luthier.types import Example, ExclusiveSpec, TrainSpec

TRAIN = TrainSpec(epochs=4, batch_size=4, learning_rate=1e-2, weight_decay=0.01, seed=3)
ALL = {"target_modules": "all-linear"}

OWN = {
    "full": ExclusiveSpec("full"),
    "last_layers": ExclusiveSpec("last_layers", num_layers=1),
    "bias": ExclusiveSpec("bias"),
}
PEFT = {
    "prompt": ExclusiveSpec("peft", peft_type="PROMPT_TUNING", options={"num_virtual_tokens": 5}),
    "prefix": ExclusiveSpec("peft", peft_type="PREFIX_TUNING", options={"num_virtual_tokens": 5}),
    "p_tuning": ExclusiveSpec(
        "peft",
        peft_type="P_TUNING",
        options={"num_virtual_tokens": 5, "encoder_hidden_size": 32, "encoder_dropout": 0.1},
    ),
    "vera": ExclusiveSpec(
        "peft", peft_type="VERA", options={"r": 8, "vera_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}
    ),
    "loha": ExclusiveSpec("peft", peft_type="LOHA", options={"r": 4, "module_dropout": 0.1, **ALL}),
    "lokr": ExclusiveSpec("peft", peft_type="LOKR", options={"r": 4, "rank_dropout": 0.1, **ALL}),
    "oft": ExclusiveSpec("peft", peft_type="OFT", options={"oft_block_size": 8, **ALL}),
    "boft": ExclusiveSpec("peft", peft_type="BOFT", options={"boft_block_size": 4, "boft_dropout": 0.1, **ALL}),
    "adalora": ExclusiveSpec(
        "peft", peft_type="ADALORA", options={"init_r": 6, "target_r": 3, "tinit": 2, "tfinal": 3, "deltaT": 2, **ALL}
    ),
    "ln_tuning": ExclusiveSpec("peft", peft_type="LN_TUNING"),
    "hra": ExclusiveSpec("peft", peft_type="HRA", options={"r": 4, "target_modules": ["q_proj", "v_proj"]}),
}


def examples(num: int = 12, seed: int = 0, classes: int = 0) -> list[Example]:
    """Texts of one small alphabet, so that there is something to learn."""
    random = np.random.default_rng(seed)
    made = []
    for row in range(num):
        tokens = random.integers(40, 70, size=int(random.integers(6, 40))).astype(np.int32)
        weights = np.zeros(len(tokens), dtype=np.float32)
        if not classes:
            weights[len(tokens) // 3 + 1 :] = 1.0
        made.append(Example(tokens, weights, row % classes if classes else -1, row))
    return made


def start(
    folder: Path, spec: ExclusiveSpec, dtype: str = "float32", train: TrainSpec = TRAIN
) -> tuple[Engine, TrainingJob]:
    """An engine with one fresh job."""
    data = examples(classes=spec.num_classes or 0)
    base = load_own(folder, replace(spec, total_steps=total_steps(len(data), train)), seed=1, dtype=dtype)
    engine = Engine(base)
    job = TrainingJob("own", base.slot, data, train)
    engine.add(job)
    return engine, job


def run(engine: Engine, until: int | None = None) -> list[StepReport]:
    """Step until the job is done, or has done so many steps."""
    reports: list[StepReport] = []
    while engine.has_work and (until is None or len(reports) < until):
        reports += engine.step()
    return reports


def base_of(engine: Engine) -> OwnBase:
    assert isinstance(engine.base, OwnBase)
    return engine.base
