"""The modules that the bank puts in place of the base's: they act on each row as its slot says.

Shapes: T rows of a forward (tokens, or padded positions), n rows of one slot, P rows of the output layer, I inputs,
O outputs, K trained tokens.

An adapter's own `output` is the definition. Where nothing is dropped, the fused nodes of `ops/` compute the same from
its `terms`, all slots and all layers of one input together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.base.fp8 import Fp8Linear
from luthier.base.nf4 import Nf4Linear
from luthier.engine.pack import BASE_SLOT, Segment
from luthier.engine.slot import Slot, TokenRows
from luthier.errors import ModelError
from luthier.methods.method import LayerAdapter, Terms
from luthier.ops.base_linear import BaseLinear
from luthier.ops.counter import dropout_mask, mix_number
from luthier.ops.lora_linear import FrozenLinear, LowRank, lora_linear
from luthier.ops.row_gains import RowGain, row_gains

if TYPE_CHECKING:
    from luthier.engine.bank import Bank


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
    """A frozen linear layer that slots adapt; slots may also hold a trained copy of it."""

    base: nn.Linear | Nf4Linear | Fp8Linear

    def __init__(self, bank: Bank, name: str, base: nn.Module, layer: BaseLinear, *, is_head: bool) -> None:
        super().__init__(bank, name, base, is_head=is_head)
        self.layer = layer
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
        return adapted_outputs([self], x)[0]

    def _slot_output(self, flat: Tensor, slot: Slot | None) -> Tensor:
        out = super()._slot_output(flat, slot)
        if slot is None or self.name not in slot.adapters:
            return out
        # A slot that both replaces rows of this layer and adapts it: the update adds to what the layer gives.
        terms = slot.adapters[self.name].terms(self.layer)
        if not terms.is_additive:
            raise ModelError(
                f"a slot trains {self.name} of this base or rows of it, and {slot.spec.method} scales it too",
                "one of the two",
            )
        for a_RI, b_OR, scale in terms.low_rank:
            low = F.linear(F.linear(flat.to(a_RI.dtype), a_RI), b_OR) * scale
            out = out + F.pad(low, (0, out.shape[-1] - low.shape[-1])).to(out.dtype)
        return out

    def updates(self) -> list[Update]:
        """The adapters that act in the current routing, with their rows."""
        found = []
        for segment in self.segments:
            slot = self.bank.slots.get(segment.slot) if segment.slot != BASE_SLOT else None
            if slot is not None and self.name in slot.adapters:
                found.append((segment, slot.adapters[self.name]))
        return found


Update = tuple[Segment, LayerAdapter]
"""An adapter and the rows that it acts on."""


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
            outputs = adapted_outputs(self.members, x)
            self._input = x
            self._outputs = {id(other): out for other, out in zip(self.members, outputs, strict=True)}
            out = self._outputs.pop(id(member))
        if not self._outputs:
            self._input = None
        return out


def adapted_outputs(members: Sequence[BankLinear], x: Tensor) -> list[Tensor]:
    """The outputs of linear layers that read x [..., I], each as its rows' slots adapt it."""
    bank = members[0].bank
    updates = [member.updates() for member in members]
    if not any(updates):
        return [member.base(x) for member in members]
    x_TI = x.reshape(-1, x.shape[-1])
    members[0].check_rows(x_TI.shape[0])
    drops = bank.routing.training and any(adapter.dropout > 0 for part in updates for _, adapter in part)
    if drops or bank.use_reference:
        outputs = [_plain_output(member, x_TI, part) for member, part in zip(members, updates, strict=True)]
    else:
        outputs = _fused_outputs(members, x_TI, updates)
    return [out_TO.view(*x.shape[:-1], out_TO.shape[-1]) for out_TO in outputs]


def _plain_output(member: BankLinear, x_TI: Tensor, updates: list[Update]) -> Tensor:
    """Each adapter's own definition on its rows."""
    parts, done = [], 0
    for segment, adapter in updates:
        x_nI = x_TI[segment.start : segment.end]
        dropped_nI = x_nI
        if member.bank.routing.training and adapter.dropout > 0:
            keys_n = member.bank.routing.token_keys_T[segment.start : segment.end].to(x_TI.device)
            wide = torch.promote_types(x_nI.dtype, torch.float32)
            dropped_nI = CounterDropout.apply(x_nI.to(wide), keys_n, member.module_key, adapter.dropout)
        if done < segment.start:
            parts.append(member.base(x_TI[done : segment.start]))
        parts.append(adapter.output(member.layer, x_nI, dropped_nI))
        done = segment.end
    if done < x_TI.shape[0]:
        parts.append(member.base(x_TI[done:]))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _fused_outputs(members: Sequence[BankLinear], x_TI: Tensor, updates: list[list[Update]]) -> list[Tensor]:
    """The same by the fused nodes, where nothing is dropped."""
    terms = [
        [(segment, adapter.terms(member.layer)) for segment, adapter in part]
        for member, part in zip(members, updates, strict=True)
    ]
    if any(term.input_gain_I is not None for part in terms for _, term in part):
        # Then the layers read different inputs after all.
        return [
            _fused([member], _with_input_gains(x_TI, part), [part])[0]
            for member, part in zip(members, terms, strict=True)
        ]
    return _fused(members, x_TI, terms)


def _fused(members: Sequence[BankLinear], x_TI: Tensor, terms: list[list[tuple[Segment, Terms]]]) -> list[Tensor]:
    gains = [
        [RowGain(s.start, s.end, t.gain_O, t.gain_spans_bias) for s, t in part if t.gain_O is not None]
        for part in terms
    ]
    layers = [
        FrozenLinear(
            member.base.weight,
            None if gain else member.base.bias,  # where rows are multiplied, the bias comes after it
            tuple(LowRank(s.start, s.end, a_RI, b_OR, c) for s, t in part for a_RI, b_OR, c in t.low_rank),
        )
        for member, part, gain in zip(members, terms, gains, strict=True)
    ]
    outputs = lora_linear(x_TI, layers)
    return [
        row_gains(out_TO, member.base.bias, gain) if gain else out_TO
        for member, out_TO, gain in zip(members, outputs, gains, strict=True)
    ]


def _with_input_gains(x_TI: Tensor, terms: list[tuple[Segment, Terms]]) -> Tensor:
    parts, done = [], 0
    for segment, term in terms:
        if term.input_gain_I is not None:
            x_nI = x_TI[segment.start : segment.end]
            parts += [x_TI[done : segment.start], (x_nI * term.input_gain_I).to(x_TI.dtype)]
            done = segment.end
    return torch.cat([*parts, x_TI[done:]]) if parts else x_TI


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


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear | Nf4Linear | Fp8Linear]:
    """Whether it computes W x + b and nothing else: a router that inherits from nn.Linear may give several results."""
    if isinstance(module, Nf4Linear | Fp8Linear):
        return True
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
