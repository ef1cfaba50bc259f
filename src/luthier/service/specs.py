"""From a create request to a JobSpec: OpenAI's hyperparameters resolved, our own fields checked."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from luthier.errors import RecipeError
from luthier.recipe import JobSpec, validate
from luthier.registry.problems import InvalidRequestError, MissingError
from luthier.service.bodies import MAX_SEED, DpoHyperparameters, Hyperparameters, JobCreate
from luthier.service.methods import check_method, inherited_method
from luthier.tasks.preference.schema import PreferenceConfig

OWN_FIELDS = ("task", "method", "train", "evaluation")
RESOLVED = ("epochs", "batch_size", "learning_rate")
NO_VALIDATION, MAX_VALIDATION = 0.0, 0.5
PREFERENCE_LEARNING_RATE = 5e-5
"""What a learning-rate multiplier of 1 means for preferences, which ask for smaller steps than replies to imitate."""


@dataclass(frozen=True, slots=True)
class WantedJob:
    """What was asked for, before the number of rows is known.

    Attributes:
        own: The fields under `luthier` that belong to a JobSpec.
        hold_out: Share of the training rows to hold out.
        hyperparameters: OpenAI's, with `beta` where preferences are learnt.
        seed: The caller's, or a fresh one.
    """

    base: str
    own: dict[str, Any]
    hold_out: float
    hyperparameters: Hyperparameters
    seed: int

    def spec(self, num_rows: int, step_tokens: int) -> tuple[JobSpec, dict[str, Any]]:
        """The JobSpec, and the hyperparameters as they were resolved.

        "auto" becomes: 3 epochs below 1,000 rows, 2 below 10,000, else 1; batches of a sixteenth of the rows, at least
        1 and at most 16; a learning-rate multiplier of 1, which multiplies `train.learning_rate`'s default, or for
        preferences `PREFERENCE_LEARNING_RATE`; a beta of 0.1.

        Raises:
            InvalidRequestError: naming every field under `luthier` that does not hold.
        """
        given = self.own.get("train") or {}
        if not isinstance(given, dict):
            raise InvalidRequestError("luthier.train is an object with fields.", param="luthier.train")
        hyper = self.hyperparameters
        epochs = _choose(hyper.n_epochs, 3 if num_rows < 1_000 else 2 if num_rows < 10_000 else 1)
        batch = _choose(hyper.batch_size, max(1, min(16, num_rows // 16)))
        multiplier = float(_choose(hyper.learning_rate_multiplier, 1.0))
        is_preference = isinstance(hyper, DpoHyperparameters)
        default_rate = JobSpec.model_fields["train"].default.learning_rate
        if is_preference:
            default_rate = PREFERENCE_LEARNING_RATE
        train: dict[str, Any] = {
            "epochs": float(epochs),
            "batch_size": batch,
            "learning_rate": default_rate * multiplier,
        }
        train |= {"seed": self.seed} | given
        asked = train.get("micro_batch_tokens")
        if isinstance(asked, int) or asked is None:
            train["micro_batch_tokens"] = max(16, min(asked or step_tokens, step_tokens))
        spec = check_own({**self.own, "train": train}, self.base)
        resolved = {
            "n_epochs": max(1, round(spec.train.epochs)),
            "batch_size": spec.train.batch_size,
            "learning_rate_multiplier": spec.train.learning_rate / default_rate,
        }
        if isinstance(spec.task, PreferenceConfig):
            resolved["beta"] = spec.task.beta
        return spec, resolved


def read_wish(body: JobCreate, base: str, parent_method: dict[str, Any] | None = None) -> WantedJob:
    """Check all of a create request that needs no file.

    Args:
        parent_method: The method of the tuned model to go on from; taken where the request names none.

    Raises:
        InvalidRequestError: for a method that is not served, or fields that contradict each other or do not hold.
    """
    own = dict(body.luthier or {})
    hyper = _hyperparameters(body, own)
    if parent_method is not None:
        own.setdefault("method", inherited_method(parent_method))
    hold_out = _hold_out(own.pop("validation", NO_VALIDATION), body)
    odd = [name for name in own if name not in OWN_FIELDS]
    if odd:
        what = (
            "the base is named in `model`" if odd[0] == "base" else f"known: {', '.join((*OWN_FIELDS, 'validation'))}"
        )
        raise InvalidRequestError(f"luthier.{odd[0]} is not a field; {what}.", param=f"luthier.{odd[0]}")
    if body.integrations:
        raise InvalidRequestError("Integrations are not served; leave them out.", param="integrations")
    train = own.get("train") or {}
    if isinstance(train, dict):
        pairs = zip(RESOLVED, ("n_epochs", "batch_size", "learning_rate_multiplier"), strict=True)
        for mine, theirs in pairs:
            if mine in train and getattr(hyper, theirs) != "auto":
                raise InvalidRequestError(
                    f"{theirs} and luthier.train.{mine} say the same thing twice; give one of them.", param=theirs
                )
        if train.get("dtype", "auto") != "auto":
            raise InvalidRequestError(
                "luthier.train.dtype is the service's choice, for jobs share one base; leave it out.",
                param="luthier.train.dtype",
            )
    seed = body.seed if body.seed is not None else secrets.randbelow(MAX_SEED)
    wanted = WantedJob(base, own, hold_out, hyper, seed)
    wanted.spec(num_rows=10, step_tokens=512)  # what does not hold is told before any file is read
    return wanted


def check_own(own: dict[str, Any], base: str) -> JobSpec:
    """The JobSpec of these fields.

    Raises:
        InvalidRequestError: naming every field that does not hold.
    """
    task = own.get("task", "chat")
    values = {**own, "base": base, "task": task}
    values.setdefault("evaluation", {"generate": False})
    try:
        spec = validate(JobSpec, values, "luthier")
    except RecipeError as error:
        raise InvalidRequestError(error.found, param="luthier", code="invalid_job_spec") from None
    check_method(spec.method)
    return spec


def _hyperparameters(body: JobCreate, own: dict[str, Any]) -> Hyperparameters:
    """OpenAI's hyperparameters; for preferences, `own["task"]` becomes the task that they ask for.

    Method and task must agree: preferences that were trained on as conversations, or the other way, would be another
    job than was asked for.
    """
    method = body.method
    is_own_task_preference = _type_of(own.get("task")) == "preference"
    if method is None and not is_own_task_preference:
        return body.hyperparameters or Hyperparameters()
    kind = method.type if method is not None else "dpo"
    if kind == "reinforcement":
        raise MissingError(
            "Reinforcement fine-tuning is not served; use method.type supervised or dpo.",
            param="method.type",
            code="not_served",
        )
    for other in ("supervised", "dpo", "reinforcement"):
        if method is not None and other != kind and getattr(method, other) is not None:
            raise InvalidRequestError(
                f"method.type is {kind}, and method.{other} is given; leave one of them out.", param=f"method.{other}"
            )
    if (kind == "dpo") != is_own_task_preference and "task" in own:
        raise InvalidRequestError(
            f"method.type is {kind}, and luthier.task is {_type_of(own['task'])!r}; dpo goes with the task preference, "
            "supervised with every other.",
            param="luthier.task",
        )
    part = (method.dpo if kind == "dpo" else method.supervised) if method is not None else None
    given: Hyperparameters | None = part.hyperparameters if part is not None else None
    both = [each.model_dump(exclude={"beta"}) for each in (given, body.hyperparameters) if each is not None]
    if len(both) == 2 and both[0] != both[1]:
        raise InvalidRequestError(
            f"hyperparameters and method.{kind}.hyperparameters differ; give the second alone.", param="hyperparameters"
        )
    hyper = given or body.hyperparameters or Hyperparameters()
    return hyper if kind == "supervised" else _as_preference(hyper, own)


def _as_preference(hyper: Hyperparameters, own: dict[str, Any]) -> DpoHyperparameters:
    """The hyperparameters with beta, once `own["task"]` has it too."""
    task = own.get("task")
    options = dict(task) if isinstance(task, dict) else {}
    found = DpoHyperparameters.model_validate(hyper.model_dump())
    if found.beta != "auto":
        if "beta" in options:
            raise InvalidRequestError(
                "beta and luthier.task.beta say the same thing twice; give one of them.", param="beta"
            )
        options["beta"] = found.beta
    own["task"] = {"type": "preference", **options}
    return found


def _type_of(task: Any) -> str:
    """The name of a task that is named, or described."""
    return str(task.get("type", "")) if isinstance(task, dict) else str(task or "")


def _hold_out(value: Any, body: JobCreate) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not NO_VALIDATION <= value <= MAX_VALIDATION:
        raise InvalidRequestError(
            f"luthier.validation is a share of the rows to hold out, 0 to 0.5; found {str(value)[:80]!r}.",
            param="luthier.validation",
        )
    if value and body.validation_file is not None:
        raise InvalidRequestError("Give validation_file or luthier.validation, not both.", param="luthier.validation")
    return float(value)


def _choose(value: Any, automatic: Any) -> Any:
    return automatic if value == "auto" else value
