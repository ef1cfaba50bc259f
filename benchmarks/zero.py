"""What each rank holds under ZeRO, beside the paper's formula, and the loss curve of each stage beside one process.

    python benchmarks/zero.py --data DIR [--set banking77] [--base NAME] [--methods full lora] [--out docs/benchmarks]
    python benchmarks/zero.py --data DIR --overhead [--methods lora] [--repeats 3]

Two processes of one thread each train a few steps by gloo on this machine: plain data parallelism (stage 0) and each
stage of ZeRO, and one process without ranks. Bytes are counted from the tensors that a rank holds at its last step,
when all gradients are there (`luthier/distributed/held_states.py`); the formula is that of Rajbhandari et al. 2020,
arXiv:1910.02054, section 5 (`luthier/engine/zero_states.py`).

`--overhead` measures what one process loses by the way through ranks and through each stage of ZeRO against the plain
way: sides in turn, medians of `--repeats`, by the processor time of the process, which others on the machine disturb
less than wall time; both are told.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from sets import recipe_values, render
from side import Measured, measure, run_ranks

from luthier.data.template import Renderer
from luthier.distributed.held_states import held_states
from luthier.distributed.torch_ranks import connected
from luthier.engine.engine import Engine
from luthier.engine.job import TrainingJob
from luthier.engine.ranks import ALONE
from luthier.engine.zero_states import ModelStates, model_states
from luthier.methods.config import bank_spec, exclusive_spec
from luthier.recipe import Recipe
from luthier.worker.loading import load_own_placed, load_placed, placement_of
from luthier.worker.zero import optimizer_maker

TOLERANCE = 1e-4
"""Wanted of the largest relative difference of a stage's losses from one process's, in float32."""

STAGES = (0, 1, 2, 3)
WARMUP = 2
"""Steps that no rate counts."""

PLAIN = 0
"""The size of a side without ranks."""
RATES = {"full": 2e-5, "lora": 5e-4}


# -- one process of one side


def train(arguments: argparse.Namespace) -> None:
    """Train, and say what was measured."""
    torch.set_num_threads(arguments.threads)
    recipe = recipe_of(arguments)
    placement = placement_of(recipe)
    examples = render(arguments.data, arguments.set, "train", Renderer.load(placement.folder), arguments.rows)
    examples = [example for example in examples if example.num_tokens <= arguments.longest]
    stage = recipe.compute.zero
    if recipe.method.runs == "exclusive":
        base: Any = load_own_placed(placement, exclusive_spec(recipe.method), 1, arguments.threads, stage)
        slot = base.slot
    else:
        base = load_placed(placement, arguments.threads, stage)
        slot = base.bank.add(bank_spec(recipe.method), 1)
    size = arguments.size
    meeting = connected(arguments.rank, size, arguments.meeting, torch.device("cpu")) if size else nullcontext(ALONE)
    with meeting as ranks:
        job = TrainingJob("job", slot, examples, recipe.train.spec(), optimizer_maker(recipe, base, slot, ranks))
        engine = Engine(base, ranks=ranks)
        engine.add(job)
        job.optimizer.shard()
        found: list[ModelStates] = []
        step = job.optimizer.step
        cpu_seconds: list[float] = []

        def counted(norm: float | None = None) -> tuple[float, float]:
            cpu_seconds.append(time.process_time())
            if job.step == arguments.steps - 1:
                found.append(held_states(base, job.optimizer))
            return step(norm)

        job.optimizer.step = counted  # type: ignore[method-assign]
        measured = measure(engine)
        trained = sum(parameter.numel() for parameter in slot.parameters().values())
        frozen = sum(parameter.numel() for parameter in base.frozen_parameters())
    # The tokens of a step lie between the step before and itself; the first ones are the warm-up.
    rate = sum(measured.num_tokens[WARMUP + 1 :]) / (cpu_seconds[-1] - cpu_seconds[WARMUP])
    sizes = [frozen, trained, base.dtype.itemsize]
    print(json.dumps({**asdict(measured), "cpu_rate": rate, "held": asdict(found[0]), "sizes": sizes}))


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """The recipe of a side."""
    return Recipe.model_validate(
        recipe_values(
            arguments.data,
            arguments.set,
            base=arguments.base,
            method={"type": arguments.method, **({"rank": 16, "alpha": 32} if arguments.method == "lora" else {})},
            train={
                "epochs": 1000.0,
                "max_steps": arguments.steps,
                "batch_size": arguments.batch_size,
                "learning_rate": RATES[arguments.method],
                "dtype": arguments.dtype,
                "seed": 1,
            },
            compute={"device": "cpu", "threads": arguments.threads, "devices": arguments.size or 1}
            | {"zero": arguments.stage},
        )
    )


# -- sides beside one another


def run_side(arguments: argparse.Namespace, method: str, size: int, stage: int) -> list[dict[str, Any]]:
    """What each process of a side says."""
    flags = ["--data", str(arguments.data), "--set", arguments.set, "--base", arguments.base, "--method", method]
    for name in ("steps", "batch_size", "threads", "rows", "longest", "dtype"):
        flags += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    return run_ranks(Path(__file__), [*flags, "--stage", str(stage)], size)


def compare(arguments: argparse.Namespace, method: str) -> dict[str, Any]:
    """The stages of a method over two processes, beside one."""
    (alone,) = run_side(arguments, method, PLAIN, 0)
    frozen, trained, itemsize = alone["sizes"]
    rows = [_row("one process", alone, [alone["held"]], model_states(frozen, trained, itemsize, 0, 1), alone)]
    show(rows[0])
    for stage in STAGES:
        said = run_side(arguments, method, arguments.devices, stage)
        formula = model_states(frozen, trained, itemsize, stage, arguments.devices)
        held = [rank["held"] for rank in said]
        rows.append(_row(f"stage {stage}", said[0], held, formula, alone))
        show(rows[-1])
    return {"method": method, "num_frozen": frozen, "num_trained": trained, "itemsize": itemsize, "sides": rows}


def _row(
    name: str, first: dict[str, Any], held: list[dict[str, int]], formula: ModelStates, alone: dict[str, Any]
) -> dict[str, Any]:
    pairs = zip(first["losses"], alone["losses"], strict=True)
    return {
        "name": name,
        "held": held,
        "formula": asdict(formula),
        "losses": first["losses"],
        "largest_difference": max(abs(a - b) / abs(b) for a, b in pairs),
        "peak_bytes": first["peak_bytes"],
        "seconds": sum(first["seconds"]),
    }


def show(row: dict[str, Any]) -> None:
    """A side's row, as it is there."""
    sizes = " ".join(f"{part} {mib(row['held'][0][part])}/{mib(size)}" for part, size in row["formula"].items())
    print(f"{row['name']}: {sizes}; losses differ by {row['largest_difference']:.1e}", flush=True)


