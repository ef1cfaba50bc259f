"""The bank: many jobs' slots around one frozen base.

Shapes: T rows of a forward (tokens, or padded positions), P rows of the output layer, I inputs, O outputs, D hidden
size, V base vocabulary, K trained tokens.

The bank replaces the base's linear layers (and any module that a slot trains in full) by wrappers that look up, in the
current `Routing`, which rows belong to which slot. The wrappers hold no state of a job: adding and removing a slot
touches only the slot. A row whose slot does not adapt a layer gets the base's own output.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.engine.pack import BASE_SLOT, Segment
from luthier.engine.slot import Slot, TokenRows
from luthier.errors import ModelError, RecipeError, nearest
from luthier.methods.lora.layer import LoraFactors, create
from luthier.ops.counter import dropout_mask, mix_number, token_keys
from luthier.ops.lora_linear import FrozenLinear, LowRank, lora_linear, lora_linear_reference
from luthier.types import AdapterSpec


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
        use_reference: Compute low-rank updates by the plain reference instead of the fused node.
    """

    def __init__(self, model: Any, *, use_reference: bool = False) -> None:
        self.model = model
        self.slots: dict[int, Slot] = {}
        self.routing = NO_ROUTING
        self.use_reference = use_reference
        self._next_index = 0
        output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        self.input_embedding: nn.Module = model.get_input_embeddings()
        self.output_name = _name_of(model, output)
        self.input_name = _name_of(model, self.input_embedding) or ""
        self.is_tied = output is not None and output.weight is self.input_embedding.weight
        self.body_name = _name_of(model, model.base_model) or ""
        self.linears: dict[str, nn.Linear] = {n: m for n, m in model.named_modules() if _is_linear(m)}
        self._wrapped: dict[str, BankModule] = {}
        self._groups: list[tuple[str, ...]] = []

    # -- slots

    def add(self, spec: AdapterSpec, seed: int) -> Slot:
        """Make a fresh slot. The same spec and seed give the same values on any device.

        Raises:
            RecipeError: when a target or module name matches nothing in the base, or the rank exceeds every layer's.
        """
        targets = self.resolve_targets(spec)
        self._check_rank(spec, targets)
        generator = torch.Generator().manual_seed(seed)
        slot = Slot(index=self._take_index(), spec=spec)
        for name in targets:
            linear = self.linears[name]
            slot.adapters[name] = create(
                spec, linear.in_features, linear.out_features, generator, linear.weight.device, _wide(linear.weight)
            )
        for name in self.resolve_modules(spec.modules_to_save):
            slot.saved_modules[name] = self._trained_copy(name)
        if spec.new_tokens:
            slot.token_rows = self.token_rows(spec.new_tokens)
        if spec.num_classes is not None:
            slot.head = self._sequence_head(spec.num_classes, generator)
        self._admit(slot)
        return slot

    def snapshot(self, slot: Slot) -> Slot:
        """Admit an immutable copy of `slot` that serves from now on."""
        twin = slot.snapshot(self._take_index())
        self._admit(twin)
        return twin

    def remove(self, slot: Slot) -> None:
        """Forget the slot; its memory goes when the caller lets go of it."""
        del self.slots[slot.index]

    def _check_rank(self, spec: AdapterSpec, targets: Sequence[str]) -> None:
        """Refuse a rank that no weight of the targets has: it would only take memory, perhaps all there is."""
        most = max((max(self.linears[name].weight.shape) for name in targets), default=spec.rank)
        if spec.rank > most:
            raise RecipeError(
                f"method.rank is {spec.rank:,}, and the largest layer to adapt is {most:,} wide",
                f"a rank from 1 to {most:,}; usually 8 to 64",
                "lower method.rank",
            )

    def resolve_targets(self, spec: AdapterSpec) -> list[str]:
        """Names of the linear layers that `spec` adapts, in the model's order."""
        if spec.targets == "all-linear":
            inner = [name for name in self.linears if name != self.output_name]
            if not inner:
                raise RecipeError(
                    "method.targets: all-linear finds no linear layer in this base besides its output layer",
                    "a base whose layers are torch.nn.Linear (GPT-2, for one, is built of Conv1D)",
                    "choose another base; `luthier models` lists some",
                )
            return inner
        names = []
        for wanted in spec.targets:
            found = [name for name in self.linears if _ends_with(name, wanted)]
            if not found:
                ends = sorted({name.rsplit(".", 1)[-1] for name in self.linears})
                raise RecipeError(
                    f"method.targets: no linear layer of the base is named {wanted!r}{nearest(wanted, ends)}",
                    f"one of {', '.join(ends)}",
                )
            names += found
        return [name for name in self.linears if name in set(names)]

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
            kind = BankLinear if _is_linear(child) else BankModule
            wrapper = kind(self, name, child, is_head=name == self.output_name)
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
            matches = [name for name in dict.fromkeys(names) if _ends_with(name, end)]
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

    def _sequence_head(self, num_classes: int, generator: torch.Generator) -> nn.Linear:
        weight: Any = self.original(self.input_name).weight
        head = nn.Linear(weight.shape[1], num_classes, bias=False)
        std = getattr(getattr(self.model, "config", None), "initializer_range", None) or 0.02
        with torch.no_grad():
            head.weight.normal_(0.0, std, generator=generator)
        return head.to(weight.device, _wide(weight))


