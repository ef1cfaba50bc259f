"""The memory that `luthier plan` predicts beside the memory that runs take: SmolLM2-135M on a CPU.

    python benchmarks/plan.py [--only NAME ...] [--predict-again] [--out docs/benchmarks]

Each configuration trains three or four optimizer steps in a process of its own, checkpoints and the result's files
included, on rows of words that this script draws. Measured is the most that the process has held at once, as the kernel
counts it (VmHWM of /proc/self/status: resident pages, those of mapped files among them). The prediction is made in
another process that never loads the weights. The constants of `luthier/engine/memory.py` (PROCESS_BYTES and HEAP_SLACK)
were set by hand, on early runs and at last on the configurations of `FITTED`; the table's claim is about the others.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

NUM_ROWS = 60
WORDS = ["red", "green", "blue", "warm", "cold", "bright", "dim", "lamp", "door", "fan", "chair", "north", "early"]

FITTED: dict[str, dict[str, Any]] = {
    "lora, rank 16, batch of 8": {"method": {"type": "lora", "rank": 16}, "words": 60},
    "full, batch of 8": {"method": {"type": "full"}, "words": 60},
}

HELD_OUT: dict[str, dict[str, Any]] = {
    "lora, rank 64, batch of 16, short rows": {
        "method": {"type": "lora", "rank": 64},
        "words": 24,
        "train": {"batch_size": 16},
    },
    "lora, rank 4 on q and v, in parts of 512 tokens": {
        "method": {"type": "lora", "rank": 4, "targets": ["q_proj", "v_proj"]},
        "words": 110,
        "train": {"micro_batch_tokens": 512},
    },
    "qlora, rank 16, batch of 6": {"method": {"type": "qlora", "rank": 16}, "words": 90, "train": {"batch_size": 6}},
    "qlora, rank 8 on attention, 8-bit AdamW, batch of 12": {
        "method": {"type": "qlora", "rank": 8, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]},
        "words": 40,
        "train": {"batch_size": 12, "optimizer": "adamw_8bit"},
    },
    "dora, rank 8, batch of 6": {"method": {"type": "dora", "rank": 8}, "words": 70, "train": {"batch_size": 6}},
    "dora, rank 32 on the feed-forward, in parts of 300 tokens": {
        "method": {"type": "dora", "rank": 32, "targets": ["gate_proj", "up_proj", "down_proj"]},
        "words": 50,
        "train": {"micro_batch_tokens": 300},
    },
    "full, batch of 3, long rows": {"method": {"type": "full"}, "words": 200, "train": {"batch_size": 3}},
    "full, batch of 5": {"method": {"type": "full"}, "words": 130, "train": {"batch_size": 5}},
    "full, batch of 14, short rows": {"method": {"type": "full"}, "words": 28, "train": {"batch_size": 14}},
    "full, in parts of 256 tokens": {
        "method": {"type": "full"},
        "words": 60,
        "train": {"micro_batch_tokens": 256, "max_steps": 4},
    },
}


def recipe_for(setting: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The configuration as a recipe, and its data beside it."""
    draw = random.Random(setting["words"])
    rows = []
    for _ in range(NUM_ROWS):
        num_words = int(setting["words"] * draw.uniform(0.5, 1.0))
        words = [draw.choice(WORDS) for _ in range(num_words)]
        rows.append(
            {"prompt": " ".join(words[: num_words // 2]), "completion": " " + " ".join(words[num_words // 2 :])}
        )
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = {"max_steps": 3, "batch_size": 8, "max_length": 1024, "learning_rate": 1e-5, **setting.get("train", {})}
    return {
        "base": "smollm2-135m-instruct",
        "task": "completion",
        "data": {"train": str(data)},
        "method": setting["method"],
        "train": train,
        "evaluation": {"rows": 4, "generate": False},
        "compute": {"device": "cpu", "threads": len(os.sched_getaffinity(0))},
        "output": str(folder / "run"),
    }


def predict(values: dict[str, Any]) -> dict[str, Any]:
    from luthier.recipe import load_recipe
    from luthier.worker.plan import plan_recipe

    return plan_recipe(load_recipe(values)).to_json()


def measure(values: dict[str, Any]) -> dict[str, Any]:
    """Train here, as the process of a run does, and read the peak once everything is written."""
    import torch

    from luthier.recipe import load_recipe
    from luthier.worker.progress import SilentProgress
    from luthier.worker.train import peak_memory_bytes, train_exclusive, train_together

    recipe, progress = load_recipe(values), SilentProgress()
    if recipe.method.runs == "exclusive":
        result = train_exclusive(recipe, resume=False, progress=progress)
    else:
        (result,) = train_together([recipe], resume=False, progress=progress)
    assert result.status == "done", result.result
    peak = peak_memory_bytes(torch.device("cpu"))
    return {"peak": peak, "num_steps": result.result["num_steps"], "torch": torch.__version__}


def apart(verb: str, setting: dict[str, Any]) -> dict[str, Any]:
    """Run one verb of this script in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        order = json.dumps(recipe_for(setting, Path(folder)))
        done = subprocess.run(
            [sys.executable, __file__, "--child", verb], input=order, capture_output=True, text=True, check=False
        )
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-2000:])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run(name: str, setting: dict[str, Any], known: dict[str, Any] | None) -> dict[str, Any]:
    """One row of the table. What was measured before is kept where `known` has it."""
    predicted = apart("predict", setting)
    measured = known["measured"] if known else apart("measure", setting)
    error = predicted["bytes"]["peak"] / measured["peak"] - 1
    sizes = f"predicted {mib(predicted['bytes']['peak'])}, measured {mib(measured['peak'])}"
    print(f"{name}: {sizes}, {error:+.1%}", flush=True)
    return {
        "name": name,
        "is_fitted": name in FITTED,
        "micro_batch_tokens": predicted["micro_batch_tokens"],
        "predicted": predicted["bytes"],
        "measured": measured,
        "error": round(error, 4),
    }


def mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"


def page(rows: list[dict[str, Any]]) -> str:
    """The table as people read it."""
    held_out = [row for row in rows if not row["is_fitted"]]
    worst = max(held_out, key=lambda row: abs(row["error"]))
    lines = [
        "# Predicted and measured memory",
        "",
        "Written by `benchmarks/plan.py`; the same figures in bytes, and what each prediction is made of, are in",
        "[plan.json](plan.json). SmolLM2-135M-Instruct in float32 on a CPU: "
        f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}, Python {platform.python_version()},",
        f"torch {rows[0]['measured']['torch']}, {platform.system()} with glibc {platform.libc_ver()[1]}.",
        "",
        "Measured is the most that a run's process held at once (VmHWM: resident pages, those of mapped files among",
        "them), Python, its libraries, checkpoints and the result's files included, over three or four steps.",
        "Predicted is what `luthier plan` says before any weight is read. Two of its constants were set by hand, on",
        "early runs of lora, full and qlora and at last on the rows marked so. Over the others the prediction errs by",
        f"at most {abs(worst['error']):.1%} ({worst['name']}).",
        "",
        "That gradients fill the holes of the heap was added to the model after `full, batch of 3, long rows` had come",
        "out at +17.6%; `full, batch of 5` and `full, batch of 14` were chosen and measured after that. One",
        "configuration may differ by some hundred MiB between runs, as the allocator finds its holes.",
        "",
        "| configuration | tokens in the largest micro-batch | predicted | measured | error |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        name = row["name"] + (" (fitted)" if row["is_fitted"] else "")
        sizes = f"{mib(row['predicted']['peak'])} | {mib(row['measured']['peak'])} | {row['error']:+.1%}"
        lines.append(f"| {name} | {row['micro_batch_tokens']:,} | {sizes} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="these configurations alone")
    parser.add_argument("--predict-again", action="store_true", help="keep what was measured before")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--child", choices=["predict", "measure"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps({"predict": predict, "measure": measure}[options.child](json.load(sys.stdin))))
        return
    file = options.out / "plan.json"
    before = {row["name"]: row for row in json.loads(file.read_text())} if file.exists() else {}
    rows = []
    for name, setting in {**FITTED, **HELD_OUT}.items():
        if not options.only or name in options.only:
            rows.append(run(name, setting, before.get(name) if options.predict_again else None))
        elif name in before:
            rows.append(before[name])
        options.out.mkdir(parents=True, exist_ok=True)
        done = {row["name"] for row in rows}
        kept = [*rows, *(row for name, row in before.items() if name not in done)]
        file.write_text(json.dumps(kept, indent=1) + "\n")
    (options.out / "plan.md").write_text(page(rows))


if __name__ == "__main__":
    main()
