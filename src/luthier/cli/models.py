"""`luthier models`: the catalogue, which of it lies on this machine, and what was tuned here; or a server's models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from luthier.base.catalogue import CATALOGUE, DEFAULT_BASE, CatalogueEntry
from luthier.base.fetch import cached_folder, resolve
from luthier.base.identity import base_revision
from luthier.cli.console import err, out, print_json
from luthier.cli.local_runs import RUNS, local_runs
from luthier.cli.where import refuse_here_only, server_of

WIDTH_WITH_REMARKS = 140


def models_command(
    fetch: Annotated[
        str | None, typer.Option("--fetch", metavar="NAME", help="Fetch this base now: a catalogue name or a Hub id.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON on standard output.")] = False,
    runs: Annotated[
        str | None, typer.Option("--runs", help="The folder that holds run folders. Default: runs.")
    ] = None,
    context: typer.Context = None,  # type: ignore[assignment]
) -> None:
    """List the bases known by name and what was tuned here, or with --server a server's models."""
    server = server_of(context)
    if server is not None:
        refuse_here_only(fetch=fetch, runs=runs)
        _print_served(server.get("/models")["data"], json)
    elif fetch is not None:
        _fetch(fetch, json)
    elif json:
        print_json([*(describe_entry(entry) for entry in CATALOGUE), *_tuned_here(Path(runs or RUNS))])
    else:
        _print_table()
        _print_tuned(_tuned_here(Path(runs or RUNS)))


def _print_served(models: list[dict[str, Any]], json: bool) -> None:
    if json:
        print_json(models)
        return
    for model in models:
        print(f"{model['id']}  {model['owned_by']}")


def _tuned_here(runs: Path) -> list[dict[str, Any]]:
    """The models of runs that are done: their folders, and the bases that they were tuned over."""
    done = [run for run in local_runs(runs) if run["fine_tuned_model"] is not None]
    return [
        {
            "name": run["id"],
            "base": run["model"],
            "folder": run["fine_tuned_model"],
            "size_bytes": folder_bytes(Path(run["fine_tuned_model"])),
        }
        for run in done
    ]


def _print_tuned(models: list[dict[str, Any]]) -> None:
    if models:
        lines = [f"  {model['name']}  {model['base']}  {model['folder']}" for model in models]
        out().print(Text("\n".join(["", "Tuned here (run, base, model):", *lines])), soft_wrap=True)


def describe_entry(entry: CatalogueEntry) -> dict[str, Any]:
    """A catalogue entry with what is cached of it, as plain values."""
    folder = cached_folder(entry.name)
    return {
        "name": entry.name,
        "hub_id": entry.hub_id,
        "licence": entry.licence,
        "gated": entry.gated,
        "num_parameters": entry.num_parameters,
        "context_tokens": entry.context_tokens,
        "chat": entry.chat,
        "description": entry.description,
        "without_hub": entry.wheel is not None,
        "folder": str(folder) if folder else None,
        "size_bytes": folder_bytes(folder) if folder else None,
        "revision": base_revision(folder) if folder else None,
    }


def folder_bytes(folder: Path) -> int:
    """Size of the files right in a folder, links followed."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def _fetch(name: str, json: bool) -> None:
    folder = resolve(name, lambda stage: err().print(Text(stage)))
    if json:
        values = {"base": name, "folder": str(folder), "size_bytes": folder_bytes(folder)}
        print_json(values | {"revision": base_revision(folder)})
    else:
        out().print(Text(f"{name} lies in {folder} ({folder_bytes(folder) / 1e6:.0f} MB)"), soft_wrap=True)


def _print_table() -> None:
    console = out()
    headings = ["name", "size", "context", "licence", "cached"]
    if console.width >= WIDTH_WITH_REMARKS:
        headings.append("remarks")
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="right" if heading in ("size", "context", "cached") else "left", no_wrap=True)
    for entry in CATALOGUE:
        style = "bold" if entry.name == DEFAULT_BASE else ""
        table.add_row(*(Text(cell, style=style) for cell in _cells(entry)[: len(headings)]))
    console.print(table)
    console.print(
        "A recipe's `base` is one of these names, any Hub id, or a folder; `luthier models --fetch NAME` fetches one.\n"
        "* gated: accept the licence on the Hub, then log in with `hf auth login`.",
        soft_wrap=True,
    )


def _cells(entry: CatalogueEntry) -> tuple[str, ...]:
    size_bytes = describe_entry(entry)["size_bytes"]
    return (
        entry.name,
        _short_number(entry.num_parameters),
        f"{entry.context_tokens // 1024}k",
        entry.licence + ("*" if entry.gated else ""),
        f"{size_bytes / 1e6:.0f} MB" if size_bytes is not None else "-",
        entry.description,
    )


def _short_number(count: int) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.0f}M"