class BankModule(nn.Module):
    """A module of the base of which slots may hold trained copies; it acts on each row by itself."""

    def __init__(self, bank: Bank, name: str, base: nn.Module, *, is_head: bool) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self.is_head = is_head
        self.is_after_body = is_head  # it sees the rows of the output layer: RoBERTa's head is two layers and a norm
        self._bank = [bank]  # in a list, so that the bank's model does not become this module's child

    @property
    def bank(self) -> Bank:
        return self._bank[0]

    @property
    def weight(self) -> Tensor:
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias  # type: ignore[return-value]

    @property
    def segments(self) -> tuple[Segment, ...]:
        routing = self.bank.routing
        return routing.head_segments if self.is_after_body else routing.segments

    def forward(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        rows = self._changed_rows()
        if not rows:
            return self.base(self._known_ids(x), *others, **named)
        lead = 1 if not x.is_floating_point() else 0
        flat = x.reshape(-1) if lead else x.reshape(-1, x.shape[-1])
        self.check_rows(flat.shape[0])
        parts = []
        for segment, slot in rows:
            parts.append(self._slot_output(flat[segment.start : segment.end], slot))
        out = _stack(parts)
        return out.reshape(*x.shape, -1) if lead else out.reshape(*x.shape[:-1], -1)

    def check_rows(self, num_rows: int) -> None:
        """Rows that are not the batch's own, in its order, cannot be told apart by slot.

        Raises:
            ModelError: for an architecture that feeds this module some other selection of rows, as experts are fed.
        """
        expected = self.segments[-1].end
        if num_rows != expected:
            raise ModelError(
                f"{self.name} of this base is fed {num_rows} rows of a batch of {expected}",
                "a layer that is fed every token of the batch",
                "leave it out: name in method.targets (and method.modules_to_save) the layers to train",
            )

    def _changed_rows(self) -> list[tuple[Segment, Slot | None]]:
        slots = [(segment, self.bank.slots.get(segment.slot)) for segment in self.segments]
        return slots if any(slot is not None and self._is_changed_by(slot) for _, slot in slots) else []

    def _is_changed_by(self, slot: Slot) -> bool:
        has_rows = slot.token_rows is not None and (self.is_head or self.name == self.bank.input_name)
        return self.name in slot.saved_modules or has_rows

    def _slot_output(self, flat: Tensor, slot: Slot | None) -> Tensor:
        if slot is None or not self._is_changed_by(slot):
            return self.base(self._known_ids(flat))
        if self.name in slot.saved_modules:
            module = slot.saved_modules[self.name]
            weight = next(module.parameters())
            given = flat.to(weight.dtype) if flat.is_floating_point() else flat
            out = module(given)
        else:
            out = self.base(self._known_ids(flat))
        if slot.token_rows is not None and (self.is_head or self.name == self.bank.input_name):
            rows = slot.token_rows
            out = _with_output_rows(out, flat, rows) if self.is_head else _with_input_rows(out, flat, rows, self._scale)
        return out.to(self.base.weight.dtype)  # type: ignore[arg-type]

    @property
    def _scale(self) -> Tensor | float:
        """What the base's embedding multiplies its rows by, as Gemma's does by the root of the hidden size."""
        return getattr(self.base, "embed_scale", 1.0)

    def _known_ids(self, x: Tensor) -> Tensor:
        # Another slot's new tokens never reach the base; this slot's own are replaced after the look-up.
        if x.is_floating_point() or self.name != self.bank.input_name:
            return x
        return x.clamp(max=self.base.weight.shape[0] - 1)  # type: ignore[index]


class BankLinear(BankModule):
    """A frozen linear layer with slots' low-rank updates; slots may also hold a trained copy of it."""

    base: nn.Linear

    def __init__(self, bank: Bank, name: str, base: nn.Module, *, is_head: bool) -> None:
        super().__init__(bank, name, base, is_head=is_head)
        self.group: LinearGroup | None = None
        self.module_key = mix_number(*name.encode())

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    def forward(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        if self._changed_rows():
            return super().forward(x, *others, **named)
        if self.group is not None:
            return self.group.output(self, x)
        return low_rank_outputs([self], x)[0]

    def _is_changed_by(self, slot: Slot) -> bool:
        return super()._is_changed_by(slot)

    def _slot_output(self, flat: Tensor, slot: Slot | None) -> Tensor:
        out = super()._slot_output(flat, slot)
        if slot is None or self.name not in slot.adapters:
            return out
        # A slot that both replaces rows of this layer and adapts it: the update adds to what the layer gives.
        factors = slot.adapters[self.name]
        low = F.linear(F.linear(flat.to(factors.a_RI.dtype), factors.a_RI), factors.b_OR) * factors.scale
        return out + F.pad(low, (0, out.shape[-1] - low.shape[-1])).to(out.dtype)

    def updates(self) -> list[tuple[Segment, LoraFactors]]:
        """The low-rank updates that act in the current routing, with their rows."""
        found = []
        for segment in self.segments:
            slot = self.bank.slots.get(segment.slot) if segment.slot != BASE_SLOT else None
            if slot is not None and self.name in slot.adapters:
                found.append((segment, slot.adapters[self.name]))
        return found


@dataclass
class LinearGroup:
    """Linear layers that read one input (query, key, value; gate, up). The first call computes for all."""

    members: list[BankLinear]
    _input: Tensor | None = None
    _outputs: dict[int, Tensor] = field(default_factory=dict)

    def output(self, member: BankLinear, x: Tensor) -> Tensor:
        if self._input is x and id(member) in self._outputs:
            out = self._outputs.pop(id(member))
        else:
            outputs = low_rank_outputs(self.members, x)
            self._input = x
            self._outputs = {id(other): out for other, out in zip(self.members, outputs, strict=True)}
            out = self._outputs.pop(id(member))
        if not self._outputs:
            self._input = None
        return out


def low_rank_outputs(members: Sequence[BankLinear], x: Tensor) -> list[Tensor]:
    """The outputs of linear layers that read x [..., I], each with its slots' updates."""
    bank = members[0].bank
    updates = [member.updates() for member in members]
    if not any(updates):
        return [member.base(x) for member in members]
    flat_TI = x.reshape(-1, x.shape[-1])
    members[0].check_rows(flat_TI.shape[0])
    drops = bank.routing.training and any(factors.dropout > 0 for part in updates for _, factors in part)
    layers = [
        FrozenLinear(
            member.base.weight,
            member.base.bias,
            tuple(LowRank(s.start, s.end, f.a_RI, f.b_OR, f.scale) for s, f in part),
        )
        for member, part in zip(members, updates, strict=True)
    ]
    if drops:
        outputs = tuple(_with_dropout(m, flat_TI, part) for m, part in zip(members, updates, strict=True))
    else:
        compute = lora_linear_reference if bank.use_reference else lora_linear
        outputs = compute(flat_TI, layers)
    return [out_TO.view(*x.shape[:-1], out_TO.shape[-1]) for out_TO in outputs]


def _with_dropout(member: BankLinear, x_TI: Tensor, updates: list[tuple[Segment, LoraFactors]]) -> Tensor:
    y_TO = member.base(x_TI)
    parts, done = [], 0
    for segment, factors in updates:
        rows = slice(segment.start, segment.end)
        x_nI = x_TI[rows].to(factors.a_RI.dtype)
        if factors.dropout > 0:
            keys_n = member.bank.routing.token_keys_T[rows].to(x_TI.device)
            x_nI = CounterDropout.apply(x_nI, keys_n, member.module_key, factors.dropout)
        low_nO = F.linear(F.linear(x_nI, factors.a_RI), factors.b_OR) * factors.scale
        parts += [y_TO[done : segment.start], (y_TO[rows] + low_nO).to(y_TO.dtype)]
        done = segment.end
    return torch.cat([*parts, y_TO[done:]])


class CounterDropout(torch.autograd.Function):
    """x times a counter-based mask, which the backward computes again rather than keeps."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, keys_T: Tensor, module_key: int, probability: float) -> Tensor:
        ctx.save_for_backward(keys_T)
        ctx.key, ctx.probability = module_key, probability
        return x_TI * dropout_mask(keys_T, module_key, x_TI.shape[-1], probability).to(x_TI.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (keys_T,) = ctx.saved_tensors
        (grad_TI,) = grads
        mask_TI = dropout_mask(keys_T, ctx.key, grad_TI.shape[-1], ctx.probability)
        return grad_TI * mask_TI.to(grad_TI.dtype), None, None, None


def _with_input_rows(out: Tensor, ids: Tensor, rows: TokenRows, scale: Tensor | float) -> Tensor:
    at = torch.searchsorted(rows.ids_K, ids).clamp(max=len(rows.ids_K) - 1)
    hit = rows.ids_K[at] == ids
    if isinstance(scale, Tensor):
        scale = scale.to(out.dtype)
    return torch.where(hit[:, None], rows.input_KD[at].to(out.dtype) * scale, out)


def _with_output_rows(out: Tensor, hidden: Tensor, rows: TokenRows) -> Tensor:
    """Logits whose columns of trained tokens come from the slot's rows; new tokens add columns."""
    own_PK = F.linear(hidden.to(rows.output_KD.dtype), rows.output_KD).to(out.dtype)
    width = max(out.shape[-1], int(rows.ids_K[-1]) + 1)
    wide = F.pad(out, (0, width - out.shape[-1]), value=torch.finfo(out.dtype).min)
    return wide.index_copy(-1, rows.ids_K, own_PK)


def _stack(parts: list[Tensor]) -> Tensor:
    """Concatenate rows; logits of slots with new tokens are wider; the others' are filled so as never to win."""
    width = max(part.shape[-1] for part in parts)
    low = torch.finfo(parts[0].dtype).min
    return torch.cat([F.pad(p, (0, width - p.shape[-1]), value=low) if p.shape[-1] < width else p for p in parts])


def _is_linear(module: nn.Module) -> bool:
    """Whether it computes W x + b and nothing else: a router that inherits from nn.Linear may give several results."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _ends_with(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith("." + wanted)


def _name_of(model: nn.Module, module: nn.Module | None) -> str | None:
    return (
        next((name for name, other in model.named_modules() if other is module), None) if module is not None else None
    )


def _wide(weight: Tensor) -> torch.dtype:
    """Adapters are at least float32, whatever the base is held in."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
