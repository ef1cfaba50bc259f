"""Methods in the service: over NF4 with a worker that holds it, and exclusive ones in processes beside the base."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import psutil
import pytest
from processes import children_running
from running import BASE, Service, chat_rows, make_context, pair_rows, serving, wait_for, wait_until, working
from safetensors.torch import load as load_tensors

from luthier.base.load import load_base
from luthier.checkpoints.peft_format import slot_from_adapter
from luthier.data.template import Renderer
from luthier.engine.sample import Request, Sampler, SamplingParams
from luthier.registry.work import StoredWork
from luthier.store.held_base import HeldBase
from luthier.store.tables import Model

QUICK: dict[str, Any] = {"train": {"epochs": 2.0, "batch_size": 4}, "validation": 0.2}
LONG: dict[str, Any] = {"train": {"epochs": 40.0, "batch_size": 4, "checkpoint_every": 5}, "validation": 0.2}
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "red lamp"}], "max_tokens": 4, "temperature": 0}


@pytest.fixture
def service(tiny_llama: Path, tmp_path: Path, service_database: Callable[[], str]) -> Iterator[Service]:
    context = make_context(tmp_path / "data", tiny_llama, service_database())
    with serving(context) as running:
        running.tenant("acme")
        yield running


def client_of(service: Service) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key=service.keys["acme"], max_retries=0)


def tune(client: openai.OpenAI, method: Any, own: dict[str, Any] = QUICK, model: str = BASE, **values: Any) -> Any:
    file = client.files.create(file=("t.jsonl", chat_rows(40)), purpose="fine-tune")
    luthier = own if method is None else own | {"method": method}
    return client.fine_tuning.jobs.create(
        model=model, training_file=file.id, seed=3, extra_body={"luthier": luthier}, **values
    )


def model_of(service: Service, name: str) -> Model:
    with service.context.database.reading() as session:
        return session.query(Model).where(Model.id == name).one()


def step_of(client: openai.OpenAI, job: str) -> int:
    return int(client.fine_tuning.jobs.retrieve(job).to_dict()["luthier"]["step"])  # type: ignore[index, call-overload]


def wait_for_step(client: openai.OpenAI, job: str, step: int) -> None:
    deadline = time.monotonic() + 120
    while step_of(client, job) < step:
        assert time.monotonic() < deadline, client.fine_tuning.jobs.retrieve(job)
        time.sleep(0.05)


def children() -> list[psutil.Process]:
    return children_running("luthier.worker.service_child")


def check_record(client: openai.OpenAI, job: str) -> None:
    """Every step has one event, and the last checkpoint is listed."""
    events = list(client.fine_tuning.jobs.list_events(job, limit=100))
    steps = [event.data["step"] for event in events if event.type == "metrics"]  # type: ignore[index]
    assert steps == list(range(len(steps), 0, -1))
    assert client.fine_tuning.jobs.checkpoints.list(job).data[0].step_number == steps[0]


def test_jobs_over_nf4_train_and_answer_where_it_is_held(service: Service, tiny_llama: Path, tmp_path: Path) -> None:
    client = client_of(service)
    jobs = [
        tune(client, {"type": "qlora", "rank": 2}),
        tune(client, {"type": "dora", "rank": 2, "quantization": "nf4"}),
        tune(client, {"type": "ia3", "quantization": "nf4"}),
    ]
    plain = tune(client, {"type": "lora", "rank": 2})
    work = StoredWork(service.context.database, service.context.blobs)
    assert [wanted.base for wanted in work.wanted_bases()] == [HeldBase(BASE, "nf4"), HeldBase(BASE)]
    with working(service.context, tmp_path / "nf4", quantization="nf4"):
        done = [wait_for(job.id, client) for job in jobs]
        assert [job.status for job in done] == ["succeeded"] * 3, [job.error for job in done]
        assert client.fine_tuning.jobs.retrieve(plain.id).status == "queued", "no worker holds the base as it is"
        name = str(done[0].fine_tuned_model)
        answer = client.chat.completions.create(model=name, logprobs=True, **ASK)
        again = wait_for(tune(client, None, model=name).id, client)
        assert again.status == "succeeded", "the method of the model to go on from is taken where none is named"
        assert again.to_dict()["luthier"]["spec"]["method"]["type"] == "qlora"
    row = model_of(service, name)
    assert (row.quantization, row.form) == ("nf4", "adapter")
    assert client.models.retrieve(name).to_dict()["luthier"]["quantization"] == "nf4"  # type: ignore[index, call-overload]
    assert answer.choices[0].logprobs is not None
    theirs = [entry.logprob for entry in answer.choices[0].logprobs.content or []]
    assert theirs == pytest.approx(logprobs_over(service, row, tiny_llama, "nf4", tmp_path)[: len(theirs)], abs=1e-4)
    with pytest.raises(openai.BadRequestError, match="tuned over the base NF4"):
        tune(client, {"type": "lora", "rank": 2}, model=name)


def logprobs_over(service: Service, row: Model, folder: Path, quantization: str, scratch: Path) -> list[float]:
    """What the adapter says to the same prompt on a base that is loaded here."""
    service.context.blobs.get_folder(row.blob, scratch / "adapter")
    base, renderer = load_base(folder, quantization=quantization), Renderer.load(folder)
    slot = slot_from_adapter(base, scratch / "adapter")
    sampler = Sampler(base, renderer.decode)
    tokens = np.array(renderer.chat_prompt(ASK["messages"]), dtype=np.int32)
    params = SamplingParams(max_new_tokens=4, temperature=0.0, num_logprobs=0, stop_ids=tuple(renderer.stop_ids))
    sampler.submit(Request("a", tokens, slot.index, params))
    found = []
    while sampler.has_work:
        found += [event.logprob.logprob for event in sampler.step() if event.logprob is not None]
    return found


def test_a_full_job_trains_beside_the_base_and_its_model_is_a_base_itself(service: Service, tmp_path: Path) -> None:
    client = client_of(service)
    with working(service.context, tmp_path / "worker"):
        full, lora = tune(client, "full"), tune(client, {"type": "lora", "rank": 2})
        assert wait_for(lora.id, client).status == "succeeded"
        done = wait_for(full.id, client, seconds=120)
        assert done.status == "succeeded", done.error
        check_record(client, full.id)
        evaluation = done.to_dict()["luthier"]["evaluation"]
        assert evaluation["tuned"]["loss"]["value"] < evaluation["base"]["loss"]["value"]
        checkpoint = client.fine_tuning.jobs.checkpoints.list(full.id).data[0]
        with pytest.raises(openai.BadRequestError, match="the finished model"):
            client.chat.completions.create(model=checkpoint.fine_tuned_model_checkpoint, **ASK)
        base_says = client.chat.completions.create(model=BASE, logprobs=True, **ASK)
    name = str(done.fine_tuned_model)
    row = model_of(service, name)
    assert row.form == "model"
    held = HeldBase(BASE, weights=row.blob)
    further = tune(client, {"type": "lora", "rank": 2}, model=name)
    work = StoredWork(service.context.database, service.context.blobs)
    assert held in [wanted.base for wanted in work.wanted_bases()]
    with working(service.context, tmp_path / "own", weights=row.blob):
        full_says = client.chat.completions.create(model=name, logprobs=True, **ASK)
        assert full_says.choices[0].logprobs != base_says.choices[0].logprobs
        above = wait_for(further.id, client)
        assert above.status == "succeeded", above.error
        assert client.chat.completions.create(model=str(above.fine_tuned_model), **ASK).choices
    with pytest.raises(openai.BadRequestError, match="was tuned over its weights"):
        client.models.delete(name)
    with pytest.raises(openai.BadRequestError, match="weights of its own"):
        tune(client, {"type": "lokr", "rank": 2}, model=name)
    client.models.delete(str(above.fine_tuned_model))
    assert client.models.delete(name).deleted


@pytest.mark.parametrize(
    "method",
    [{"type": "lokr", "rank": 4, "targets": ["q_proj", "v_proj"]}, {"type": "prompt", "virtual_tokens": 4}],
    ids=lambda method: method["type"],
)
def test_layers_of_pefts_answer_from_a_worker_of_their_own(
    method: dict[str, Any], service: Service, tmp_path: Path
) -> None:
    client = client_of(service)
    with working(service.context, tmp_path / "worker"):
        done = wait_for(tune(client, method).id, client, seconds=120)
        assert done.status == "succeeded", done.error
        base_says = client.chat.completions.create(model=BASE, logprobs=True, **ASK)
    name = str(done.fine_tuned_model)
    row = model_of(service, name)
    assert row.form == "layers"
    with working(service.context, tmp_path / "own", weights=row.blob):
        says = client.chat.completions.create(model=name, logprobs=True, **ASK)
        assert says.choices[0].logprobs != base_says.choices[0].logprobs
    with pytest.raises(openai.BadRequestError, match="layers of peft's"):
        tune(client, {"type": "lora", "rank": 2}, model=name)


def test_preferences_are_learnt_by_a_method_that_owns_its_base(service: Service, tmp_path: Path) -> None:
    client = client_of(service)
    with working(service.context, tmp_path / "worker"):
        file = client.files.create(file=("p.jsonl", pair_rows(20)), purpose="fine-tune")
        dpo: Any = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": 2, "batch_size": 4}}}
        job = client.fine_tuning.jobs.create(
            model=BASE,
            training_file=file.id,
            method=dpo,
            seed=3,
            extra_body={"luthier": {"method": "full", "validation": 0.2, "train": {"learning_rate": 5e-3}}},
        )
        done = wait_for(job.id, client, seconds=120)
        assert done.status == "succeeded", done.error
        assert done.method is not None
        assert done.method.type == "dpo"
        check_record(client, job.id)
        steps = [e.data for e in client.fine_tuning.jobs.list_events(job.id, limit=100) if e.type == "metrics"]
        first, last = steps[-1], steps[0]
        assert first["train_loss"] == pytest.approx(math.log(2), abs=1e-4)  # type: ignore[index]
        assert last["train_loss"] < first["train_loss"]  # type: ignore[index]
        assert 0 <= last["valid_mean_token_accuracy"] <= 1  # type: ignore[index]
    name = str(done.fine_tuned_model)
    with working(service.context, tmp_path / "own", weights=model_of(service, name).blob):
        assert client.chat.completions.create(model=name, **ASK).choices


def test_a_classifier_with_weights_of_its_own_predicts(service: Service, tmp_path: Path) -> None:
    client = client_of(service)
    rows = "".join(f'{{"text": "{word} {n}", "label": "{word}"}}\n' for word in ("red", "blue") for n in range(10))
    file = client.files.create(file=("c.jsonl", rows.encode()), purpose="fine-tune")
    with working(service.context, tmp_path / "worker"):
        own = {"task": "classification", "method": "full", "train": {"epochs": 2.0, "batch_size": 4}}
        job = client.fine_tuning.jobs.create(model=BASE, training_file=file.id, extra_body={"luthier": own})
        done = wait_for(job.id, client, seconds=120)
        assert done.status == "succeeded", done.error
    name = str(done.fine_tuned_model)
    with working(service.context, tmp_path / "own", weights=model_of(service, name).blob):
        body = {"model": name, "input": ["red 3", "blue 4"]}
        answer: Any = client.post("/luthier/predict", cast_to=object, body=body)
        assert [set(row["probabilities"]) for row in answer["data"]] == [{"red", "blue"}] * 2


def test_an_exclusive_job_pauses_resumes_and_is_cancelled(service: Service, tmp_path: Path) -> None:
    client = client_of(service)
    with working(service.context, tmp_path / "worker"):
        job = tune(client, "full", {**LONG, "train": {**LONG["train"], "epochs": 2000.0}})
        wait_for_step(client, job.id, 3)
        client.fine_tuning.jobs.pause(job.id)
        wait_until(lambda: not children())  # a paused job's process ends
        assert client.fine_tuning.jobs.retrieve(job.id).status == "paused"
        step = step_of(client, job.id)
        client.fine_tuning.jobs.resume(job.id)
        wait_for_step(client, job.id, step + 2)
        client.fine_tuning.jobs.cancel(job.id)
        wait_until(lambda: not children())  # and a cancelled one's
    steps = [e.data["step"] for e in client.fine_tuning.jobs.list_events(job.id, limit=100) if e.type == "metrics"]  # type: ignore[index]
    assert len(steps) == len(set(steps))


@pytest.mark.timeout(900)
def test_an_exclusive_job_survives_its_process_and_its_worker(service: Service, tmp_path: Path) -> None:
    """Killed once, moved to another worker once: the bytes are those of a job that nobody disturbed."""
    client = client_of(service)
    own = {**LONG, "train": {**LONG["train"], "epochs": 16.0}}  # long enough to be killed and moved in
    with working(service.context, tmp_path / "one"):
        job = tune(client, "full", own)
        wait_for_step(client, job.id, 6)
        os.kill(children()[0].pid, signal.SIGKILL)
        step = step_of(client, job.id)
        wait_for_step(client, job.id, step + 3)
    assert client.fine_tuning.jobs.retrieve(job.id).status == "queued", "it was over before it could be moved"
    with working(service.context, tmp_path / "two"):
        done = wait_for(job.id, client, seconds=150)
        assert done.status == "succeeded", done.error
        check_record(client, job.id)
        calm = wait_for(tune(client, "full", own).id, client, seconds=150)
    blobs = service.context.blobs
    models = [model_of(service, str(job.fine_tuned_model)) for job in (done, calm)]
    weights = [load_tensors(b"".join(blobs.pieces(f"{model.blob}/model.safetensors"))) for model in models]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert tensor.equal(weights[1][name]), name
    scores = [job.to_dict()["luthier"]["evaluation"]["base"] for job in (done, calm)]
    assert scores[0] == scores[1], "what the base did is not asked of trained weights"


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ({"type": "adalora", "config": {"megatron_core": "os"}}, "megatron_core is not served"),
        ({"type": "adalora", "config": {"corda_config": {"cache_file": "/tmp/x"}}}, "corda_config is not served"),
        ({"type": "prompt", "config": {"tokenizer_kwargs": {"trust_remote_code": True}}}, "tokenizer_kwargs"),
        ({"type": "peft", "name": "hra", "config": {"target_modules": "(a+)+$"}}, "target_modules"),
    ],
    ids=str,
)
def test_fields_that_reach_beyond_the_job_are_refused(method: dict[str, Any], says: str, service: Service) -> None:
    with pytest.raises(openai.BadRequestError, match=says):
        tune(client_of(service), method)


def test_what_only_the_base_shows_fails_the_job_with_the_reason(service: Service, tmp_path: Path) -> None:
    client = client_of(service)
    with working(service.context, tmp_path / "worker"):
        done = wait_for(tune(client, "bias").id, client)
        assert done.status == "failed"
        assert done.error is not None
        assert "has none" in str(done.error.message)
