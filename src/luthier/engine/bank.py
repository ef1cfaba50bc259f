"""The bank: many jobs' slots around one frozen base.

Shapes: T rows of a forward (tokens, or padded positions), P rows of the output layer, I inputs, O outputs, D hidden
size, V base vocabulary, K trained tokens.

The bank replaces the base's linear layers (and any module that a slot trains in full) by the wrappers of
`engine/wrappers.py`, which look up, in the current `Routing`, which rows belong to which slot. The wrappers hold no
state of a job: adding and removing a slot touches only the slot. What a slot keeps for a layer is its method's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from luthier.base.encoder import Encoder
from luthier.base.fp8 import Fp8Linear
from luthier.base.nf4 import Nf4Linear
from luthier.engine.pack import Segment
from luthier.engine.slot import Slot, TokenRows
from luthier.engine.targets import check_layers, ends_with
from luthier.engine.wrappers import BankLinear, BankModule, LinearGroup, is_linear
from luthier.errors import RecipeError, nearest
from luthier.methods.method import LayerAdapter
from luthier.methods.registry import METHODS
from luthier.ops.base_linear import BaseLinear
from luthier.ops.counter import token_keys
from luthier.types import AdapterSpec, HeadKind


@dataclass(frozen=True)
class Routing:
    """Which rows of a forward belong to which slot.

    Attributes:
        segments: Slots of the T rows of the model's layers.
        head_segments: Slots of the P rows that reach the output layer.
        draws: Dropout key of each sequence.
        row_lengths: Rows of each sequence (its tokens, or the padded length).
        training: Whether dropout applies.
    """

    segments: tuple[Segment, ...]
    head_segments: tuple[Segment, ...] = ()
    draws: tuple[tuple[int, int, int], ...] = ()
    row_lengths: tuple[int, ...] = ()
    training: bool = False

    @cached_property
    def token_keys_T(self) -> Tensor:
        return token_keys(list(self.draws), list(self.row_lengths), torch.device("cpu"))


NO_ROUTING = Routing(segments=())


class Bank:
    """Slots around the base `model`.

    Args:
        model: The frozen base; its modules are wrapped in place, its weights never change.
        use_reference: Compute each adapter's output by its plain definition instead of the fused nodes.
    """

    def __init__(self, model: Any, *, use_reference: bool = False) -> None:
        self.model = model
        self.slots: dict[int, Slot] = {}
        self.routing = NO_ROUTING
        self.use_reference = use_reference
        self.keeps_flat = False
        self._next_index = 0
        output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        self.input_embedding: nn.Module = model.get_input_embeddings()
        self.output_name = _name_of(model, output)
        self.input_name = _name_of(model, self.input_embedding) or ""
        self.is_tied = output is not None and output.weight is self.input_embedding.weight
        self.body_name = _name_of(model, model.base_model) or ""
        self.linears: dict[str, nn.Linear | Nf4Linear | Fp8Linear] = {
            n: m for n, m in model.named_modules() if is_linear(m)
        }
        self._layers: dict[str, BaseLinear] = {}
        self._wrapped: dict[str, BankModule] = {}
        self._groups: list[tuple[str, ...]] = []

    # -- slots

    def add(self, spec: AdapterSpec, seed: int, *, fresh: bool = True) -> Slot:
        """Make a slot. The same spec and seed give the same values, whatever the device of a draw.

        Args:
            fresh: False leaves the adapters' values open, for they are loaded next: a start from the base's own
                weights need not be computed again.

        Raises:
            RecipeError: when a target or module name matches nothing in the base, or a layer cannot be adapted so.
        """
        generator = torch.Generator().manual_seed(seed)
        method = METHODS[spec.method]
        slot = Slot(index=self._take_index(), spec=spec)
        for name in self.resolve_targets(spec):
            slot.adapters[name] = method.create(spec, name, self.layer(name), generator, fresh=fresh)
        for name in self.resolve_modules(spec.modules_to_save):
            slot.saved_modules[name] = self._trained_copy(name)
        if spec.new_tokens:
            slot.token_rows = self.token_rows(spec.new_tokens)
        if spec.num_classes is not None:
            slot.head = self._head(spec.num_classes, spec.head, generator)
        self._admit(slot)
        return slot

    def adapt(self, slot: Slot, adapters: dict[str, LayerAdapter]) -> None:
        """Give a slot that adapts no layer yet the adapters of an existing one."""
        slot.adapters = dict(adapters)
        self._admit(slot)

    def snapshot(self, slot: Slot) -> Slot:
        """Admit an immutable copy of `slot` that serves from now on."""
        twin = slot.snapshot(self._take_index())
        self._admit(twin)
        return twin

    def remove(self, slot: Slot) -> None:
        """Forget the slot; its memory goes when the caller lets go of it."""
        del self.slots[slot.index]

    def resolve_targets(self, spec: AdapterSpec) -> list[str]:
        """Names of the linear layers that `spec` adapts, in the model's order.

        Raises:
            RecipeError: as `engine.targets.check_layers`.
        """
        shapes = {name: (linear.in_features, linear.out_features) for name, linear in self.linears.items()}
        return check_layers(spec, shapes, self.output_name)

    def layer(self, name: str) -> BaseLinear:
        """A linear layer of the base as the methods see it."""
        if name not in self._layers:
            self._layers[name] = BaseLinear(self.linears[name])
        return self._layers[name]

    # -- routing

    @contextmanager
    def routed(self, routing: Routing) -> Iterator[None]:
        """Let forward and backward inside this context see `routing`."""
        before, self.routing = self.routing, routing
        try:
            yield
        finally:
            self.routing = before

    def group(self, names: Sequence[str]) -> None:
        """Declare that these linear layers always read one and the same input, so that they may run as one."""
        members = [self._wrap(name) for name in names]
        shared = LinearGroup([member for member in members if isinstance(member, BankLinear)])
        for member in shared.members:
            member.group = shared

    def head_is_plain_for(self, segments: Sequence[Segment]) -> bool:
        """Whether none of these slots changes the output layer."""
        return not any(self._changes_head(self.slots.get(segment.slot)) for segment in segments)

    def _changes_head(self, slot: Slot | None) -> bool:
        if slot is None:
            return False
        name = self.output_name
        return name in slot.adapters or name in slot.saved_modules or slot.token_rows is not None

    # -- making

    def _take_index(self) -> int:
        self._next_index += 1
        return self._next_index - 1

    def _admit(self, slot: Slot) -> None:
        if self.keeps_flat and not slot.is_snapshot:
            slot.gather()
        for name in [*slot.adapters, *slot.saved_modules]:
            self._wrap(name)
        if slot.token_rows is not None:
            self._wrap(self.input_name)
            if self.output_name is not None:
                self._wrap(self.output_name)
        self.slots[slot.index] = slot

    def _wrap(self, name: str) -> BankModule:
        if name not in self._wrapped:
            parent_name, _, child_name = name.rpartition(".")
            parent = self.model.get_submodule(parent_name)
            child = getattr(parent, child_name)
            is_head = name == self.output_name
            wrapper = (
                BankLinear(self, name, child, self.layer(name), is_head=is_head)
                if name in self.linears
                else BankModule(self, name, child, is_head=is_head)
            )
            wrapper.is_after_body = not name.startswith(self.body_name + ".")
            setattr(parent, child_name, wrapper)
            self._wrapped[name] = wrapper
        return self._wrapped[name]

    def resolve_modules(self, wanted: Sequence[str]) -> list[str]:
        """Names of the modules that end in these, in the order of `wanted`."""
        plain = [n for n, m in self.model.named_modules() if n and not isinstance(m, BankModule)]
        names = [name.replace(".base", "") if name.endswith(".base") else name for name in plain]
        found: list[str] = []
        for end in wanted:
            matches = [name for name in dict.fromkeys(names) if ends_with(name, end)]
            if not matches:
                ends = sorted({name.rsplit(".", 1)[-1] for name in names})
                raise RecipeError(
                    f"method.modules_to_save: no module of the base is named {end!r}{nearest(end, ends)}",
                    f"one of {', '.join(ends)}",
                )
            found += matches
        return list(dict.fromkeys(found))

    def original(self, name: str) -> nn.Module:
        """The base's own module of that name, without the bank's wrapper."""
        return self._wrapped[name].base if name in self._wrapped else self.model.get_submodule(name)

    def _trained_copy(self, name: str) -> nn.Module:
        original = self.original(name)
        if any(isinstance(part, BankModule) for part in original.modules()):
            raise RecipeError(
                f"method.modules_to_save: {name} holds layers that are adapted too",
                fix="name single layers (a norm, an embedding, lm_head), or take them out of method.targets",
            )
        held = next((part for part in original.modules() if isinstance(part, Nf4Linear | Fp8Linear)), None)
        if held is not None:
            kind = "fp8" if isinstance(held, Fp8Linear) else "NF4"
            raise RecipeError(
                f"method.modules_to_save: {name} is held in {kind}, which cannot be trained",
                "modules that are not quantized: embeddings, norms, the output layer",
                "let the adapter reach it through method.targets, or train with `method: lora`",
            )
        copied = copy.deepcopy(original)
        copied = copied.to(_wide(next(copied.parameters())))
        return copied.requires_grad_(True)

    def token_rows(self, ids: tuple[int, ...]) -> TokenRows:
        """Fresh rows of these tokens: the base's own, and for new tokens the mean of the base's rows."""
        ids_K = torch.tensor(sorted(set(ids)), dtype=torch.int64)

        def rows(weight_VD: Tensor) -> nn.Parameter:
            wide_VD = weight_VD.detach().to(_wide(weight_VD))
            rows_KD = wide_VD.mean(dim=0, keepdim=True).repeat(len(ids_K), 1)
            known = ids_K < weight_VD.shape[0]
            rows_KD[known] = wide_VD[ids_K[known].to(weight_VD.device)]
            return nn.Parameter(rows_KD)

        input_KD = rows(self.original(self.input_name).weight)  # type: ignore[arg-type]
        output_KD = input_KD
        if self.output_name is not None and not self.is_tied:
            output_KD = rows(self.original(self.output_name).weight)  # type: ignore[arg-type]
        return TokenRows(ids_K.to(input_KD.device), input_KD, output_KD)

    def _head(self, num_classes: int, kind: HeadKind, generator: torch.Generator) -> nn.Module:
        weight: Any = self.original(self.input_name).weight
        if isinstance(self.model, Encoder):
            return self.model.fresh_head(num_classes, kind, generator, _wide(weight)).to(weight.device)
        # As transformers' classifiers have it: the token head alone has a bias.
        head = nn.Linear(weight.shape[1], num_classes, bias=kind == "token")
        std = getattr(getattr(self.model, "config", None), "initializer_range", None) or 0.02
        with torch.no_grad():
            head.weight.normal_(0.0, std, generator=generator)
            if head.bias is not None:
                head.bias.zero_()
        return head.to(weight.device, _wide(weight))


def _name_of(model: nn.Module, module: nn.Module | None) -> str | None:
    return (
        next((name for name, other in model.named_modules() if other is module), None) if module is not None else None
    )


def _wide(weight: Tensor) -> torch.dtype:
    """Adapters are at least float32, whatever the base is held in."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
