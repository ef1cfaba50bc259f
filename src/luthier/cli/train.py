"""`luthier train RECIPE...`: tune, judge, and say where the result is."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from luthier.cli.console import command_name, err, out, print_json, print_scores, quiet_libraries
from luthier.cli.progress import choose_progress
from luthier.errors import StorageError
from luthier.imports import importing

if TYPE_CHECKING:
    from luthier.worker.result import RunResult


def train_command(
    recipes: Annotated[
        list[str], typer.Argument(metavar="RECIPE...", help="Recipe files. Those with the same base train together.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="FIELD=VALUE", help="Override a field of every recipe, as in --set train.epochs=3."
        ),
    ] = None,
    devices: Annotated[
        str | None,
        typer.Option("--devices", metavar="N", help="Processes that train together, a device each; or auto."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the run folder.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show warnings and the result alone.")] = False,
) -> None:
    """Tune a base on the recipe's data, and judge base and tuned model on held-out rows."""
    from luthier.recipe import load_recipe
    from luthier.worker.launch.place import BY_ITSELF, place_of_process

    overrides = [*(overrides or []), *([f"compute.devices={devices}"] if devices is not None else [])]
    speaks = (place_of_process() or BY_ITSELF).is_first  # of several processes the first alone
    loaded = [load_recipe(name, overrides) for name in recipes]
    progress = choose_progress(quiet=quiet or not speaks)
    progress.stage("Starting")
    try:
        quiet_libraries()
        with importing():
            from luthier.worker.train import train

        results = train(loaded, resume=resume, progress=progress)
    except StorageError as error:
        progress.close()
        raise StorageError(
            error.found, error.expected, f"{error.fix}\n  go on:    {_resume_command(recipes, overrides)}"
        ) from error
    except KeyboardInterrupt:
        progress.close()
        if speaks:
            err().print(Text(f"Stopped. Go on with: {_resume_command(recipes, overrides)}"), soft_wrap=True)
        raise typer.Exit(130) from None
    finally:
        progress.close()
    if not speaks:
        raise typer.Exit(2 if any(result.status == "failed" for result in results) else 0)
    if json:
        print_json([result.to_json() for result in results] if len(results) > 1 else results[0].to_json())
    else:
        for result in results:
            _print_result(result)
    failed = [result.folder for result in results if result.status == "failed"]
    if failed:
        err().print(Text(f"{', '.join(map(str, failed))} failed; the reason stands above."), soft_wrap=True)
        raise typer.Exit(2)


def _resume_command(recipes: list[str], overrides: list[str]) -> str:
    settings = [part for override in overrides for part in ("--set", override)]
    return shlex.join([command_name(), "train", *recipes, *settings, "--resume"])


def _print_result(result: RunResult) -> None:
    console = out()
    print_scores(result.evaluation, console)
    run = shlex.quote(str(result.folder))
    lines = [
        f"{'Adapter' if result.has_adapter else 'Model  '}  {result.tuned}",
        f"Report   {result.folder / 'report.html'}",
        f"Chat     {command_name()} chat {run}",
    ]
    console.print(Text("\n".join(lines)), soft_wrap=True)
