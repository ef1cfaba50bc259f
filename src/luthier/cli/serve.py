"""`luthier serve` and `luthier worker`: the service's processes."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from luthier.errors import RecipeError
from luthier.imports import importing

if TYPE_CHECKING:
    from luthier.service.context import Context

Data = Annotated[
    str | None, typer.Option("--data", help="The data folder. Default: $LUTHIER_DATA, else ./luthier-data.")
]
Bases = Annotated[
    list[str] | None,
    typer.Option("--base", metavar="NAME[=SOURCE]", help="A base to serve; may be repeated. Default: the catalogue."),
]
IDLE_SECONDS = 600.0


def serve_command(
    host: Annotated[str, typer.Option("--host", help="Where the API listens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Its port; 0 takes a free one.")] = 8000,
    data: Data = None,
    bases: Bases = None,
    workers: Annotated[
        bool, typer.Option("--workers/--no-workers", help="Also run workers on this machine, as bases are asked for.")
    ] = True,
) -> None:
    """Run the service on this machine: API, store and workers, with nothing to configure."""
    import socket

    import uvicorn

    from luthier.service.app import create_app

    _log_json()
    context = open_context(data, bases)
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise RecipeError(
            f"{host}:{port} cannot be listened on: {error.strerror}", fix="choose another --port"
        ) from None
    listener.listen(128)  # now, so that who reads the address can connect
    address = f"http://{host}:{listener.getsockname()[1]}"
    _say_hello(context, address)
    server = uvicorn.Server(
        uvicorn.Config(create_app(context), log_config=None, access_log=False, timeout_graceful_shutdown=10)
    )
    # uvicorn takes these signals while it runs and raises them again at its end, which must not cut ours short.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    stop = _start_supervisor(context) if workers else (lambda: None)
    try:
        server.run(sockets=[listener])
    finally:
        stop()
        context.database.close()


def worker_command(
    data: Data = None,
    bases: Bases = None,
    host: Annotated[str, typer.Option("--host", help="Where the worker's own endpoint listens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Its port; 0 takes a free one.")] = 0,
    address: Annotated[
        str | None, typer.Option("--address", help="The URL by which API processes reach it, where that is another.")
    ] = None,
    max_jobs: Annotated[int, typer.Option("--max-jobs", help="Most jobs that train together.")] = 16,
    max_adapters: Annotated[int, typer.Option("--max-adapters", help="Most adapters that serve from memory.")] = 64,
    threads: Annotated[int | None, typer.Option("--threads", help="CPU threads; default: all cores.")] = None,
    idle_seconds: Annotated[
        float, typer.Option("--idle", help="End after so long without work; 0 never.")
    ] = IDLE_SECONDS,
    quantization: Annotated[
        str, typer.Option("--quantization", help="How the base is held: nf4, or nothing for the base as it is.")
    ] = "",
    weights: Annotated[
        str,
        typer.Option("--weights", help="Key prefix of a tuned model that is held in place of its base."),
    ] = "",
    place: Annotated[str | None, typer.Option("--place", hidden=True, help="The supervisor that started it.")] = None,
    need: Annotated[int, typer.Option("--need", metavar="BYTES", help="Memory that must be free beyond the base.")] = 0,
    lasting: Annotated[bool, typer.Option("--supervise", help="Start workers for whatever base is asked for.")] = False,
) -> None:
    """Run a worker of one base (--base NAME), or start workers as bases are asked for (--supervise)."""
    _log_json()
    context = open_context(data, bases)
    if lasting:
        is_over = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: is_over.set())
        stop = _start_supervisor(context)
        is_over.wait()
        stop()
        return
    if not bases or len(bases) != 1:
        raise RecipeError("a worker holds one base", "--base NAME, once", "or --supervise, to start one a base")
    if quantization not in ("", "nf4"):
        raise RecipeError(f"--quantization {quantization}", "nf4, or nothing")
    from luthier.registry.work import StoredWork
    from luthier.worker.served_bases import ServedBases
    from luthier.worker.worker_options import WorkerOptions

    with importing():
        from luthier.worker.service_worker import run_worker

    settings = context.settings
    _sweep(settings.scratch)
    name = next(iter(settings.bases))
    options = WorkerOptions(
        base=name,
        source=ServedBases(settings.bases).source(name),
        scratch=settings.scratch / f"worker-{os.getpid()}",
        quantization=quantization,
        weights=weights,
        step_tokens=settings.step_tokens,
        max_jobs=max_jobs,
        max_slots=max_adapters,
        lease_seconds=settings.lease_seconds,
        idle_seconds=idle_seconds or None,
        host=host,
        port=port,
        address=address,
        threads=threads,
        place=place,
        need_bytes=need,
    )
    run_worker(StoredWork(context.database, context.blobs), context.blobs, options)


def open_context(data: str | None, bases: list[str] | None) -> Context:
    """The store that the environment and the options name, opened."""
    try:
        from luthier.service.context import Context
        from luthier.service.settings import read_service_settings
        from luthier.store.blobs import Blobs
        from luthier.store.database import open_database
    except ModuleNotFoundError as error:
        raise RecipeError(f"{error.name} is not installed", fix="pip install 'luthier[service]'") from None
    from luthier.worker.served_bases import ServedBases

    settings = read_service_settings(data, bases)
    database = open_database(settings.database_url)
    blobs = Blobs(settings.storage, dict(settings.storage_options))
    return Context(settings, database, blobs, ServedBases(settings.bases))


def _say_hello(context: Context, address: str) -> None:
    """Print the address, and on the first start a tenant's first key."""
    lines = [f"Luthier serves {address}/v1"]
    if not context.tenants.all():
        context.tenants.create("default")
        _, key = context.tenants.create_key("default", ["admin", "tune", "infer"], "first")
        lines += [f"First key (tenant default, all scopes; shown this once): {key}"]
    print("\n".join(lines), flush=True)


def _start_supervisor(context: Context) -> Callable[[], None]:
    """Start workers as they are wanted; the answer ends them."""
    from luthier.registry.work import StoredWork
    from luthier.worker.served_bases import ServedBases
    from luthier.worker.supervisor import Supervisor

    served = ServedBases(context.settings.bases)
    sources = {base.name: served.source(base.name) for base in served.all()}
    arguments = ["--data", str(context.settings.data_folder)]
    supervisor = Supervisor(StoredWork(context.database, context.blobs), sources, arguments)
    thread = threading.Thread(target=supervisor.run, name="supervisor")
    thread.start()

    def stop() -> None:
        supervisor.stop()
        thread.join()

    return stop


def _sweep(scratch: Path) -> None:
    """Remove what workers that were killed left in the scratch folder."""
    import shutil

    import psutil

    for folder in scratch.glob("worker-*"):
        pid = folder.name.removeprefix("worker-")
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _log_json() -> None:
    from luthier.service.wire import JsonLines

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in (("luthier", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
