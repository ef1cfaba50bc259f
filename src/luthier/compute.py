"""The machine's part of a recipe: the device, threads, and over how many processes one training goes.

What the format names and this version cannot do yet stands in `NOT_THERE`, the one table of refusals; the reference of
the recipe prints it.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from luthier.strict import Strict

_SHARDED = "every process holds the whole base; leave it at 0, or choose a smaller base or `method: qlora`"
_OFFLOADED = "nothing is moved to the host's memory; leave it at none, or set train.optimizer: paged_adamw"

NOT_THERE: dict[tuple[str, str], str] = {
    ("zero", "1"): f"the optimizer's state is not shared out over processes yet: {_SHARDED}",
    ("zero", "2"): f"gradients are not shared out over processes yet: {_SHARDED}",
    ("zero", "3"): f"weights are not shared out over processes yet: {_SHARDED}",
    ("offload", "optimizer"): f"the optimizer's state stays where the weights are: {_OFFLOADED}",
    ("offload", "parameters"): f"weights stay on their device: {_OFFLOADED}",
    (
        "deepspeed",
        "a file",
    ): "no DeepSpeed runs here yet: leave it out, and set `devices` for plain data parallelism",
}
"""(field, value) -> why it is refused and what to do."""


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
    """ZeRO stage: what is shared out over the processes. 0 is plain data parallelism: nothing but the rows."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What waits in the host's memory while a GPU does not need it."""
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

    @field_validator("zero", "offload", "deepspeed")
    @classmethod
    def _is_there(cls, value: object, info: ValidationInfo) -> object:
        known = "a file" if info.field_name == "deepspeed" and value is not None else str(value)
        reason = NOT_THERE.get((str(info.field_name), known))
        if reason is not None:
            raise ValueError(reason)
        return value
