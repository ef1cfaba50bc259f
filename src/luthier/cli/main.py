"""The command `luthier`: its verbs, and what becomes of an error."""

from __future__ import annotations

import sys

import typer

from luthier import __version__
from luthier.cli.chat import chat_command
from luthier.cli.check import check_command
from luthier.cli.compare import compare_command
from luthier.cli.console import print_error
from luthier.cli.doctor import doctor_command
from luthier.cli.eval import eval_command
from luthier.cli.export import export_command
from luthier.cli.files import files_app
from luthier.cli.init import init_command
from luthier.cli.jobs import jobs_app
from luthier.cli.models import models_command
from luthier.cli.plan import plan_command
from luthier.cli.predict import predict_command
from luthier.cli.serve import serve_command, worker_command
from luthier.cli.tenants import backup_command, keys_app, restore_command, tenants_app, usage_command
from luthier.cli.train import train_command
from luthier.cli.where import Where
from luthier.errors import LuthierError
from luthier.imports import forget_objects

app = typer.Typer(
    name="luthier",
    help="Fine-tune open language models, many jobs on one frozen base.",
    no_args_is_help=True,
    add_completion=False,
    # An unexpected error keeps its plain traceback: it is what a bug report needs.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"luthier {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    server: str | None = typer.Option(
        None, "--server", metavar="URL", envvar="LUTHIER_SERVER", help="A server that the service's verbs ask."
    ),
    key: str | None = typer.Option(
        None, "--key", help="The server's API key. Default: $LUTHIER_API_KEY.", show_default=False
    ),
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
    ),
    # DeepSpeed's launcher puts it before a program's own arguments, and says the same in LOCAL_RANK, which is read.
    local_rank: int | None = typer.Option(None, "--local_rank", hidden=True),
) -> None:
    """Fine-tune open language models, many jobs on one frozen base."""
    context.obj = Where(server, key)


app.command("init")(init_command)
app.command("check")(check_command)
app.command("plan")(plan_command)
app.command("train")(train_command)
app.command("compare")(compare_command)
app.command("eval")(eval_command)
app.command("predict")(predict_command)
app.command("chat")(chat_command)
app.command("export")(export_command)
app.command("models")(models_command)
app.command("doctor")(doctor_command)
app.command("serve")(serve_command)
app.command("worker")(worker_command)
app.add_typer(jobs_app, name="jobs")
app.add_typer(files_app, name="files")
app.add_typer(tenants_app, name="tenants")
app.add_typer(keys_app, name="keys")
app.command("usage")(usage_command)
app.command("backup")(backup_command)
app.command("restore")(restore_command)


def main() -> None:
    """Run the command line. Exit codes: 0 done, 2 an error that the user can mend, 130 interrupted, 1 a defect."""
    try:
        app()
    except LuthierError as error:
        print_error(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        forget_objects()


if __name__ == "__main__":
    main()
