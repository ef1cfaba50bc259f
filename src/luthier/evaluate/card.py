"""RUN/README.md: the model card that travels with an adapter. It names the data, and holds none of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from luthier.base.adapter_files import CLASSIFIER_FOLDER
from luthier.base.catalogue import CATALOGUE
from luthier.base.folder import read_json
from luthier.evaluate import summary
from luthier.evaluate.record import RunRecord, read_run
from luthier.files import write_text

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_LICENCES = {
    "apache-2.0": "apache-2.0",
    "mit": "mit",
    "llama 3.2 community": "llama3.2",
    "gemma terms of use": "gemma",
}
_PIPELINES = {
    "classification": "text-classification",
    "tagging": "token-classification",
    "translation": "translation",
    "qa": "question-answering",
}
_TOLD_HYPERPARAMETERS = (
    "epochs",
    "max_steps",
    "batch_size",
    "learning_rate",
    "schedule",
    "weight_decay",
    "max_length",
    "seed",
)


def write_card(run: Path) -> Path:
    """Write RUN/README.md from what the run folder holds, atomically.

    Returns:
        The card's path.

    Raises:
        RunError: if there is no such folder.
        StorageError: if the card cannot be written.
    """
    record = read_run(run)
    path = record.path / "README.md"
    write_text(path, render_card(record))
    return path


def render_card(record: RunRecord) -> str:
    """The card as Markdown with a YAML front matter that model hubs read."""
    sections = [
        f"---\n{yaml.safe_dump(_front_matter(record), sort_keys=False, allow_unicode=True)}---",
        f"# {_plain(record.path.resolve().name)}",
        _opening(record),
        "## Scores\n\n" + _scores(record),
        "## Training data\n\n" + _data(record),
        "## Method\n\n" + _method(record),
        f"## How to load it\n\n```python\n{loading_code(record)}\n```",
        "## Limits\n\n" + "\n".join(f"- {limit}" for limit in _limits(record)),
    ]
    return "\n\n".join(sections) + "\n"


def loading_code(record: RunRecord) -> str:
    """Python that loads the result with transformers, or an adapter with peft, alone."""
    folder = repr(str(Path(record.shown_path) / record.result_folder))
    if record.is_whole_model:
        kind = _head_kind(record) or "CausalLM"
        return (
            f"from transformers import AutoModelFor{kind}, AutoTokenizer\n\n"
            f"folder = {folder}\n"
            f"model = AutoModelFor{kind}.from_pretrained(folder)\n"
            "tokenizer = AutoTokenizer.from_pretrained(folder)"
        )
    if record.has_head:
        return _classifier_code(folder, record)
    imports = "AutoTokenizer" + (", BitsAndBytesConfig" if _is_nf4(record) else "")
    quantized = f", {_NF4_ARGUMENTS}" if _is_nf4(record) else ""
    return (
        "from peft import AutoPeftModelForCausalLM\n"
        f"from transformers import {imports}\n\n"
        f"folder = {folder}\n"
        f"{_quantization_code(record)}"
        f"model = AutoPeftModelForCausalLM.from_pretrained(folder{quantized})\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)"
    )


def _head_kind(record: RunRecord) -> str:
    """transformers' word for what the head says a class of; empty for a language model."""
    if record.is_tagging:
        return "TokenClassification"
    return "SequenceClassification" if record.has_head else ""


_NF4_ARGUMENTS = "quantization_config=quantization, dtype=quantization.bnb_4bit_compute_dtype"


def _is_nf4(record: RunRecord) -> bool:
    return record.result.get("base_quantization") == "nf4"


def _quantization_code(record: RunRecord) -> str:
    """Lines that say how the base is held in 4 bits; none for one that is not."""
    if not _is_nf4(record):
        return ""
    return (
        "quantization = BitsAndBytesConfig(  # the base as the adapter was trained over it\n"
        '    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,\n'
        f'    bnb_4bit_compute_dtype="{_plain(record.result.get("base_dtype") or "float32")}",\n'
        ")\n"
    )


def _classifier_code(folder: str, record: RunRecord) -> str:
    """The base's own config lacks the classes and, at times, the padding token by which the last token is found."""
    quantized = f",\n    {_NF4_ARGUMENTS}" if _is_nf4(record) else ""
    auto_class = f"AutoPeftModelFor{_head_kind(record)}"
    return (
        f"from peft import {auto_class}\n"
        f"from transformers import AutoConfig, AutoTokenizer{', BitsAndBytesConfig' if _is_nf4(record) else ''}\n\n"
        f"folder = {folder}\n"
        f"{_quantization_code(record)}"
        'config = AutoConfig.from_pretrained(folder, subfolder="classifier")  # names of the classes, padding token\n'
        f"model = {auto_class}.from_pretrained(\n"
        "    folder, id2label=config.id2label, label2id=config.label2id, pad_token_id=config.pad_token_id"
        f"{_pooling(record)}"
        f"{quantized}\n"
        ")\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)"
    )


def _pooling(record: RunRecord) -> str:
    """How the head pools, where the architecture leaves it to the config and the base's says another way."""
    path = record.path / record.result_folder / CLASSIFIER_FOLDER / "config.json"
    is_open = path.is_file() and "classifier_pooling" in read_json(path)
    return ",\n    classifier_pooling=config.classifier_pooling" if is_open else ""


