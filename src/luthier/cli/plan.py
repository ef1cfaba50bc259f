"""`luthier plan RECIPE`: what a run will take in memory, before its base is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from luthier.cli.console import out, print_json, quiet_libraries
from luthier.cli.progress import choose_progress
from luthier.imports import importing
from luthier.worker.progress import gib

if TYPE_CHECKING:
    from luthier.worker.plan import RecipePlan

_NAMES = {
    "process": "Python and its libraries",
    "weights": "weights",
    "adapter": "adapter",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
}


def plan_command(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file.")],
    gpu: Annotated[
        str | None, typer.Option("--gpu", metavar="SIZE", help="Plan for a GPU of this memory, as in 24GB.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Override a field, as in --set train.batch_size=8."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON on standard output.")] = False,
) -> None:
    """Predict a run's memory on this CPU or on a GPU of a named size; reads no weights. Exit code 2 if it won't fit."""
    from luthier.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    progress = choose_progress(quiet=True)
    try:
        quiet_libraries()
        with importing():
            from luthier.worker.plan import plan_recipe

        plan = plan_recipe(loaded, gpu, progress)
    finally:
        progress.close()
    if json:
        print_json(plan.to_json())
    else:
        _print(plan)
    if plan.largest_micro_batch_tokens == 0:
        raise typer.Exit(2)


def _print(plan: RecipePlan) -> None:
    facts = plan.to_json()
    held = f"{facts['quantization'].upper()}, computed in {facts['dtype']}" if facts["quantization"] else facts["dtype"]
    table = Table(
        title=f"{facts['method']} on {facts['base']} in {held}, on {facts['device']}",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
        show_footer=True,
    )
    sizes = facts["bytes"]
    table.add_column("while training", footer="peak")
    table.add_column("bytes", justify="right", footer=f"{sizes['training']:,}")
    table.add_column("", justify="right", footer=gib(sizes["training"]))
    for name, label in _NAMES.items():
        if sizes[name] or name in ("gradients", "optimizer", "activations"):
            table.add_row(label, f"{sizes[name]:,}", gib(sizes[name]))
    console = out()
    console.print(table)
    console.print(Text("\n".join(_sentences(plan))), soft_wrap=True)


def _sentences(plan: RecipePlan) -> list[str]:
    memory, facts = plan.foresight.memory, plan.to_json()
    source = "by the data's lengths" if plan.knows_data else "the most that the recipe allows, for its data is not here"
    lines = [
        f"{facts['num_trained_parameters']:,} parameters train. "
        f"The largest micro-batch holds {memory.tokens:,} tokens, {source}."
    ]
    if plan.foresight.recomputes:
        lines.append("Activations are computed again in the backward.")
    other = {"loading the base": plan.loading, "judging": plan.judging}
    lines += [
        f"The peak is {gib(size)} while {name}." for name, size in other.items() if size == plan.peak > memory.peak
    ]
    most = plan.largest_micro_batch_tokens
    room = f"{gib(plan.capacity)} are there for it"
    if plan.fits:
        lines.append(f"It fits: {room}. The largest micro-batch that would fit holds {most:,} tokens.")
    elif most > 0:
        lines.append(f"It fits in smaller parts alone: {room}, for micro-batches of at most {most:,} tokens.")
    else:
        lines.append(f"It does not fit: {room}. Try method: qlora, a lower rank, or train.optimizer: adamw_8bit.")
    states = facts["zero"]
    if states and (states[0]["num_ranks"] > 1 or plan.recipe.compute.zero):
        each = ", ".join(f"{gib(row['total'])} at {row['stage']}" for row in states)
        lines.append(
            f"Over {states[0]['num_ranks']} processes each holds of weights, gradients and optimizer, by stage of "
            f"compute.zero: {each}. The table above is of a process without ZeRO."
        )
    return lines
