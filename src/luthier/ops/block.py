"""One decoder block (norm, attention, norm, SwiGLU) with its own backward, over packed rows of many slots.

Shapes: T tokens, D hidden size, H query heads, K key heads, E head size, F inner size of the feed-forward part.

    n1 = norm(h),  q k v = rotated W_qkv n1,  m = h + W_o attend(q, k, v)
    n2 = norm(m),  gate up = W_gu n2,         out = m + W_down (silu(gate) * up)

with every W a frozen layer plus its slots' low-rank updates. Autograd would keep each intermediate; here the backward
makes the norms' and SwiGLU's outputs again from what it reads anyway, works in the memory of what it no longer needs,
and adds the factors' gradients where the slots keep them. `base/fast_body.py` holds it against transformers' block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from luthier.ops.cached_attention import StoredLayer
from luthier.ops.flat_attention import Sequences, attend, attend_backward
from luthier.ops.frozen import FrozenLayer
from luthier.ops.low_rank import Updates, down, down_backward, up_, up_backward_
from luthier.ops.norm import rms_norm, rms_norm_backward_
from luthier.ops.rotary import copy_heads_, rotate_
from luthier.ops.swiglu import swiglu, swiglu_backward_

Keep = Literal["all", "attention", "input"]
"""What a block keeps for its backward: all that its backward cannot make cheaply (11.3 hidden sizes a token on Phi-3),
all but gate and up (6), or its input alone (1)."""


@dataclass(frozen=True, slots=True)
class Projection:
    """A frozen layer and its number among the slots' factors."""

    frozen: FrozenLayer
    layer: int


