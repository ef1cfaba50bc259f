"""Luthier beside transformers + PEFT on a CPU: the same rows, order, initial adapter, hyperparameters and steps.

    python benchmarks/cpu_vs_peft.py --data DIR [--sets banking77 short_instructions] [--steps 24] [--repeats 3]

Three sides, each in a process of its own, one after another, `--repeats` times:

- luthier: this engine.
- peft: the usual loop, rows padded to the longest of the batch, loss from the model's own labels.
- peft-best: the same made as good as it gets: rows sorted by length within a window of batches, and the output layer
  only where there is loss (`logits_to_keep`). Its batches are therefore others than the first two sides'.

Prints a table of medians, the largest difference of the loss curves, and peak memory.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from sets import SETS, render
from side import Measured, measure, peak_bytes, report, run_side

from luthier.base.fetch import resolve
from luthier.data.template import Renderer
from luthier.engine.optimizer import learning_rate_at
from luthier.types import AdapterSpec, Example, TrainSpec

SPEC = AdapterSpec(rank=16, alpha=32.0)
SEED = 42
WINDOW_BATCHES = 8
"""Batches within which peft-best sorts rows by length."""


def train_spec(steps: int) -> TrainSpec:
    return TrainSpec(epochs=1000.0, max_steps=steps, batch_size=16, learning_rate=5e-4, seed=SEED)


def luthier_side(folder: Path, examples: list[Example], steps: int) -> Measured:
    from luthier.base.load import load_base
    from luthier.engine.engine import Engine
    from luthier.engine.job import TrainingJob

    base = load_base(folder)
    engine = Engine(base)
    job = TrainingJob("job", base.bank.add(SPEC, SEED), examples, train_spec(steps))
    engine.add(job)
    return measure(engine)


def peft_model(folder: Path):  # type: ignore[no-untyped-def]
    """The base under PEFT, with the very values that Luthier's slot starts from."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from luthier.base.load import Base

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    twin = AutoModelForCausalLM.from_config(model.config)
    twin.load_state_dict(model.state_dict())
    initial = {name: p.detach().clone() for name, p in Base(twin).bank.add(SPEC, SEED).parameters().items()}
    del twin
    model.config.use_cache = False
    config = LoraConfig(r=SPEC.rank, lora_alpha=int(SPEC.alpha), target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                key = name.removeprefix("base_model.model.").replace(".default", "")
                parameter.copy_(initial[key])
    return model


def peft_side(folder: Path, examples: list[Example], steps: int, *, best: bool) -> Measured:
    model = peft_model(folder)
    spec = train_spec(steps)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=spec.learning_rate, weight_decay=spec.weight_decay, fused=True)
    losses, seconds, tokens = [], [], []
    for step, batch in enumerate(batches(examples, spec, steps, sort=best)):
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps, spec)
        loss = (best_loss if best else usual_loss)(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, spec.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
        seconds.append(time.perf_counter() - started)
        tokens.append(sum(example.num_tokens for example in batch))
    return Measured(losses, seconds, tokens, peak_bytes())


def batches(examples: list[Example], spec: TrainSpec, steps: int, *, sort: bool):  # type: ignore[no-untyped-def]
    """The rows of each step, in Luthier's order; with `sort`, by length within windows, the batches then shuffled."""
    per_epoch = math.ceil(len(examples) / spec.batch_size)
    done = 0
    for epoch in range(steps):
        order = np.random.default_rng([spec.seed, epoch]).permutation(len(examples))
        if sort:
            window = WINDOW_BATCHES * spec.batch_size
            parts = [
                sorted(order[i : i + window], key=lambda j: examples[j].num_tokens)
                for i in range(0, len(order), window)
            ]
            order = np.concatenate(parts)
        chunks = [order[i * spec.batch_size : (i + 1) * spec.batch_size] for i in range(per_epoch)]
        if sort:
            chunks = [chunks[i] for i in np.random.default_rng([spec.seed, epoch]).permutation(len(chunks))]
        for chunk in chunks:
            if done == steps:
                return
            done += 1
            yield [examples[int(i)] for i in chunk]


def padded(batch: list[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, attention mask and labels [rows, longest]."""
    longest = max(example.num_tokens for example in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for row, example in enumerate(batch):
        length = example.num_tokens
        ids[row, :length] = torch.from_numpy(example.tokens.astype(np.int64))
        mask[row, :length] = 1
        supervised = torch.from_numpy(example.weights > 0)
        labels[row, :length][supervised] = ids[row, :length][supervised]
    return ids, mask, labels


def usual_loss(model, batch: list[Example]) -> torch.Tensor:  # type: ignore[no-untyped-def]
    ids, mask, labels = padded(batch)
    return model(input_ids=ids, attention_mask=mask, labels=labels).loss


def best_loss(model, batch: list[Example]) -> torch.Tensor:  # type: ignore[no-untyped-def]
    ids, mask, labels = padded(batch)
    columns = torch.nonzero((labels[:, 1:] != -100).any(dim=0))[:, 0]
    logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=columns).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, columns + 1].flatten(), ignore_index=-100)


SIDES = ("luthier", "peft", "peft-best")


def run_one(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    folder = resolve(arguments.base)
    examples = render(arguments.data, arguments.sets[0], "train", Renderer.load(folder))
    if arguments.side == "luthier":
        report(luthier_side(folder, examples, arguments.steps))
    else:
        report(peft_side(folder, examples, arguments.steps, best=arguments.side == "peft-best"))


def compare(arguments: argparse.Namespace) -> None:
    print(f"{'set':<20}{'side':<12}{'tokens/s':>10}{'ratio':>8}{'peak MiB':>10}{'loss, last':>12}{'loss apart':>12}")
    for name in arguments.sets:
        runs: dict[str, list[Measured]] = {side: [] for side in SIDES}
        for _ in range(arguments.repeats):
            for side in SIDES:
                flags = ["--data", str(arguments.data), "--sets", name, "--steps", str(arguments.steps)]
                flags += ["--threads", str(arguments.threads), "--base", arguments.base, "--side", side]
                runs[side].append(run_side(Path(__file__), flags))
        ours = statistics.median(run.tokens_per_second() for run in runs["luthier"])
        curve = runs["luthier"][0].losses
        for side in SIDES:
            rate = statistics.median(run.tokens_per_second() for run in runs[side])
            peak = statistics.median(run.peak_bytes for run in runs[side]) / 2**20
            apart = max(abs(a - b) / abs(b) for a, b in zip(curve, runs[side][0].losses, strict=True))
            shown = "other order" if side == "peft-best" else f"{apart:.1e}"
            last = runs[side][0].losses[-1]
            print(
                f"{name:<20}{side:<12}{rate:>10.1f}{ours / rate:>7.2f}x{peak:>10.0f}{last:>12.4f}{shown:>12}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets")
    parser.add_argument("--sets", nargs="+", default=["banking77", "short_instructions"], choices=list(SETS))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--side", choices=SIDES, help="run one side alone and print its result as JSON")
    arguments = parser.parse_args()
    if arguments.side:
        run_one(arguments)
    else:
        compare(arguments)


if __name__ == "__main__":
    main()
