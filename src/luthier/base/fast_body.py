"""The base's body as one function of packed rows: embedding, decoder blocks with a backward of their own, last norm.

Shapes: T tokens, D hidden size, L adapted layers.

Chosen once, at load, where the architecture is one of `LAYERS`, and only if its hidden states equal those of the
model's own forward. It serves batches whose slots change the body by low-rank updates without dropout; any other batch
runs through the model's own modules, which stay as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from luthier.engine.live_rows import LiveRows, find_live_rows
from luthier.engine.pack import BASE_SLOT, PackedBatch, PackItem, pack
from luthier.engine.slot import Slot
from luthier.methods.lora.layer import A, B, LoraFactors
from luthier.objectives.language_modelling import frozen_head_gradient
from luthier.ops import cpu_attention
from luthier.ops.block import Block, FrozenNorm, Keep, Projection, Run
from luthier.ops.cached_attention import CachedLayer
from luthier.ops.capability import is_interpreted, kernels_problem
from luthier.ops.flat_attention import Sequences
from luthier.ops.frozen import FrozenLayer
from luthier.ops.low_rank import Factors, SlotFactors, Updates
from luthier.ops.norm import rms_norm, rms_norm_backward_
from luthier.ops.product import forward_product

if TYPE_CHECKING:
    from luthier.base.load import Base
    from luthier.engine.bank import Routing
    from luthier.engine.cache import RowCache

LAYERS = {
    "LlamaDecoderLayer": (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")),
    "MistralDecoderLayer": (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")),
    "Qwen2DecoderLayer": (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")),
    "Phi3DecoderLayer": (("qkv_proj",), ("gate_up_proj",)),
}
"""Decoder layers that the block computes: class -> its layers that read the first norm, and the second."""

TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 3e-2}
"""Most relative difference of the hidden states from the model's own, by dtype. Its norms round float64 to float32."""


