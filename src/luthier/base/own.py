"""A base that one job owns: a model of its own, of which parameters train, and the same face as the resident base.

Shapes: T tokens, N sequences, L longest sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from luthier.base.load import Base, Forward
from luthier.engine.own import OwnBank, OwnSlot
from luthier.engine.pack import BASE_SLOT, PackedBatch
from luthier.ops.counter import mix_number


class OwnBase(Base):
    """A base whose own weights, or layers put into it, one slot trains.

    Args:
        model: The causal language model, with what trains in it already.
        folder: Where the base's weights lie.
        slot: The job's slot; its live parameters are the model's.
        num_base_parameters: Parameters of the base before anything was put into it.
        seed: Draws the sequence head.
    """

    bank: OwnBank

    def __init__(self, model: Any, folder: Path | None, slot: OwnSlot, num_base_parameters: int, seed: int) -> None:
        self.slot = slot
        self._num_base_parameters = num_base_parameters
        self._is_ready = False
        # The fast blocks know frozen weights alone.
        super().__init__(model, folder, wants_fast_body=False)
        for parameter in slot.live.values():
            parameter.requires_grad_(True)  # the base freezes all that it is given
        self.bank.admit_owner(slot, seed)
        self._is_ready = True

    def _make_bank(self, use_reference: bool) -> OwnBank:
        return OwnBank(self.model, use_reference=use_reference)

    def frozen_parameters(self) -> list[nn.Parameter]:
        """The weights that do not train."""
        trained = {id(parameter) for parameter in self.slot.live.values()}
        return [parameter for parameter in self.model.parameters() if id(parameter) not in trained]

    @property
    def num_parameters(self) -> int:
        """Of the base, without what was put into it."""
        return self._num_base_parameters

    @property
    def num_bytes(self) -> int:
        """Of what is held besides the tensors that the optimizer steps."""
        stepped = {id(parameter) for parameter in self.slot.trained.values()}
        return sum(p.numel() * p.element_size() for p in self.model.parameters() if id(p) not in stepped)

    def forward(
        self, batch: PackedBatch, *, keep: Tensor | None = None, cache: Any = None, only_scored: bool = False
    ) -> Forward:
        """As `Base.forward`; a batch belongs to the job as a whole, or asks the base as it was as a whole.

        Raises:
            ValueError: for a batch of both, or one that asks for a base that training has written over.
        """
        slots = set(batch.slots)
        if len(slots) > 1:
            raise ValueError("a batch runs through the tuned model or through its base, not both")
        is_tuned = BASE_SLOT not in slots or not self._is_ready  # the probe must see what will train
        self._serve(is_tuned, training=self.bank.routing.training)
        with self._random(batch):
            return super().forward(batch, keep=keep, cache=cache, only_scored=only_scored)

    def _serve(self, is_tuned: bool, *, training: bool) -> None:
        """Make the model the tuned one, or its base. It stays so: a backward that recomputes must meet the same."""
        if not is_tuned and self.slot.has_moved:
            raise ValueError("the base's own weights have been trained: load the base to ask it")

    def _random(self, batch: PackedBatch) -> AbstractContextManager[None]:
        """A random state that follows from the batch alone, for methods that draw from torch's own generator.

        Draws follow from seed, step and the examples of the forward, so a resumed run repeats them; unlike the bank's
        counter they do depend on how an optimizer batch is split.
        """
        if not self.bank.routing.training:
            return nullcontext()
        return _seeded(mix_number(*(number for draw in batch.draws for number in draw)), self.device)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Run with a given random state of torch, and leave the state outside as it was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
