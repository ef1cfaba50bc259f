"""The machine's part of a recipe: the device, threads, and over how many processes one training goes.

Which methods train under ZeRO stands in `ZERO_TABLE`, which fields of a DeepSpeed file are read in
`luthier/deepspeed_file.py`; the reference of the recipe prints both.
"""

from __future__ import annotations

import re
from collections.abc import Set
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from luthier.deepspeed_file import read_deepspeed_file, stage_and_offload
from luthier.errors import RecipeError
from luthier.strict import Strict

MethodKind = Literal["full, last_layers, bias", "lora", "dora", "ia3", "over NF4", "adalora", "other methods of peft"]

_READS_WEIGHTS = (
    "it computes with the base's weights outside their layers' forward, and there each process holds a part of them"
)
_NO_PARAMETERS = "a base in 4 bits is no parameter, and DeepSpeed shares out parameters alone"
_WHOLE_GRADIENTS = "what it does around a step needs whole gradients"
_NOT_SHOWN = "it has not been shown to train so"

ZERO_TABLE: dict[tuple[MethodKind, int], str] = {
    ("full, last_layers, bias", 1): "",
    ("full, last_layers, bias", 2): "",
    ("full, last_layers, bias", 3): "",
    ("lora", 1): "",
    ("lora", 2): "",
    ("lora", 3): "",
    ("dora", 1): "",
    ("dora", 2): "",
    ("dora", 3): _READS_WEIGHTS,
    ("ia3", 1): "",
    ("ia3", 2): "",
    ("ia3", 3): _NOT_SHOWN,
    ("over NF4", 1): "",
    ("over NF4", 2): "",
    ("over NF4", 3): _NO_PARAMETERS,
    ("adalora", 1): _WHOLE_GRADIENTS,
    ("adalora", 2): _WHOLE_GRADIENTS,
    ("adalora", 3): _WHOLE_GRADIENTS,
    ("other methods of peft", 1): _NOT_SHOWN,
    ("other methods of peft", 2): _NOT_SHOWN,
    ("other methods of peft", 3): _READS_WEIGHTS,
}
"""(kind of method, stage) -> why it is refused, or "" where it works. Offload changes nothing about it. `over NF4` is
qlora, and dora or ia3 over a base in 4 bits."""


class ComputeConfig(Strict):
    """The machine's part."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N. With several processes on GPUs each takes its own: cuda, not cuda:N."""
    threads: int | None = Field(default=None, ge=1, le=1024)
    """CPU threads of each process; null shares out all cores that this process may use."""
    devices: int | Literal["auto"] = 1
    """Processes that train one recipe together, each on a device of its own; auto is one for every GPU that is here,
    and one on a CPU. Under torchrun it is as many as that started. A resume may take another number."""
    zero: Literal[0, 1, 2, 3] = 0
    """ZeRO stage: what is shared out over the processes, by DeepSpeed. 0 is plain data parallelism: nothing but the
    rows; 1 the optimizer's state; 2 gradients too; 3 weights too."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What waits in the host's memory while a GPU does not need it: the optimizer's state from stage 1 on; weights too
    at stage 3."""
    deepspeed: str | None = None
    """A DeepSpeed configuration file of your own, in JSON. Stage and offload may stand there alone; what else it says
    must not be otherwise in the recipe."""

    @field_validator("device")
    @classmethod
    def _device_is_known(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
            raise ValueError("a device is auto, cpu, cuda, or cuda:N with a GPU's number")
        return value

    @field_validator("devices", mode="before")
    @classmethod
    def _devices_can_be_counted(cls, value: object) -> object:
        # Before pydantic's own check, which would complain of each member of the union.
        if value != "auto" and not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            raise ValueError("a number of processes is 1 or more, or auto for one a GPU")
        return value

    @model_validator(mode="after")
    def _offload_has_its_stage(self) -> ComputeConfig:
        least = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.zero < least and not (self.deepspeed and self.zero == 0):  # the file may name the stage
            raise ValueError(f"offload: {self.offload} is DeepSpeed's, and needs zero: {least} or more")
        return self


def filled_from_file(compute: ComputeConfig, given: Set[str]) -> dict[str, Any]:
    """The section's values with the stage and offload that its DeepSpeed file names.

    Args:
        given: Fields that the recipe sets itself.

    Raises:
        RecipeError: when the file cannot be read, recipe and file differ, or neither names a stage.
    """
    file = compute.deepspeed
    if file is None:
        return compute.model_dump()
    said = stage_and_offload(read_deepspeed_file(file), file)
    for name, value in said.items():
        ours = getattr(compute, name)
        if name in given and ours != value:
            raise RecipeError(
                f"compute.{name} is {ours}, and {file} says {value}",
                "the same from both, or from one alone",
                f"take compute.{name} out of the recipe, or mend the file",
            )
    filled = compute.model_dump() | said
    if not filled["zero"]:
        raise RecipeError(
            f"compute.deepspeed is {file}, and no stage of ZeRO is named",
            "zero_optimization.stage 1, 2 or 3 in the file, or compute.zero in the recipe",
            "plain data parallelism needs no DeepSpeed: leave compute.deepspeed out for it",
        )
    return filled