class FastBody:
    """The body of `base`, computed by blocks.

    Attributes:
        keeps: What each block keeps for its backward.
    """

    def __init__(self, base: Base) -> None:
        self.base = base
        body = base.model.base_model
        self.layer_names: list[str] = []
        self._final_eps = float(body.norm.variance_epsilon)
        self._final_norm: nn.Module = body.norm
        attention = _attention_of_layers(base)
        self.blocks = [self._block(i, layer, *attention[i]) for i, layer in enumerate(body.layers)]
        self.keeps: list[Keep] = ["all"] * len(self.blocks)
        self._anchor = torch.zeros((), device=base.device, dtype=base.dtype, requires_grad=True)
        self._factors: dict[int, SlotFactors] = {}
        # Kernels read factors in the base's dtype: rounded once a forward rather than at every read.
        self._rounds = base.dtype == torch.bfloat16 and (base.device.type == "cuda" or is_interpreted())

    def recompute(self, num_layers: int) -> None:
        """Let the first `num_layers` blocks keep their input alone, and the others all."""
        self.keeps = ["input" if index < num_layers else "all" for index in range(len(self.blocks))]

    def slots_for(
        self, routing: Routing, unchanged: Collection[int] = ()
    ) -> tuple[list[tuple[int, int]], list[SlotFactors]] | None:
        """Rows and factors of each adapted slot, or None where a slot asks for more than the blocks compute.

        Args:
            unchanged: Slots that have not trained since they were last asked for.
        """
        bounds: list[tuple[int, int]] = []
        slots: list[SlotFactors] = []
        for segment in routing.segments:
            slot = self.base.bank.slots.get(segment.slot) if segment.slot != BASE_SLOT else None
            if slot is None:
                continue
            if not self._serves(slot, is_training=routing.training and torch.is_grad_enabled()):
                return None
            if slot.flat is not None and self._rounds and segment.slot not in unchanged:
                slot.flat.rounded(self.base.dtype)
            bounds.append((segment.start, segment.end))
            slots.append(self._factors_of(slot))
        return bounds, slots

    def forward(
        self,
        batch: PackedBatch,
        bounds: Sequence[tuple[int, int]] = (),
        slots: Sequence[SlotFactors] = (),
        *,
        only_scored: bool = False,
        cache: RowCache | None = None,
    ) -> Tensor:
        """Hidden states [T, D] after the last norm.

        Args:
            bounds, slots: As `slots_for` gives them.
            cache: Where the sequences' keys and values are stored, the forward announced to it; there is no gradient.
            only_scored: Rows that neither a target nor a class reads may hold anything.
        """
        body = self.base.model.base_model
        hidden_1TD = body.embed_tokens(batch.tokens_T[None])
        cos_1TE, sin_1TE = body.rotary_emb(hidden_1TD, position_ids=batch.positions_T[None])
        hidden_TD, cos_TE, sin_TE = hidden_1TD[0], cos_1TE[0], sin_1TE[0]
        live = self._live_rows(batch, only_scored) if cache is None else None
        if live is None:
            is_even = len(set(batch.lengths)) == 1
            sequences = Sequences(batch.lengths, batch.offsets_N1, batch.max_length, is_even)
        else:
            hidden_TD, cos_TE, sin_TE = (part.index_select(0, live.source_U) for part in (hidden_TD, cos_TE, sin_TE))
            bounds = [(live.first_at[start], live.first_at[end]) for start, end in bounds]
            sequences = Sequences(live.lengths, batch.offsets_N1, max(live.lengths), members=live.members)
        updates = Updates(bounds, slots, hidden_TD.shape[0], self.base.device)
        run = Run(updates, sequences, cos_TE, sin_TE)
        for index, (block, keep) in enumerate(zip(self.blocks, self.keeps, strict=True)):
            stored = cache.layer(index) if cache is not None else None
            hidden_TD = block(hidden_TD, self._anchor, replace(run, stored=stored), keep)
        weight_D: Any = self._final_norm.weight
        normal_TD: Tensor = FrozenNorm.apply(hidden_TD, weight_D, self._final_eps)  # type: ignore[no-untyped-call]
        return normal_TD if live is None else normal_TD.index_select(0, live.row_of_T)

    def shares_rows(self, routing: Routing, longest: int) -> bool:
        """Whether rows in common are computed once for sequences of these slots, up to so many tokens."""
        return self._follows((longest,)) and self.slots_for(routing) is not None

    def _follows(self, lengths: tuple[int, ...]) -> bool:
        """Whether the attention can follow shared rows: on a CPU, without windows that cut."""
        windows = {block.window for block in self.blocks}
        return all(cpu_attention.serves(self._anchor, lengths, window) for window in windows)

    def _live_rows(self, batch: PackedBatch, only_scored: bool) -> LiveRows | None:
        """The rows to compute, where the attention can follow them."""
        if not self._follows(batch.lengths):
            return None
        limit = self.base.longrope_limit
        return find_live_rows(
            batch, only_scored=only_scored, class_of=lambda length: int(limit is not None and length > limit)
        )

    def train(
        self, tokens_T: Tensor, positions_T: Tensor, run: Run, targets_T: Tensor, scale_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Forward and backward of next-token prediction at every row, without autograd.

        The factors' gradients of the sum over rows of `scale_T` times the loss add up where their slots keep them.
        Only for slots that change nothing besides the blocks, on a base whose head is plain.

        Args:
            targets_T: int64, the token that each row predicts; any where the scale is 0.
            run: Its rotary tables are filled in here.

        Returns:
            Each row's negative log-likelihood (float32), and whether its likeliest token is the target.
        """
        body = self.base.model.base_model
        hidden_TD = body.embed_tokens(tokens_T)
        cos_1TE, sin_1TE = body.rotary_emb(hidden_TD[None], position_ids=positions_T[None])
        run = replace(run, cos_TE=cos_1TE[0], sin_TE=sin_1TE[0])
        inputs, kepts = [], []
        for block in self.blocks:
            inputs.append(hidden_TD)
            hidden_TD, kept = block.forward(hidden_TD, run)
            kepts.append(kept)
        weight_D: Any = self._final_norm.weight
        normal_TD, inverse_T = rms_norm(hidden_TD, weight_D, self._final_eps)
        nll_T, is_correct_T, grad_TD = frozen_head_gradient(
            normal_TD, self.base.head_weight_VD, self.base.head_bias_V, targets_T
        )
        grad_TD.mul_(scale_T[:, None])
        grad_TD = rms_norm_backward_(grad_TD, hidden_TD, weight_D, inverse_T)
        for index in range(len(self.blocks) - 1, -1, -1):
            grad_TD = self.blocks[index].backward(grad_TD, inputs.pop(), kepts.pop(), run, index > 0)
        return nll_T, is_correct_T

    def reply(self, tokens_P: Tensor, positions_P: Tensor, run: Run, layers: Sequence[CachedLayer]) -> Tensor:
        """Logits [P, V] after one more token of each of P sequences, whose keys and values are stored.

        Only on a base whose head is plain, for slots that leave it so.

        Args:
            run: Its rotary tables and its layer are filled in here.
            layers: Each block's keys and values; the tokens' own are added to them.
        """
        body = self.base.model.base_model
        hidden_PD = body.embed_tokens(tokens_P)
        cos_1PE, sin_1PE = body.rotary_emb(hidden_PD[None], position_ids=positions_P[None])
        run = replace(run, cos_TE=cos_1PE[0], sin_TE=sin_1PE[0])
        for block, layer in zip(self.blocks, layers, strict=True):
            hidden_PD = block.forward(hidden_PD, replace(run, stored=layer))[0]
        weight_D: Any = self._final_norm.weight
        normal_PD, _ = rms_norm(hidden_PD, weight_D, self._final_eps)
        return forward_product(normal_PD, self.base.head_weight_VD, self.base.head_bias_V)

    def _serves(self, slot: Slot, *, is_training: bool) -> bool:
        bank = self.base.bank
        if not set(slot.saved_modules) <= {bank.output_name, bank.input_name}:
            return False
        if is_training and slot.flat is None:
            return False
        return all(
            type(factors) is LoraFactors and factors.start is None and not (is_training and factors.dropout > 0)
            for name, factors in slot.adapters.items()
            if name != bank.output_name
        )

    def _factors_of(self, slot: Slot) -> SlotFactors:
        if slot.index not in self._factors:
            self._factors = {i: f for i, f in self._factors.items() if i in self.base.bank.slots}
            found = [slot.adapters.get(name) for name in self.layer_names]
            self._factors[slot.index] = SlotFactors(
                [
                    self._as_tensors(slot, name, factors) if type(factors) is LoraFactors else None
                    for name, factors in zip(self.layer_names, found, strict=True)
                ]
            )
        return self._factors[slot.index]

    def _as_tensors(self, slot: Slot, layer: str, factors: LoraFactors) -> Factors:
        a_RI, b_OR = factors.a_RI, factors.b_OR
        values = a_RI.detach(), b_OR.detach()
        if self._rounds and slot.flat is not None:
            flat_Z = slot.flat.rounded(self.base.dtype)
            values = slot.flat.view(flat_Z, f"{layer}.{A}"), slot.flat.view(flat_Z, f"{layer}.{B}")
        elif self._rounds:
            values = values[0].to(self.base.dtype), values[1].to(self.base.dtype)
        return Factors(*values, a_RI.grad, b_OR.grad, factors.scale)

    # -- building

    def _block(self, index: int, layer: Any, scale: float, window: int | None) -> Block:
        inputs, middles = LAYERS[type(layer).__name__]
        attention = layer.self_attn
        parent = f"{self.base.bank.body_name}.layers.{index}"
        heads, size = self.base.config.num_attention_heads, attention.head_dim
        return Block(
            norm1_D=layer.input_layernorm.weight,
            norm2_D=layer.post_attention_layernorm.weight,
            eps1=float(layer.input_layernorm.variance_epsilon),
            eps2=float(layer.post_attention_layernorm.variance_epsilon),
            qkv=tuple(self._projection(f"{parent}.self_attn.{name}") for name in inputs),
            out=self._projection(f"{parent}.self_attn.o_proj"),
            gate_up=tuple(self._projection(f"{parent}.mlp.{name}") for name in middles),
            down=self._projection(f"{parent}.mlp.down_proj"),
            num_heads=heads,
            num_key_heads=self.base.config.num_key_value_heads,
            head_size=size,
            scale=scale,
            window=window,
        )

    def _projection(self, name: str) -> Projection:
        linear = self.base.bank.linears[name]
        self.layer_names.append(name)
        return Projection(FrozenLayer(linear), len(self.layer_names) - 1)


def build_fast_body(base: Base) -> tuple[FastBody | None, str]:
    """The fast body, or None and why there is none. Call once the base is known to run packed."""
    from luthier.base.probe import probe_examples, rounding

    problem = _obstacle(base)
    if problem:
        return None, problem
    fast = FastBody(base)
    distance = _distance(base, fast)
    tolerance = TOLERANCES[base.dtype]
    if base.dtype == torch.bfloat16:
        tolerance = max(tolerance, 3 * rounding(base, probe_examples(base)[1]))
    if not distance <= tolerance:
        return None, f"its hidden states differ from the model's own by {distance:.1e}, more than {tolerance:.0e}"
    return fast, ""


def _obstacle(base: Base) -> str:
    if not base.is_packed:
        return "the base runs padded"
    if base.dtype not in TOLERANCES:
        return f"there are no blocks in {base.dtype}"
    if base.device.type == "cuda" and kernels_problem():
        return kernels_problem()
    body = base.model.base_model
    layers = getattr(body, "layers", None)
    kinds = {type(layer).__name__ for layer in layers} if isinstance(layers, nn.ModuleList) else set()
    if not kinds or not kinds <= set(LAYERS):
        return f"its decoder layers are none that the blocks know ({', '.join(sorted(kinds)) or 'none found'})"
    assert isinstance(layers, nn.ModuleList)
    if any(layer.mlp.__dict__.get("_forward_hooks") for layer in layers):
        return "its layers carry hooks"
    if getattr(base.config, "hidden_act", "") != "silu":
        return f"its activation is {getattr(base.config, 'hidden_act', None)}"
    if not all(hasattr(body, part) for part in ("embed_tokens", "rotary_emb", "norm")):
        return "its body is built otherwise"
    return ""


def _attention_of_layers(base: Base) -> list[tuple[float, int | None]]:
    """Scale and window of each layer, read off the calls that its own attention makes."""
    from luthier.base import attention

    calls: list[tuple[float, int | None]] = []
    original = attention.packed_attention

    def noted(module: nn.Module, query: Tensor, *others: Any, **named: Any) -> Any:
        scaling = named.get("scaling")
        calls.append((scaling if scaling is not None else query.shape[-1] ** -0.5, named.get("sliding_window")))
        return original(module, query, *others, **named)

    attention.AttentionInterface.register(attention.PACKED_ATTENTION, noted)
    try:
        with torch.no_grad():
            base.forward(_probe_batch(base))
    finally:
        attention.AttentionInterface.register(attention.PACKED_ATTENTION, original)
    return calls


@torch.no_grad()
def _distance(base: Base, fast: FastBody) -> float:
    batch = _probe_batch(base)
    expected = base.forward(batch).hidden_TD.double()
    base.classify_rotary(batch, None)
    found = fast.forward(batch).double()
    return float((found - expected).norm() / expected.norm())


def _probe_batch(base: Base) -> PackedBatch:
    from luthier.base.probe import probe_examples

    return pack([PackItem(example, BASE_SLOT) for example in probe_examples(base)], base.device)
