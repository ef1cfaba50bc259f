"""`luthier files`: a server's files (--server), or the data files on this machine, whose ids are their paths."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.cli.console import print_json
from luthier.cli.local_runs import RUNS, files_of, local_runs
from luthier.cli.where import refuse_here_only, server_of
from luthier.data.files import file_kind, open_rows
from luthier.data.lines import LineProblem
from luthier.errors import DataError, RecipeError

NUM_SHOWN = 5

files_app = typer.Typer(
    help="Files of a server (--server URL), or the data files on this machine.", no_args_is_help=True
)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@files_app.command("upload")
def upload_file(context: typer.Context, file: Path, purpose: str = "fine-tune") -> None:
    """Upload a file, and print its id; here every row of it is read, and its path is its id."""
    server = server_of(context)
    if server is not None:
        print(server.upload(file, purpose)["id"])
        return
    if purpose != "fine-tune":
        raise RecipeError(f"files for {purpose!r} are a server's", "luthier --server URL files upload ...")
    _read_whole(file)
    print(file)


@files_app.command("list")
def list_files(
    context: typer.Context,
    folder: Annotated[
        Path | None, typer.Option("--folder", help="Without --server: where to look. Default: the current folder.")
    ] = None,
    runs: Annotated[
        str | None, typer.Option("--runs", help="Without --server: the folder that holds run folders. Default: runs.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Files, newest first; here those of a folder, and those that runs were trained on."""
    server = server_of(context)
    if server is None:
        rows = _local_files(folder or Path(), Path(runs or RUNS))
    else:
        refuse_here_only(folder=folder, runs=runs)
        rows = list(server.pages("/files"))
    if json:
        print_json(rows)
        return
    for row in rows:
        more = (row["kind"], ", ".join(row["runs"])) if server is None else (row["purpose"], row["filename"])
        print(f"{row['id']}  {row['bytes']:>12,}  {'  '.join(more)}".rstrip())


@files_app.command("get")
def get_file(
    context: typer.Context, file: str, to: Annotated[Path, typer.Option("--to", help="Where to write it.")]
) -> None:
    """Download a file."""
    server = server_of(context)
    if server is None:
        raise RecipeError(f"{file} is a file of this machine already", fix="copy it, or name its server with --server")
    to.write_bytes(server.content(f"/files/{file}/content"))
    print(to)


@files_app.command("delete")
def delete_file(context: typer.Context, file: str) -> None:
    """Delete a file."""
    server = server_of(context)
    if server is None:
        raise RecipeError(
            f"{file} is your own, and runs may still need it to be resumed",
            fix="delete it yourself, or name the file's server with --server",
        )
    server.delete(f"/files/{file}")
    print(f"{file} is deleted.")


def _read_whole(file: Path) -> None:
    """Read every row.

    Raises:
        DataError: naming the first rows that cannot be read.
    """
    problems = [row for row in open_rows(file) if isinstance(row, LineProblem)]
    if problems:
        rest = f"; and {len(problems) - NUM_SHOWN:,} more" if len(problems) > NUM_SHOWN else ""
        raise DataError(
            f"{len(problems):,} rows cannot be read: " + "; ".join(p.message for p in problems[:NUM_SHOWN]) + rest,
            fix=f"mend them; `luthier check {file}` says all that is wrong",
        )


def _local_files(folder: Path, runs: Path) -> list[dict[str, Any]]:
    """The data files of a folder and those that runs name, the one that changed last first."""
    users: dict[Path, list[str]] = {}
    named: dict[Path, Path] = {}
    for run in local_runs(runs):
        for path in map(Path, files_of(Path(run["id"]))):
            named.setdefault(path.resolve(), path)
            users.setdefault(path.resolve(), []).append(run["id"])
    if not folder.is_dir():
        raise RecipeError(f"{folder} is no folder", "one that holds data files")
    here = {path.resolve(): path for path in folder.iterdir() if _is_data(path)}
    found = {real: path for real, path in (named | here).items() if real.is_file()}
    rows = []
    for real, path in found.items():
        facts = real.stat()
        rows.append(
            {
                "id": str(path),
                "filename": path.name,
                "bytes": facts.st_size,
                "created_at": int(facts.st_mtime),
                "kind": file_kind(path)[0],
                "runs": users.get(real, []),
            }
        )
    return sorted(rows, key=lambda row: (-row["created_at"], row["id"]))


def _is_data(path: Path) -> bool:
    try:
        file_kind(path)
    except DataError:
        return False
    return path.is_file() and not path.name.startswith(".")