@dataclass(frozen=True, slots=True)
class Run:
    """What all blocks of one forward share.

    Attributes:
        updates: The slots' low-rank updates.
        sequences: Bounds of the packed sequences.
        cos_TE, sin_TE: Rotary tables of each token.
        stored: What the sequences have stored in this layer, where they go on from there; then there is no backward.
    """

    updates: Updates
    sequences: Sequences
    cos_TE: Tensor
    sin_TE: Tensor
    stored: StoredLayer | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """The frozen parts of one decoder layer.

    Attributes:
        qkv: One projection to query, key and value together, or three.
        gate_up: One projection to gate and up together, or two.
        window: A token sees itself and at most `window - 1` tokens before it; None for no bound.
    """

    norm1_D: Tensor
    norm2_D: Tensor
    eps1: float
    eps2: float
    qkv: tuple[Projection, ...]
    out: Projection
    gate_up: tuple[Projection, ...]
    down: Projection
    num_heads: int
    num_key_heads: int
    head_size: int
    scale: float
    window: int | None

    def __call__(self, hidden_TD: Tensor, anchor: Tensor, run: Run, keep: Keep = "all") -> Tensor:
        """The block's output.

        Args:
            anchor: Requires a gradient, so that a block whose input does not is still trained.
            keep: What is kept for the backward.
        """
        if not torch.is_grad_enabled():
            return self.forward(hidden_TD, run)[0]
        out_TD: Tensor = _BlockNode.apply(hidden_TD, anchor, self, run, keep)  # type: ignore[no-untyped-call]
        return out_TD

    def forward(self, hidden_TD: Tensor, run: Run, *, again: bool = False) -> tuple[Tensor, dict[str, Any]]:
        """The output and what a backward needs. `again`: only the latter (the last base product is left out)."""
        kept: dict[str, Any] = {}
        normal_TD, kept["inverse1"] = rms_norm(hidden_TD, self.norm1_D, self.eps1)
        kept["qkv"], kept["low_qkv"] = _project(normal_TD, self.qkv, run)
        del normal_TD
        query, key, value = self._heads(kept["qkv"])
        if len(kept["qkv"]) == 1:  # query and key heads stand next to one another
            both = kept["qkv"][0][:, : (self.num_heads + self.num_key_heads) * self.head_size]
            both = both.unflatten(1, (-1, self.head_size))
            rotate_(both, both, run.cos_TE, run.sin_TE)
        else:
            for part in (query, key):
                rotate_(part, part, run.cos_TE, run.sin_TE)
        if run.stored is None:
            out_THE, kept["attention"] = attend(query, key, value, run.sequences, self.scale, self.window)
        else:
            out_THE = run.stored.attend(query, key, value, self.scale, self.window)
        kept["out"] = out_THE
        (kept["middle"],), (kept["low_out"],) = _project(out_THE.flatten(1), (self.out,), run, residual=hidden_TD)
        self._feed_in(kept, run)
        active_TF = swiglu(*self._gate_up(kept["gate_up"]))
        if again:
            acts = run.updates.acts_on(self.down.layer)
            kept["low_down"] = down(active_TF, self.down.layer, run.updates) if acts else None
            return hidden_TD, kept
        (out_TD,), (kept["low_down"],) = _project(active_TF, (self.down,), run, residual=kept["middle"])
        return out_TD, kept

    def backward(self, grad_TD: Tensor, hidden_TD: Tensor, kept: dict[str, Any], run: Run, wants_input: bool) -> Tensor:
        """The input's gradient, in the memory of `grad_TD`; the kept tensors are used up."""
        if "gate_up" not in kept:
            self._feed_in(kept, run)
        active_TF, shorts = _project_backward([grad_TD], [kept.pop("low_down")], (self.down,), run)
        gate_up = kept.pop("gate_up")
        swiglu_backward_(active_TF, *self._gate_up(gate_up))
        _factors_backward(active_TF, shorts, (self.down,), run)
        del active_TF
        normal_TD, shorts = _project_backward(gate_up, kept.pop("low_gate_up"), self.gate_up, run)
        del gate_up
        grad_TD = rms_norm_backward_(normal_TD, kept.pop("middle"), self.norm2_D, kept.pop("inverse2"), grad_TD)
        _factors_backward(normal_TD, shorts, self.gate_up, run)
        out_THE = kept.pop("out")
        grad_out_TI, shorts = _project_backward([grad_TD], [kept.pop("low_out")], (self.out,), run)
        _factors_backward(out_THE.flatten(1), shorts, (self.out,), run)
        qkv = self._attention_backward(grad_out_TI.view_as(out_THE), out_THE, kept, run)
        del out_THE, grad_out_TI
        if not wants_input:
            _, shorts = _project_backward(qkv, kept.pop("low_qkv"), self.qkv, run, wants_input=False)
            normal_TD, _ = rms_norm(hidden_TD, self.norm1_D, self.eps1)
        else:
            normal_TD, shorts = _project_backward(qkv, kept.pop("low_qkv"), self.qkv, run)
            grad_TD = rms_norm_backward_(normal_TD, hidden_TD, self.norm1_D, kept.pop("inverse1"), grad_TD)
        _factors_backward(normal_TD, shorts, self.qkv, run)
        return grad_TD

    def _feed_in(self, kept: dict[str, Any], run: Run) -> None:
        normal_TD, kept["inverse2"] = rms_norm(kept["middle"], self.norm2_D, self.eps2)
        kept["gate_up"], kept["low_gate_up"] = _project(normal_TD, self.gate_up, run)

    def _attention_backward(self, grad_THE: Tensor, out_THE: Tensor, kept: dict[str, Any], run: Run) -> list[Tensor]:
        qkv = kept.pop("qkv")
        query, key, value = self._heads(qkv)
        dq, dk, dv = attend_backward(
            grad_THE, query, key, value, out_THE, kept.pop("attention"), run.sequences, self.scale, self.window
        )
        if len(qkv) == 1:  # the forward's own memory takes the gradients
            rotate_(dq, query, run.cos_TE, run.sin_TE, back=True)
            rotate_(dk, key, run.cos_TE, run.sin_TE, back=True)
            copy_heads_(dv, value)  # torch's own copy between these strides takes three times as long on a GPU
            return list(qkv)
        for part in (dq, dk):
            rotate_(part, part, run.cos_TE, run.sin_TE, back=True)
        return [part.flatten(1) for part in (dq, dk, dv)]

    def _heads(self, qkv: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        if len(qkv) == 1:
            sizes = [self.num_heads * self.head_size, *[self.num_key_heads * self.head_size] * 2]
            qkv = qkv[0].split(sizes, dim=1)
        query, key, value = (part.unflatten(1, (-1, self.head_size)) for part in qkv)
        return query, key, value

    def _gate_up(self, gate_up: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        gate, up = gate_up[0].chunk(2, dim=1) if len(gate_up) == 1 else gate_up
        return gate, up


class _BlockNode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, anchor: Tensor, block: Block, run: Run, keep: Keep) -> Tensor:
        out_TD, kept = block.forward(hidden_TD, run)
        if keep == "input":
            kept = {}
        elif keep == "attention":
            for name in ("gate_up", "low_gate_up", "inverse2"):
                del kept[name]
        tensors: list[Tensor] = [hidden_TD]
        ctx.layout = {name: _pack(value, tensors) for name, value in kept.items()}
        ctx.save_for_backward(*tensors)
        ctx.block, ctx.run = block, run
        return out_TD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = list(ctx.saved_tensors)
        kept = {name: _unpack(value, tensors) for name, value in ctx.layout.items()}
        hidden_TD = tensors[0]
        del tensors
        if not kept:
            kept = ctx.block.forward(hidden_TD, ctx.run, again=True)[1]
        # In place: the gradient comes from the next block or the final norm, which keep no hold of it.
        wants_input = ctx.needs_input_grad[0]
        grad_TD = ctx.block.backward(grads[0].contiguous(), hidden_TD, kept, ctx.run, wants_input)
        return grad_TD if wants_input else None, None, None, None, None


class FrozenNorm(torch.autograd.Function):
    """`rms_norm` under autograd, for the norm after the last block."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        out_TD, inverse_T = rms_norm(x_TD, weight_D, eps)
        ctx.save_for_backward(x_TD, weight_D, inverse_T)
        return out_TD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_D, inverse_T = ctx.saved_tensors
        return rms_norm_backward_(grads[0].clone(), x_TD, weight_D, inverse_T), None, None


class _At:
    """Where a tensor stands in the list that autograd saves."""

    def __init__(self, index: int) -> None:
        self.index = index


def _pack(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value)
        return _At(len(tensors) - 1)
    return [_pack(each, tensors) for each in value] if isinstance(value, list | tuple) else value


def _unpack(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, _At):
        return tensors[value.index]
    return [_unpack(each, tensors) for each in value] if isinstance(value, list) else value


def _project(
    x_TI: Tensor, projections: tuple[Projection, ...], run: Run, residual: Tensor | None = None
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Each projection's output with its updates (and the residual), and its low-rank middle."""
    outputs: list[Tensor] = []
    lows: list[Tensor | None] = []
    for projection in projections:
        y_TO = projection.frozen.forward(x_TI)
        low_TR = None
        if run.updates.acts_on(projection.layer):
            low_TR = down(x_TI, projection.layer, run.updates)
        if low_TR is not None or residual is not None:
            up_(y_TO, low_TR, projection.layer, run.updates, residual)
        outputs.append(y_TO)
        lows.append(low_TR)
    return outputs, lows


def _project_backward(
    grads: Sequence[Tensor],
    lows: Sequence[Tensor | None],
    projections: tuple[Projection, ...],
    run: Run,
    *,
    wants_input: bool = True,
) -> tuple[Tensor, list[Tensor | None]]:
    """The common input's gradient, and the gradients of the low-rank middles; adds the gradients of every B."""
    grad_x_TI: Tensor | None = None
    shorts: list[Tensor | None] = []
    for grad_TO, low_TR, projection in zip(grads, lows, projections, strict=True):
        if wants_input:
            grad_x_TI = projection.frozen.backward(grad_TO, grad_x_TI)
        shorts.append(None if low_TR is None else down_backward(grad_TO, low_TR, projection.layer, run.updates))
    if grad_x_TI is None:
        return grads[0], shorts
    for short_TR, projection in zip(shorts, projections, strict=True):
        if short_TR is not None:
            up_backward_(grad_x_TI, None, short_TR, projection.layer, run.updates)
    return grad_x_TI, shorts


def _factors_backward(
    x_TI: Tensor, shorts: Sequence[Tensor | None], projections: tuple[Projection, ...], run: Run
) -> None:
    """Adds the gradients of every A, once the common input is there."""
    for short_TR, projection in zip(shorts, projections, strict=True):
        if short_TR is not None:
            up_backward_(None, x_TI, short_TR, projection.layer, run.updates)