def _front_matter(record: RunRecord) -> dict[str, Any]:
    base, licence = _base(record)
    matter: dict[str, Any] = {}
    if licence:
        known = _HUB_LICENCES.get(licence.lower())
        matter.update({"license": known} if known else {"license": "other", "license_name": licence})
    matter["base_model"] = base
    matter["library_name"] = "transformers" if record.is_whole_model else "peft"
    matter["pipeline_tag"] = _PIPELINES.get(record.task, "text-generation")
    matter["tags"] = [tag for tag in ("luthier", record.method, record.task) if tag]
    return matter


def _base(record: RunRecord) -> tuple[str, str | None]:
    """The base's public name, and its licence where known. Of a folder only the last part is told."""
    name = str(record.recipe.get("base") or "unknown")
    for entry in CATALOGUE:
        if name in (entry.name, entry.hub_id):
            return entry.hub_id, entry.licence
    if _HUB_ID.fullmatch(name) and not Path(name).exists():
        return name, None
    return Path(name).name, None


def _opening(record: RunRecord) -> str:
    base, _ = _base(record)
    method = {"lora": "LoRA", "qlora": "QLoRA", "dora": "DoRA", "ia3": "(IA)³"}.get(record.method, record.method)
    line = summary.headline(record.evaluation)
    what = "A model that began as" if record.is_whole_model else "An adapter for"
    text = f"{what} `{_plain(base)}`, tuned with Luthier" + (
        f" ({_plain(method)}, task {_plain(record.task)})." if method else "."
    )
    return text + (f"\n\n**{line}**" if line else "\n\nIt was not judged on held-out rows.")


def _scores(record: RunRecord) -> str:
    header, *rows = summary.summary_table(record.evaluation)
    if not rows:
        return "None: this run was not judged on held-out rows."
    num_rows = record.evaluation.get("num_rows")
    note = "In parentheses: 95% intervals" + (f", on {num_rows:,} held-out rows." if num_rows else ".")
    return _table(header, rows) + f"\n\n{note} Loss and perplexity are better when lower."


def _data(record: RunRecord) -> str:
    lines = []
    for title, name in (("Training", "train"), ("Held out", "validation")):
        part = record.data.get(name)
        if isinstance(part, Mapping):
            counts = [f"{part[f'num_{what}']:,} {what}" for what in ("rows", "tokens") if part.get(f"num_{what}")]
            lines.append(f"- {title}: {', '.join(counts) or 'no rows'}")
    if digest := record.result.get("data_sha256"):
        lines.append(f"- SHA-256 of the files and their split: `{_plain(digest)}`")
    lines += [f"- {_plain(warning)}" for warning in record.data.get("warnings") or []]
    return "\n".join(lines) or "Not recorded."


def _method(record: RunRecord) -> str:
    values: dict[str, Any] = {}
    if isinstance(record.recipe.get("method"), dict):
        values.update({f"method.{name}": value for name, value in record.recipe["method"].items()})
    train = record.recipe.get("train")
    if isinstance(train, dict):
        values.update({f"train.{name}": train[name] for name in _TOLD_HYPERPARAMETERS if train.get(name) is not None})
    cost = record.cost
    if record.steps:
        values["steps"] = record.steps[-1]["step"]
    if cost.get("best_step") is not None:
        values["kept step"] = cost["best_step"]
    if cost.get("num_trainable_parameters"):
        values["trainable parameters"] = f"{cost['num_trainable_parameters']:,}"
    if cost.get("device"):
        values["device"] = cost["device"]
    values.update({name: value for name, value in record.versions.items() if isinstance(value, str)})
    rows = [[name, str(value)] for name, value in values.items() if value is not None and value != []]
    return _table(["what", "value"], rows) if rows else "Not recorded."


def _limits(record: RunRecord) -> list[str]:
    base, licence = _base(record)
    limits = [
        f"It keeps the limits and biases of `{_plain(base)}`"
        + (f", and its licence ({licence})." if licence else ", and its licence."),
        "Held-out rows come from the same source as the training rows: scores say little about other kinds of input.",
        "Nothing here tests for harmful, private or untrue replies.",
    ]
    if _is_nf4(record):
        limits.append("It was trained over its base in NF4; on the base in full precision it is another model.")
    verdict = summary.verdict(record.evaluation)
    if not summary.headline(record.evaluation):
        limits.insert(0, "Whether it is better than its base is not known: it was not judged.")
    elif verdict in ("worse", "no clear difference"):
        metric = summary.label(summary.primary_metric(record.evaluation) or "").lower()
        limits.insert(
            0,
            f"By {metric} it shows {verdict} against its base."
            if verdict.startswith("no")
            else f"By {metric} it is worse than its base.",
        )
    return limits


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell if cell == "---" else _plain(cell) for cell in line) + " |" for line in lines
    )


def _plain(value: Any) -> str:
    """Text that cannot become markup, a table's border or a new line."""
    text = " ".join(str(value).split())
    for character, harmless in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("`", "'")):
        text = text.replace(character, harmless)
    return text
