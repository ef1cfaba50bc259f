"""`luthier jobs` of a server (--server); without it the same verbs speak of the runs on this machine."""

from __future__ import annotations

import json as json_module
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from luthier.base.catalogue import DEFAULT_BASE
from luthier.cli.console import err, print_json
from luthier.cli.local_create import Wanted, is_recipe, wanted_recipe
from luthier.cli.local_runs import (
    RUN_ENDS,
    RUNS,
    described_run,
    local_events,
    local_run,
    local_runs,
    stop_run,
    tuned_folder,
)
from luthier.cli.where import refuse_here_only, server_of
from luthier.errors import RecipeError, RunError
from luthier.worker.background import resume_run, start_run

if TYPE_CHECKING:
    from luthier.client.api import Server

END_STATUSES = ("succeeded", "failed", "cancelled")
POLL_SECONDS = 1.0

jobs_app = typer.Typer(
    help="Fine-tuning jobs of a server (--server URL), or the runs on this machine.", no_args_is_help=True
)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Runs = Annotated[
    str | None,
    typer.Option("--runs", help="Without --server: the folder that holds run folders. Default: runs."),
]
Watch = Annotated[bool, typer.Option("--watch", help="Stay and show how it goes.")]


@jobs_app.command("create")
def create_job(
    context: typer.Context,
    file: Annotated[
        str,
        typer.Argument(help="A training file: its id on a server, or one to upload. Without --server also a recipe."),
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", help=f"A base, or a tuned model (without --server: a run). Default: {DEFAULT_BASE}."),
    ] = None,
    validation: Annotated[str | None, typer.Option("--validation", help="A validation file, or its id.")] = None,
    suffix: Annotated[
        str | None, typer.Option("--suffix", help="Goes into the model's name; here, the run folder's.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed")] = None,
    spec: Annotated[
        str | None, typer.Option("--spec", help='More of the job as JSON: {"task": ..., "method": ..., "train": ...}.')
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Without --server: override a field of the recipe."),
    ] = None,
    runs: Runs = None,
    watch: Watch = False,
) -> None:
    """Start a job: on a server, files are uploaded if need be; here, a run in the background."""
    own = _spec(spec)
    server = server_of(context)
    if server is None:
        wanted = Wanted(file, model, validation, suffix, seed, own, overrides or [])
        recipe = wanted_recipe(wanted, Path(runs) if runs is not None else None)
        with err().status(f"starting {recipe.output}"):
            run = start_run(recipe)
        print(run.path)
        if watch:
            _watch_run(run.path)
        return
    refuse_here_only(set=overrides, runs=runs)
    if is_recipe(file):
        raise RecipeError(
            f"{file} is a recipe, which names files of this machine",
            "a training file",
            "name its data file, and give its fields with --spec; or leave --server out",
        )
    body: dict[str, Any] = {"model": model or DEFAULT_BASE, "training_file": _file_id(server, file)}
    if own:
        body["luthier"] = own
    if validation:
        body["validation_file"] = _file_id(server, validation)
    body |= {name: value for name, value in (("suffix", suffix), ("seed", seed)) if value is not None}
    job = server.post("/fine_tuning/jobs", body)
    print(job["id"])
    if watch:
        _watch(server, job["id"])


@jobs_app.command("list")
def list_jobs(context: typer.Context, limit: int = 20, runs: Runs = None, json: AsJson = False) -> None:
    """Jobs, newest first."""
    server = server_of(context)
    if server is None:
        rows = list(local_runs(Path(runs or RUNS)))
    else:
        refuse_here_only(runs=runs)
        rows = list(server.pages("/fine_tuning/jobs", limit))
    if json:
        print_json(rows[:limit])
        return
    for row in rows[:limit]:
        print(f"{row['id']}  {row['status']}  {row.get('fine_tuned_model') or row.get('model') or ''}")


