"""`luthier jobs` and `luthier files` of a server (--server); without it `jobs` speaks of the runs on this machine."""

from __future__ import annotations

import json as json_module
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from luthier.cli.console import err, print_json
from luthier.cli.local_runs import RUN_ENDS, local_events, local_run, local_runs, stop_run
from luthier.cli.train import train_command
from luthier.errors import RecipeError, RunError

if TYPE_CHECKING:
    from luthier.client.api import Server

END_STATUSES = ("succeeded", "failed", "cancelled")
POLL_SECONDS = 1.0

jobs_app = typer.Typer(
    help="Fine-tuning jobs of a server (--server URL), or the runs on this machine.", no_args_is_help=True
)
files_app = typer.Typer(help="Files of a server (--server URL).", no_args_is_help=True)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Runs = Annotated[str, typer.Option("--runs", help="Without --server: the folder that holds run folders.")]


@dataclass(frozen=True)
class Where:
    """What the root options say about the server; url None means this machine."""

    url: str | None = None
    key: str | None = None


def server_of(context: typer.Context | None) -> Server | None:
    """The server that --server names; None without it, and for callers from Python, who have no context."""
    where = (context.find_object(Where) if context is not None else None) or Where()
    if where.url is None:
        return None
    key = where.key or os.environ.get("LUTHIER_API_KEY")
    if not key:
        raise RecipeError("no API key is given", "--key, or LUTHIER_API_KEY in the environment")
    try:
        from luthier.client.api import Server
    except ModuleNotFoundError as error:
        raise RecipeError(f"{error.name} is not installed", fix="pip install 'luthier[service]'") from None
    return Server(where.url, key)


def need_server(context: typer.Context) -> Server:
    server = server_of(context)
    if server is None:
        raise RecipeError(
            "this verb speaks of a server", "luthier --server URL ...", "or tune here with `luthier train`"
        )
    return server


@jobs_app.command("create")
def create_job(
    context: typer.Context,
    file: Annotated[str, typer.Argument(help="A training file to upload, or the id of one that is uploaded.")],
    model: Annotated[
        str, typer.Option("--model", help="A base of the server, or a tuned model.")
    ] = "smollm2-135m-instruct",
    validation: Annotated[str | None, typer.Option("--validation", help="A validation file, or its id.")] = None,
    suffix: Annotated[str | None, typer.Option("--suffix", help="Goes into the model's name.")] = None,
    seed: Annotated[int | None, typer.Option("--seed")] = None,
    spec: Annotated[
        str | None, typer.Option("--spec", help='More of the job as JSON: {"task": ..., "method": ..., "train": ...}.')
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Stay and show how it goes.")] = False,
) -> None:
    """Upload what is needed, and start a job."""
    server = need_server(context)
    try:
        own = json_module.loads(spec) if spec else {}
    except ValueError as error:
        raise RecipeError(f"--spec is not valid JSON: {error}") from None
    body = {"model": model, "training_file": _file_id(server, file), "luthier": own}
    if validation:
        body["validation_file"] = _file_id(server, validation)
    body |= {name: value for name, value in (("suffix", suffix), ("seed", seed)) if value is not None}
    job = server.post("/fine_tuning/jobs", body)
    print(job["id"])
    if watch:
        _watch(server, job["id"])


@jobs_app.command("list")
def list_jobs(context: typer.Context, limit: int = 20, runs: Runs = "runs", json: AsJson = False) -> None:
    """Jobs, newest first."""
    server = server_of(context)
    rows = list(local_runs(Path(runs)) if server is None else server.pages("/fine_tuning/jobs", limit))
    if json:
        print_json(rows)
        return
    for row in rows[:limit]:
        print(f"{row['id']}  {row['status']}  {row.get('fine_tuned_model') or row.get('model') or ''}")


@jobs_app.command("show")
def show_job(context: typer.Context, job: str) -> None:
    """All that is known about a job."""
    server = server_of(context)
    print_json(local_run(Path(job)) if server is None else server.get(f"/fine_tuning/jobs/{job}"))


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
    """End a job. A run here is saved where it stands, and its process ends."""
    server = server_of(context)
    print(stop_run(Path(job)) if server is None else server.post(f"/fine_tuning/jobs/{job}/cancel")["status"])


@jobs_app.command("pause")
def pause_job(context: typer.Context, job: str) -> None:
    """Let a job rest. A run here is saved where it stands, and its process ends."""
    server = server_of(context)
    print(stop_run(Path(job)) if server is None else server.post(f"/fine_tuning/jobs/{job}/pause")["status"])


@jobs_app.command("resume")
def resume_job(context: typer.Context, job: str) -> None:
    """Let a paused job go on; a run here in this terminal, as `luthier train --resume` does."""
    server = server_of(context)
    if server is None:
        local_run(Path(job))
        train_command([str(Path(job) / "recipe.yaml")], resume=True)
    else:
        print(server.post(f"/fine_tuning/jobs/{job}/resume")["status"])


@files_app.command("upload")
def upload_file(context: typer.Context, file: Path, purpose: str = "fine-tune") -> None:
    """Upload a file; prints its id."""
    print(need_server(context).upload(file, purpose)["id"])


@files_app.command("list")
def list_files(context: typer.Context, json: AsJson = False) -> None:
    """Files, newest first."""
    rows = list(need_server(context).pages("/files"))
    if json:
        print_json(rows)
        return
    for row in rows:
        print(f"{row['id']}  {row['bytes']:>12,}  {row['purpose']}  {row['filename']}")


@files_app.command("get")
def get_file(
    context: typer.Context, file: str, to: Annotated[Path, typer.Option("--to", help="Where to write it.")]
) -> None:
    """Download a file."""
    to.write_bytes(need_server(context).content(f"/files/{file}/content"))
    print(to)


@files_app.command("delete")
def delete_file(context: typer.Context, file: str) -> None:
    """Delete a file."""
    need_server(context).delete(f"/files/{file}")
    print(f"{file} is deleted.")


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
            bar.update(task, description=run["status"], completed=run["step"])
            if run["status"] in RUN_ENDS:
                break
            time.sleep(POLL_SECONDS)
    if run["status"] == "failed":
        raise RunError(f"{folder} failed: {run.get('problem')}")
    print(folder / "adapter" if run["status"] == "done" else run["status"])
