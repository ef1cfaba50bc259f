"""The machine's part of a recipe: the device, threads, and over how many processes one training goes.

What the format names and this version cannot do yet stands in `NOT_THERE`, which methods train under ZeRO in
`ZERO_TABLE`; the reference of the recipe prints both.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from luthier.strict import Strict

NOT_THERE: dict[tuple[str, str], str] = {
    (
        "deepspeed",
        "a file",
    ): "a DeepSpeed configuration of your own is not read yet: leave it out, and set `zero` and `offload`",
}
"""(field, value) -> why it is refused and what to do."""


MethodKind = Literal["own weights", "lora", "the bank's others", "peft"]

_READS_WEIGHTS = (
    "it computes with the base's weights outside their layers' forward, and there each process holds a part of them"
)

ZERO_TABLE: dict[tuple[MethodKind, int], str] = {
    ("own weights", 1): "",
    ("own weights", 2): "",
    ("own weights", 3): "",
    ("lora", 1): "",
    ("lora", 2): "",
    ("lora", 3): "",
    ("the bank's others", 1): "it has not been shown to train so",
    ("the bank's others", 2): "it has not been shown to train so",
    ("the bank's others", 3): _READS_WEIGHTS,
    ("peft", 1): "what it does around a step needs whole gradients",
    ("peft", 2): "what it does around a step needs whole gradients",
    ("peft", 3): _READS_WEIGHTS,
}
"""(kind of method, stage) -> why it is refused, or "" where it works. Offload changes nothing about it."""


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
    """A DeepSpeed configuration file of your own."""

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
        if self.zero < least:
            raise ValueError(f"offload: {self.offload} is DeepSpeed's, and needs zero: {least} or more")
        return self

    @field_validator("deepspeed")
    @classmethod
    def _is_there(cls, value: object, info: ValidationInfo) -> object:
        known = "a file" if info.field_name == "deepspeed" and value is not None else str(value)
        reason = NOT_THERE.get((str(info.field_name), known))
        if reason is not None:
            raise ValueError(reason)
        return value