@jobs_app.command("show")
def show_job(context: typer.Context, job: str) -> None:
    """All that is known about a job."""
    server = server_of(context)
    print_json(described_run(Path(job)) if server is None else server.get(f"/fine_tuning/jobs/{job}"))


@jobs_app.command("watch")
def watch_job(context: typer.Context, job: str) -> None:
    """Show a job's progress until it ends. Exit code 2 if it fails."""
    server = server_of(context)
    if server is None:
        _watch_run(Path(job))
    else:
        _watch(server, job)


@jobs_app.command("events")
def list_events(context: typer.Context, job: str, limit: int = 50) -> None:
    """What happened to a job, oldest first."""
    server = server_of(context)
    if server is None:
        print("\n".join(local_events(Path(job), limit)))
        return
    for event in reversed(list(server.pages(f"/fine_tuning/jobs/{job}/events", limit))):
        print(f"{event['created_at']}  {event['level']:5}  {event['message']}")


@jobs_app.command("cancel")
def cancel_job(context: typer.Context, job: str) -> None:
    """End a job. A run here is saved where it stands, its process ends, and it can be resumed."""
    server = server_of(context)
    print(stop_run(Path(job)) if server is None else server.post(f"/fine_tuning/jobs/{job}/cancel")["status"])


@jobs_app.command("pause")
def pause_job(context: typer.Context, job: str) -> None:
    """Let a job rest. A run here is saved where it stands, and its process ends."""
    server = server_of(context)
    print(stop_run(Path(job)) if server is None else server.post(f"/fine_tuning/jobs/{job}/pause")["status"])


@jobs_app.command("resume")
def resume_job(context: typer.Context, job: str, watch: Watch = False) -> None:
    """Let a paused job go on; a run here in the background, from its last checkpoint."""
    server = server_of(context)
    if server is None:
        with err().status(f"starting {job}"):
            run = resume_run(Path(job))
        print(local_run(run.path)["status"])
        if watch:
            _watch_run(run.path)
        return
    print(server.post(f"/fine_tuning/jobs/{job}/resume")["status"])
    if watch:
        _watch(server, job)


def _spec(text: str | None) -> dict[str, Any]:
    try:
        value = json_module.loads(text) if text else {}
    except ValueError as error:
        raise RecipeError(f"--spec is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise RecipeError(f"--spec is {text}", 'an object, as in {"train": {"epochs": 3}}')
    return value


def _file_id(server: Server, name: str) -> str:
    return (
        name
        if name.startswith("file-") and not Path(name).exists()
        else str(server.upload(Path(name), "fine-tune")["id"])
    )


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=err())


def _watch(server: Server, job: str) -> None:
    with _bar() as bar:
        task = bar.add_task("queued", total=None)
        while True:
            found = server.get(f"/fine_tuning/jobs/{job}")
            own = found.get("luthier") or {}
            bar.update(task, description=found["status"], completed=own.get("step", 0), total=own.get("total_steps"))
            if found["status"] in END_STATUSES:
                break
            time.sleep(POLL_SECONDS)
    if found["status"] == "failed":
        raise RunError(f"{job} failed: {found['error']['message']}")
    print(found["fine_tuned_model"] or found["status"])


def _watch_run(folder: Path) -> None:
    with _bar() as bar:
        task = bar.add_task("waiting", total=None)
        while True:
            run = local_run(folder)
            loss = f", loss {run['loss']:.3f}" if isinstance(run["loss"], float) else ""
            bar.update(task, description=run["status"] + loss, completed=run["step"], total=run.get("total_steps"))
            if run["status"] in RUN_ENDS:
                break
            time.sleep(POLL_SECONDS)
    if run.get("problem") and run["status"] != "done":
        raise RunError(f"{folder} {'failed' if run['status'] == 'failed' else 'has not begun'}: {run['problem']}")
    print(tuned_folder(folder) if run["status"] == "done" else run["status"])
