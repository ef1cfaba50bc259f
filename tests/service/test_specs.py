"""From OpenAI's words to a JobSpec: what "auto" becomes, and what contradicts itself."""

from __future__ import annotations

from typing import Any

import pytest

from luthier.registry.problems import InvalidRequestError, MissingError
from luthier.service.bodies import JobCreate
from luthier.service.specs import PREFERENCE_LEARNING_RATE, read_wish


def wish(**values: Any) -> Any:
    return read_wish(JobCreate.model_validate({"model": "m", "training_file": "file-x"} | values), "m")


@pytest.mark.parametrize(
    ("num_rows", "epochs", "batch"), [(10, 3, 1), (160, 3, 10), (999, 3, 16), (5_000, 2, 16), (50_000, 1, 16)]
)
def test_auto_is_resolved(num_rows: int, epochs: int, batch: int) -> None:
    spec, resolved = wish(seed=3).spec(num_rows, 256)
    assert resolved == {"n_epochs": epochs, "batch_size": batch, "learning_rate_multiplier": 1.0}
    assert (spec.train.epochs, spec.train.batch_size, spec.train.seed) == (epochs, batch, 3)
    assert spec.train.micro_batch_tokens == 256
    assert not spec.evaluation.generate


def test_what_is_given_wins() -> None:
    hyper = {"n_epochs": 4, "batch_size": 2, "learning_rate_multiplier": 0.5}
    spec, resolved = wish(method={"type": "supervised", "supervised": {"hyperparameters": hyper}}).spec(100, 256)
    assert resolved == hyper
    assert spec.train.learning_rate == pytest.approx(2.5e-4)
    spec, resolved = wish(luthier={"train": {"epochs": 1.5, "seed": 9, "micro_batch_tokens": 64}}).spec(100, 256)
    assert (spec.train.epochs, spec.train.seed, spec.train.micro_batch_tokens) == (1.5, 9, 64)
    assert resolved["n_epochs"] == 2


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"hyperparameters": {"n_epochs": 2}, "luthier": {"train": {"epochs": 2.0}}}, "twice"),
        ({"luthier": {"validation": 0.9}}, "0 to 0.5"),
        ({"luthier": {"validation": 0.1}, "validation_file": "file-y"}, "not both"),
        ({"luthier": {"train": {"dtype": "float16"}}}, "service's choice"),
        ({"luthier": {"base": "x"}}, "named in `model`"),
        ({"luthier": {"output": "/tmp/x"}}, "not a field"),
        ({"luthier": {"train": 5}}, "train"),
        ({"luthier": {"task": {"type": "chat", "system": 5}}}, "task"),
        ({"method": {"type": "dpo"}, "luthier": {"task": "chat"}}, "dpo goes with the task preference"),
        ({"method": {"type": "supervised"}, "luthier": {"task": "preference"}}, "dpo goes with the task preference"),
        ({"method": {"type": "supervised", "dpo": {}}}, "method.dpo is given"),
        ({"method": {"type": "dpo", "supervised": {}}}, "method.supervised is given"),
        (
            {
                "method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2}}},
                "luthier": {"task": {"type": "preference", "beta": 0.3}},
            },
            "twice",
        ),
        (
            {
                "method": {"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 2}}},
                "hyperparameters": {"n_epochs": 3},
            },
            "differ",
        ),
    ],
)
def test_what_does_not_hold(values: dict[str, Any], what: str) -> None:
    with pytest.raises(InvalidRequestError, match=what):
        wish(**values)


def test_reinforcement_is_not_there() -> None:
    with pytest.raises(MissingError, match="not served"):
        wish(method={"type": "reinforcement", "reinforcement": {}})


@pytest.mark.parametrize(
    "values",
    [
        {"method": {"type": "dpo"}},
        {"method": {"type": "dpo", "dpo": {}}},
        {"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": "auto", "n_epochs": "auto"}}}},
        {"method": {"type": "dpo"}, "luthier": {"task": "preference"}},
        {"luthier": {"task": "preference"}},
    ],
)
def test_dpo_is_the_task_preference_and_auto_is_stated(values: dict[str, Any]) -> None:
    spec, resolved = wish(**values).spec(160, 256)
    assert (spec.task.type, spec.task.beta) == ("preference", 0.1)
    assert resolved == {"n_epochs": 3, "batch_size": 10, "learning_rate_multiplier": 1.0, "beta": 0.1}
    assert spec.train.learning_rate == PREFERENCE_LEARNING_RATE == 5e-5


def test_a_given_beta_and_own_options_stand_together() -> None:
    hyper = {"beta": 0.5, "learning_rate_multiplier": 2.0}
    own = {"task": {"type": "preference", "label_smoothing": 0.1}}
    spec, resolved = wish(method={"type": "dpo", "dpo": {"hyperparameters": hyper}}, luthier=own).spec(160, 256)
    assert (spec.task.beta, spec.task.label_smoothing, resolved["beta"]) == (0.5, 0.1, 0.5)
    assert spec.train.learning_rate == pytest.approx(1e-4)
    assert own == {"task": {"type": "preference", "label_smoothing": 0.1}}