def overhead(arguments: argparse.Namespace, method: str) -> list[dict[str, Any]]:
    """One process by every way, in turn."""
    sides = {"plain": (PLAIN, 0), "ranks, one process": (1, 0), **{f"zero: {stage}": (1, stage) for stage in (1, 2, 3)}}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    wall: dict[str, list[float]] = {name: [] for name in sides}
    peaks: dict[str, list[int]] = {name: [] for name in sides}
    for _ in range(arguments.repeats):
        for name, (size, stage) in sides.items():
            (said,) = run_side(arguments, method, size, stage)
            measured = Measured(**{part: said[part] for part in Measured.__dataclass_fields__})
            rates[name].append(said["cpu_rate"])
            wall[name].append(measured.tokens_per_second(WARMUP + 1))
            peaks[name].append(measured.peak_bytes)
            print(f"{method}, {name}: {rates[name][-1]:.1f} tokens a processor second", flush=True)
    plain = statistics.median(rates["plain"])
    return [
        {
            "method": method,
            "name": name,
            "rates": rates[name],
            "wall_rates": wall[name],
            "ratio": statistics.median(rates[name]) / plain,
            "peak_bytes": statistics.median(peaks[name]),
        }
        for name in sides
    ]


# -- the page


def mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f}"


def page(facts: dict[str, Any]) -> str:
    """The tables as people read them."""
    lines = [
        "# What a rank holds under ZeRO",
        "",
        "Written by `benchmarks/zero.py`; the same figures in bytes, each step's losses and the settings are in",
        "[zero.json](zero.json). Processes of one thread each on a CPU, by gloo:",
        f"{facts['machine']}.",
        "",
        "Held is counted from a rank's tensors at its last step, when all gradients are there: of the rank with most.",
        "Formula is Rajbhandari et al. 2020, arXiv:1910.02054, section 5, with float32 copies of what is stepped",
        "(12 bytes a value for copy and moments); in one process and at stage 0, which have none, 8 bytes. Buffers in",
        "which gradients are summed, and activations, come on top. `lora` at stage 3 shares out the base alone: its",
        "factors stay whole on every rank, beside the parts that are stepped.",
    ]
    for found in facts["stages"]:
        lines += ["", f"## {found['method']}", "", _settings(found), ""]
        lines += ["| | weights, MiB | formula | gradients | formula | optimizer | formula | losses differ by |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
        for row in found["sides"]:
            most = {part: max(rank[part] for rank in row["held"]) for part in row["formula"]}
            cells = [f"{mib(most[part])} | {mib(size)}" for part, size in row["formula"].items()]
            differs = f"{row['largest_difference']:.1e}" if row["name"] != "one process" else ""
            lines.append(f"| {row['name']} | {' | '.join(cells)} | {differs} |")
    worst = max((row["largest_difference"] for found in facts["stages"] for row in found["sides"]), default=0.0)
    lines += [
        "",
        f"Losses differ from one process's by at most {worst:.1e} of themselves; wanted: {TOLERANCE:g}.",
    ]
    lines += _overhead_lines(facts)
    return "\n".join(lines) + "\n"


def _settings(found: dict[str, Any]) -> str:
    values = found["settings"]
    return (
        f"{values['base']} in {values['dtype']}, {values['set']}: {values['steps']} steps of {values['batch_size']} "
        f"rows of at most {values['longest']} tokens; {found['num_trained']:,} values trained, "
        f"{found['num_frozen']:,} frozen; {values['devices']} processes."
    )


def _overhead_lines(facts: dict[str, Any]) -> list[str]:
    if not facts["overhead"]:
        return []
    repeats = len(facts["overhead"][0]["rates"])
    lines = ["", "## One process by each way", ""]
    lines += [
        f"One process of one thread; medians of {repeats} runs, the ways in turn. Tokens a second of the process's own"
    ]
    lines += [
        "processor time, and of wall time, which others on the machine disturb. `plain` has the fast body (lora), which"
    ]
    lines += ["ZeRO cannot use: without ZeRO, `compute.devices: 1` is `plain` itself.", ""]
    values = facts["overhead"][0]["settings"]
    lines += [
        f"{values['base']}, {values['set']}: {values['steps']} steps of {values['batch_size']} rows, so that what a"
    ]
    lines += ["step costs besides its rows weighs more than in larger ones.", ""]
    lines += ["| method | way | tokens / processor s | of plain | from - to | tokens / s | MiB |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in facts["overhead"]:
        rate, wall = statistics.median(row["rates"]), statistics.median(row["wall_rates"])
        span = f"{min(row['rates']):,.1f} - {max(row['rates']):,.1f}"
        cells = [row["method"], row["name"], f"{rate:,.1f}", f"{row['ratio']:.3f}", span, f"{wall:,.1f}"]
        lines.append("| " + " | ".join([*cells, mib(int(row["peak_bytes"]))]) + " |")
    return lines


def write(arguments: argparse.Namespace, part: str, rows: list[dict[str, Any]]) -> None:
    """Put what was measured in the place of what was there of the same methods."""
    file = arguments.out / "zero.json"
    facts: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"stages": [], "overhead": []}
    methods = {row["method"] for row in rows}
    facts[part] = [row for row in facts[part] if row["method"] not in methods] + rows
    facts["machine"] = (
        f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}, Python {platform.python_version()}, torch "
        f"{torch.__version__}"
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(facts, indent=1) + "\n")
    (arguments.out / "zero.md").write_text(page(facts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets")
    parser.add_argument("--set", default="banking77", help="a set of benchmarks/sets.py")
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--methods", nargs="+", choices=RATES, default=list(RATES))
    parser.add_argument("--devices", type=int, default=2, help="processes of a stage")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rows", type=int, default=400, help="first rows of the set")
    parser.add_argument("--longest", type=int, default=48, help="tokens of the longest row that is taken")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--overhead", action="store_true", help="measure the ways of one process instead")
    parser.add_argument("--repeats", type=int, default=3, help="runs of a way")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    for name, kind in (("method", str), ("stage", int), ("size", int), ("rank", int), ("meeting", str)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.method:
        train(arguments)
        return
    kept = ("base", "set", "devices", "steps", "batch_size", "longest", "dtype")
    settings = {name: getattr(arguments, name) for name in kept}
    rows: list[dict[str, Any]] = []
    for method in arguments.methods:
        found = overhead(arguments, method) if arguments.overhead else [compare(arguments, method)]
        rows += [{**row, "settings": settings} for row in found]
        write(arguments, "overhead" if arguments.overhead else "stages", rows)


if __name__ == "__main__":
    main()
