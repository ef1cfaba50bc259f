"""Speed and memory on one CUDA GPU, beside the peers in the same call.

    python benchmarks/gpu_vs_peers.py [--sides luthier peft unsloth] [--cases ...] [--lengths FILE] [--json FILE]
    python benchmarks/gpu_vs_peers.py --show FILE [--plot FILE]      the table and the picture of an earlier call

Model: Phi-3-mini's shape (3.8e9 parameters) with random weights, LoRA of rank 16 on every linear layer of the blocks,
AdamW, random tokens, loss on every token. Each side runs in a process of its own; a training figure is the median of
the timed steps after warm-up, a decoding figure one run after another.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu_cases import CASES, Result

SIDES = ("luthier", "peft", "liger", "unsloth")
STANDS_FOR = {"8x2048-fp8": "8x2048"}
"""A case that peers do not have, and theirs that it is compared with. Jobs that Luthier joins they run in turn."""


def main() -> None:
    """Run the sides, print the table, and keep what was asked to be kept."""
    options = _options()
    if options.side:
        run_here(options)
        return
    if options.show:
        kept = json.loads(options.show.read_text())
    else:
        results = [result for side in options.sides for result in run_side(side, options)]
        facts = json.loads(subprocess.run([sys.executable, "-c", FACTS], capture_output=True, text=True).stdout)
        kept = facts | {"results": [asdict(result) for result in results]}
        if options.json:
            options.json.write_text(json.dumps(kept, indent=1) + "\n")
    print(table(kept))
    if options.plot:
        plot(kept, options.plot)


FACTS = (
    f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); "
    "import json; from gpu_luthier import device_facts; print(json.dumps(device_facts()))"
)


def run_here(options: argparse.Namespace) -> None:
    """One side, in this process; a line of the results each."""

    def report(result: Result) -> None:
        print("RESULT", json.dumps(asdict(result)), flush=True)

    if options.side == "luthier":
        import gpu_luthier

        gpu_luthier.run(options.cases, options.repeats, options.lengths, report, profile=options.profile)
    elif options.side == "unsloth":
        import gpu_peers

        gpu_peers.run_unsloth(options.cases, options.repeats, options.lengths, report)
    else:
        import gpu_peers

        gpu_peers.run_peft(options.side, options.cases, options.repeats, report)


def run_side(side: str, options: argparse.Namespace) -> list[Result]:
    """A side in a process of its own, its lines passed on."""
    command = [sys.executable, __file__, "--side", side, "--cases", *options.cases, "--repeats", str(options.repeats)]
    command += ["--lengths", str(options.lengths)] if options.lengths else []
    command += ["--profile"] if options.profile else []
    results = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith("RESULT "):
                results.append(Result(**json.loads(line.removeprefix("RESULT "))))
    if process.returncode:
        print(f"{side} ended with exit code {process.returncode}", flush=True)
    return results


def table(kept: dict[str, Any]) -> str:
    """Markdown: every case, what each side reached, and Luthier against the rival."""
    results = [Result(**row) for row in kept["results"]]
    lines = [
        "| case | side | tokens/s | peak GiB | of the limit | Luthier against it |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for case in CASES:
        ours = next((row for row in results if row.side == "luthier" and row.case == case), None)
        if ours is None:
            continue
        for row in [ours, *_rivals(results, case)]:
            ratio = "" if row is ours else f"{ours.tokens_per_second / row.tokens_per_second:.2f}x"
            lines.append(
                f"| {case} | {row.side} | {row.tokens_per_second:,.0f} | {row.peak_gib:.1f} | "
                f"{row.share_of_limit:.0%} | {ratio} |"
            )
    return "\n".join(lines)


def _rivals(results: list[Result], case: str) -> list[Result]:
    """What the peers reached on the case, or on what stands in its place."""
    return [row for row in results if row.side != "luthier" and row.case == STANDS_FOR.get(case, case)]


def plot(kept: dict[str, Any], path: Path) -> None:
    """Tokens a second of every case, side by side, on a logarithmic scale."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = [Result(**row) for row in kept["results"]]
    cases = [case for case in CASES if any(row.case == case and row.side == "luthier" for row in results)]
    sides = list(dict.fromkeys(row.side for row in results))
    figure, axes = plt.subplots(figsize=(11, 4.6))
    width = 0.8 / len(sides)
    for index, side in enumerate(sides):
        heights = []
        for case in cases:
            rows = [row for row in results if row.case == case and row.side == "luthier"]
            rows = rows if side == "luthier" else [row for row in _rivals(results, case) if row.side == side]
            heights.append(rows[0].tokens_per_second if rows else float("nan"))
        places = [at + (index - (len(sides) - 1) / 2) * width for at in range(len(cases))]
        axes.bar(places, heights, width * 0.92, label=side)
    axes.set_yscale("log")
    axes.set_ylabel("tokens a second")
    axes.set_xticks(range(len(cases)), [case.replace("-", "\n", 1) for case in cases], fontsize=8)
    axes.set_title(f"Phi-3-mini's shape, LoRA of rank 16, one {kept['gpu']}, {kept['date']}", fontsize=10, loc="right")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=len(sides), fontsize=8, loc="lower left", bbox_to_anchor=(0, 0.99))
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["luthier", "peft"])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[case for case in CASES if case != "mix"])
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--lengths", type=Path, help="JSON list of sequence lengths in tokens, for the mix")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--show", type=Path, help="print the table of such a file, and run nothing")
    parser.add_argument("--plot", type=Path, help="where to draw the results")
    parser.add_argument("--profile", action="store_true", help="print where the time of a step goes")
    parser.add_argument("--side", choices=SIDES, help="run one side in this process")
    return parser.parse_args()


if __name__ == "__main__":
    main()
