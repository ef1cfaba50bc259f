"""The peers' sides of `gpu_vs_peers.py`: transformers + PEFT, with Liger's kernels, and Unsloth."""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_cases import (
    DECODE,
    MIX,
    MIX_LONGEST,
    NUM_PROMPT,
    NUM_REQUESTS,
    RANK,
    TRAINING,
    VOCABULARY,
    Case,
    Result,
    decode_result,
    mix_result,
    peak_gib,
    phi3_mini,
    timed,
    training_result,
)

NUM_PEERS_NEW = 64
"""Tokens that peers answer with when decoding: at their rate more would tell no more."""

Report = Callable[[Result], None]


def run_peft(side: str, names: Sequence[str], repeats: int, report: Report) -> None:
    """transformers + PEFT; `side` is "peft" or "liger"."""
    from peft import LoraConfig, get_peft_model

    if side == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_phi3

        apply_liger_kernel_to_phi3()
    targets = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, task_type="CAUSAL_LM")
    model: Any = get_peft_model(phi3_mini(), config).train()
    cases = [name for name in names if name in TRAINING and TRAINING[name].base == "bf16"]
    for name in sorted(cases, key=lambda name: TRAINING[name].recompute):
        if TRAINING[name].recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        _train(side, model, name, repeats, report)
    if DECODE in names:
        model.gradient_checkpointing_disable()
        report(_decode(side, model.eval()))
        report(_decode(f"{side}, merged", model.merge_and_unload()))


def run_unsloth(names: Sequence[str], repeats: int, lengths: Path | None, report: Report) -> None:
    """Unsloth, each of its ways over a model loaded anew."""
    import unsloth  # noqa: F401  (it patches what is imported after it)

    folder = _random_phi3()
    ways = (("bf16", False), ("bf16", True), ("nf4", False), ("nf4", True))
    for base, recomputes in ways:
        cases = [
            n for n in names if n in TRAINING and (TRAINING[n].base, TRAINING[n].recompute > 0) == (base, recomputes)
        ]
        wants_mix = MIX in names and base == "bf16" and not recomputes
        if not cases and not wants_mix:
            continue
        model, tokenizer = _unsloth_model(folder, four_bit=base == "nf4", recomputes=recomputes)
        for name in cases:
            _train("unsloth", model, name, repeats, report)
        if wants_mix:
            try:
                report(_unsloth_mix(model, tokenizer, lengths))
            except Exception as error:  # a peer's failure is told, and the others go on
                print(f"unsloth {MIX}: {type(error).__name__}: {error}", flush=True)
        del model
        gc.collect()
        torch.cuda.empty_cache()


def _train(side: str, model: Any, name: str, repeats: int, report: Report) -> None:
    try:
        median, peak = _timed_steps(model, TRAINING[name], repeats)
        report(training_result(side, name, median * TRAINING[name].jobs, peak))
    except torch.OutOfMemoryError:
        print(f"{side} {name}: out of memory", flush=True)
    model.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.empty_cache()


def _timed_steps(model: Any, case: Case, repeats: int) -> tuple[float, float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> None:
        tokens = torch.randint(0, VOCABULARY, (case.batch, case.length), device="cuda")
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return timed(step, repeats)


@torch.inference_mode()
def _decode(side: str, model: Any) -> Result:
    prompts = torch.randint(3, VOCABULARY - 100, (NUM_REQUESTS, NUM_PROMPT), device="cuda")

    def reply(num_new: int) -> None:
        model.generate(
            input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=num_new, min_new_tokens=num_new,
            do_sample=False, use_cache=True,
        )  # fmt: skip

    reply(4)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    reply(NUM_PEERS_NEW)
    torch.cuda.synchronize()
    return decode_result(side, NUM_REQUESTS * NUM_PEERS_NEW, time.perf_counter() - started, peak_gib())


def _random_phi3() -> str:
    """A folder with the model, for Unsloth loads from one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = Path(tempfile.gettempdir()) / "random-phi3-mini"
    if not (folder / "config.json").exists():
        model = phi3_mini()
        model.save_pretrained(folder)
        del model
        words = {f"t{index}": index for index in range(VOCABULARY)}
        tokenizer = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="t0"))
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="t1", eos_token="t2", pad_token="t3", unk_token="t0"
        ).save_pretrained(folder)
        gc.collect()
        torch.cuda.empty_cache()
    return str(folder)


def _unsloth_model(folder: str, *, four_bit: bool, recomputes: bool) -> tuple[Any, Any]:
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        folder, max_seq_length=MIX_LONGEST, load_in_4bit=four_bit, dtype=torch.bfloat16, local_files_only=True
    )
    model = FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=RANK, lora_dropout=0, bias="none",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        use_gradient_checkpointing="unsloth" if recomputes else False,
    )  # fmt: skip
    return model.train(), tokenizer


def _unsloth_mix(model: Any, tokenizer: Any, lengths: Path | None) -> Result:
    """Sequences of real lengths by Unsloth's trainer with packing, which runs them without padding."""
    if lengths is None:
        raise SystemExit("the mix wants --lengths FILE, a JSON list of tokens a sequence")
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    found = [min(MIX_LONGEST, length) for length in json.loads(lengths.read_text())]
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, VOCABULARY - 100, (length,), generator=generator).tolist() for length in found]
    stamps: list[float] = []
    counts: list[int] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            stamps.append(time.perf_counter())

    config = SFTConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=8, gradient_accumulation_steps=1,
        max_steps=24, packing=True, max_length=MIX_LONGEST, learning_rate=1e-4, lr_scheduler_type="constant",
        optim="adamw_torch_fused", bf16=True, logging_steps=1000, report_to="none", save_strategy="no",
    )  # fmt: skip
    dataset = Dataset.from_dict({"input_ids": rows})
    trainer = SFTTrainer(
        model=model, processing_class=tokenizer, train_dataset=dataset, args=config, callbacks=[Clock()]
    )
    inner = trainer.data_collator

    def counted(features: Any) -> Any:
        batch = inner(features)
        mask = batch.get("attention_mask")
        counts.append(int(mask.sum()) if mask is not None and mask.dim() == 2 else int(batch["input_ids"].numel()))
        return batch

    trainer.data_collator = counted
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    first, last = 4, min(len(stamps), len(counts)) - 1
    rate = sum(counts[first + 1 : last + 1]) / (stamps[last] - stamps[first])
    return mix_result("unsloth", rate, sum(n * n for n in found) / sum(found), peak_gib())
