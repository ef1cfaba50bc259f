"""The resident base: loaded once, frozen, never written, run packed where a probe shows that it may.

Shapes: T tokens, N sequences, L longest sequence, P rows kept for the output layer, D hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from luthier.base.attention import PACKED_ATTENTION
from luthier.base.encoder import Encoder
from luthier.base.fast_body import FastBody, build_fast_body
from luthier.base.fp8 import Fp8Linear, settle_fp8
from luthier.base.identity import BaseKey, base_revision, weights_identity
from luthier.base.model import load_model
from luthier.base.nf4 import nf4_weights
from luthier.base.rope import PerSequenceRotary, wrap_longrope
from luthier.data.encoders import num_positions
from luthier.engine.bank import Bank, Routing
from luthier.engine.pack import PackedBatch, Segment
from luthier.errors import ModelError
from luthier.ops.fp8 import Fp8Weight

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Forward:
    """What a forward gives: hidden_TD for every token, and logits_PV where the base's own head had to compute them."""

    hidden_TD: Tensor
    logits_PV: Tensor | None = None


Outputs = tuple[Tensor, ...]
"""What `Forward` is made of."""


def at_once(run: Callable[[], Outputs]) -> Outputs:
    """Run it."""
    return run()


class Base:
    """A frozen base with its bank.

    Attributes:
        model: The causal language model of transformers, or an encoder; wrapped by the bank.
        is_encoder: Whether it reads in both directions and writes nothing.
        bank: The slots.
        device, dtype: Where and how the weights are held; where they are quantized, what is computed in.
        quantization: "nf4" or "fp8" where the linear layers but the output layer are held so, or None.
        fp8_weights: As `nf4_weights`, in fp8.
        nf4_weights: Those layers' weights by name, in the model's order.
        is_packed: Whether sequences run flat; otherwise padded, because the probe failed (`packing_problem` says why).
        head_is_plain: Whether logits are hidden x weight^T of the output layer and nothing else.
        num_sharing: Processes that share the device's memory with this one, itself included.
        num_lead: Positions that stand before every sequence in the padded layout: virtual tokens of an exclusive job.
        fast_body: The body by fast blocks, or None (`fast_body_problem` says why).
        is_sharded: Whether this process holds a part of each weight alone (ZeRO 3), so that none is read but in its own
            layer's forward.
        enter: Runs the model's forward, which it is given; what shares weights out learns so that one begins.
    """

    num_lead = 0
    is_sharded = False

    def __init__(
        self,
        model: Any,
        folder: Path | None = None,
        *,
        use_reference: bool = False,
        wants_fast_body: bool | None = None,
    ) -> None:
        from luthier.base.probe import probe

        if model.base_model is model:
            raise ModelError(
                f"{type(model).__name__} does not keep its body apart from its output layer",
                "an architecture whose body gives hidden states, as nearly all in transformers do",
            )
        model.requires_grad_(False)
        model.eval()
        self.model = model
        self.folder = folder
        self.config: Any = model.config
        self.is_encoder = isinstance(model, Encoder)
        self._without_cache = {} if self.is_encoder else {"use_cache": False}
        embedding = self.model.get_input_embeddings().weight
        self.device: torch.device = embedding.device
        self.dtype: torch.dtype = embedding.dtype
        self.vocabulary_size, self.hidden_size = embedding.shape
        self._attention = self.config._attn_implementation
        self._rotaries: list[PerSequenceRotary] = wrap_longrope(model)
        self.nf4_weights = nf4_weights(model)
        is_fp8 = any(isinstance(module, Fp8Linear) for module in model.modules())
        self.fp8_weights: dict[str, Fp8Weight] = {}
        self.quantization = "nf4" if self.nf4_weights else "fp8" if is_fp8 else None
        self.bank = self._make_bank(use_reference)
        self._output_layer: nn.Module | None = self.model.get_output_embeddings()
        self.is_packed = True
        self.is_checkpointing = False
        self.num_sharing = 1
        self.enter: Callable[[Callable[[], Outputs]], Outputs] = at_once
        self.head_is_plain = False
        self.packing_problem = ""
        self.fast_body: FastBody | None = None
        self.fast_body_problem = "the model's own modules were asked for"
        findings = probe(self)
        self.is_packed, self.packing_problem = not findings.problem, findings.problem
        self.head_is_plain = findings.head_is_plain
        if findings.problem:
            logger.warning("this base runs padded: %s", findings.problem)
        if not use_reference:
            for names in findings.shared_inputs:
                self.bank.group(names)
        if use_reference:
            self.fast_body_problem = "the plain reference was asked for"
        elif self.dtype != torch.float64 if wants_fast_body is None else wants_fast_body:
            self.fast_body, self.fast_body_problem = build_fast_body(self)
        self.bank.keeps_flat = self.fast_body is not None
        self.config._attn_implementation = self._attention  # the probes' forwards do not restore it
        self.fp8_weights = settle_fp8(model)

    def _make_bank(self, use_reference: bool) -> Bank:
        return Bank(self.model, use_reference=use_reference)

    def frozen_parameters(self) -> list[nn.Parameter]:
        """The base's own weights, without those in NF4. Slots' parameters are no children of the model."""
        return list(self.model.parameters())

    @property
    def num_parameters(self) -> int:
        """Of the weights as they were before any quantization."""
        plain = sum(p.numel() for p in self.frozen_parameters())
        in_nf4 = sum(weight.num_values for weight in self.nf4_weights.values())
        return plain + in_nf4 + sum(weight.num_values for weight in self.fp8_weights.values())

    @property
    def num_bytes(self) -> int:
        """Resident bytes of the weights."""
        plain = sum(p.numel() * p.element_size() for p in self.frozen_parameters())
        return plain + self.nf4_bytes + sum(weight.num_bytes for weight in self.fp8_weights.values())

    @property
    def nf4_bytes(self) -> int:
        """Of the layers in NF4, their scales and codes included."""
        return sum(weight.num_bytes for weight in self.nf4_weights.values())

    @property
    def dense_bytes(self) -> int:
        """Of the largest layer in NF4 once dequantized: what a product takes for a moment."""
        return max((w.num_values for w in self.nf4_weights.values()), default=0) * self.dtype.itemsize

    def key(self) -> BaseKey | None:
        """Which base this is; None for one that was never on disk.

        Raises:
            ModelError: where its files cannot be read any more.
        """
        if self.folder is None:
            return None
        dtype = str(self.dtype).removeprefix("torch.")
        return BaseKey(weights_identity(self.folder), base_revision(self.folder), self.quantization, dtype)

    @property
    def num_layers(self) -> int:
        return int(self.config.get_text_config().num_hidden_layers)

    @property
    def max_positions(self) -> int | None:
        if self.is_encoder:
            return num_positions(self.config.to_dict())
        return getattr(self.config, "max_position_embeddings", None)

    # -- running

    def routing(self, batch: PackedBatch, *, training: bool) -> Routing:
        """How this batch's rows lie in the layout that the base runs in."""
        if self.is_packed:
            segments, row_lengths = batch.segments, batch.lengths
        else:
            row_lengths = (batch.max_length,) * batch.num_sequences
            segments = _sequence_segments(batch.slots, batch.max_length)
        return Routing(segments, batch.target_segments, batch.draws, row_lengths, training)

    def forward(
        self, batch: PackedBatch, *, keep: Tensor | None = None, cache: Any = None, only_scored: bool = False
    ) -> Forward:
        """Run the batch. Call inside `bank.routed(...)`.

        Args:
            only_scored: The caller reads hidden states at the batch's targets and classes alone; the others may hold
                anything.
            keep: int64 [P], flat token indices whose logits the model's own head must compute where it is not plain.
            cache: The sampler's key-value cache (packed bases only).
        """
        self.classify_rotary(batch, cache)
        wants_logits = keep is not None and not self.head_is_plain
        if self.fast_body is not None and self.is_packed and not wants_logits and self._body_takes(cache):
            found = self.fast_body.slots_for(self.bank.routing)
            if found is not None:
                return Forward(self.fast_body.forward(batch, *found, only_scored=only_scored, cache=cache), None)
        inputs = self._packed_inputs(batch, cache) if self.is_packed else self._padded_inputs(batch)
        at_T = None if self.is_packed else self._padded_index(batch)
        # Not restored afterwards: a backward that recomputes blocks must meet the same attention.
        self.config._attn_implementation = PACKED_ATTENTION if self.is_packed else self._attention

        def run() -> Outputs:
            if wants_logits:
                assert keep is not None
                return self._forward_with_head(inputs, keep, at_T, batch)
            hidden = self.model.base_model(**inputs, **self._without_cache).last_hidden_state
            return (self._flat(hidden, at_T),)

        return Forward(*self.enter(run))

    def reads_at(self, batch: PackedBatch) -> Tensor:
        """int64 [C], flat: where heads read what the batch has classes for.

        A causal model has seen a whole sequence at its last token, where the class stands in the batch; an encoder's
        heads on sequences read the first, as transformers' do.
        """
        if not self.is_encoder:
            return batch.class_at_C
        first_C = batch.offsets_N1.long()[batch.class_rows_C]
        parts = []
        for segment in batch.class_segments:
            slot = self.bank.slots.get(segment.slot)
            reads_tokens = slot is not None and slot.spec.head == "token"
            parts.append((batch.class_at_C if reads_tokens else first_C)[segment.start : segment.end])
        return torch.cat(parts)

    def _body_takes(self, cache: Any) -> bool:
        """Whether the fast body runs forwards over this cache."""
        return cache is None or self.device.type == "cuda"

    def shares_rows(self, slot: int, longest: int) -> bool:
        """Whether a forward computes once what sequences of the slot, up to so many tokens, have in common at first."""
        if self.fast_body is None or not self.is_packed or not self.head_is_plain:
            return False
        return self.fast_body.shares_rows(Routing((Segment(slot, 0, 1),)), longest)

    def _forward_with_head(
        self, inputs: dict[str, Any], keep_P: Tensor, at_T: Tensor | None, batch: PackedBatch
    ) -> Outputs:
        captured: list[Tensor] = []
        hook = self.model.base_model.register_forward_hook(lambda _m, _i, out: captured.append(out.last_hidden_state))
        try:
            if at_T is None:
                logits_PV = self.model(**inputs, use_cache=False, logits_to_keep=keep_P).logits[0]
            else:
                # Rows of a padded batch keep different positions: keep every position that any row needs.
                length = batch.max_length
                padded_P = at_T[keep_P]
                columns, column_P = torch.unique(padded_P % length, return_inverse=True)
                # The output layer meets every row's kept positions, so its rows are not the P that routing knows.
                segments = _sequence_segments(batch.slots, len(columns))
                with self.bank.routed(replace(self.bank.routing, head_segments=segments)):
                    logits = self.model(**inputs, use_cache=False, logits_to_keep=columns + self.num_lead).logits
                logits_PV = logits[padded_P // length, column_P]
        finally:
            hook.remove()
        return self._flat(captured[0], at_T), logits_PV

    def logits(self, hidden_PD: Tensor, segments: tuple[Segment, ...]) -> Tensor:
        """Logits [P, V] of hidden states by the output layer, each row with its own slot's changes to it.

        Only where `head_is_plain`; otherwise `forward(keep=...)` gives the logits.
        """
        if not self.head_is_plain:
            raise ValueError("this base's head is not a plain linear layer: ask forward() for its logits")
        routing = Routing(segments=(), head_segments=segments)
        with self.bank.routed(routing):
            return self.model.get_output_embeddings()(hidden_PD)

    @property
    def head_weight_VD(self) -> Tensor:
        """The output layer's frozen weight."""
        return self.model.get_output_embeddings().weight

    @property
    def head_bias_V(self) -> Tensor | None:
        return getattr(self.model.get_output_embeddings(), "bias", None)

    # -- layouts

    def _packed_inputs(self, batch: PackedBatch, cache: Any) -> dict[str, Any]:
        positions_T = batch.positions_T
        if isinstance(self.model, Encoder):
            positions_T = self.model.position_ids(batch.tokens_T, positions_T)
        inputs = {
            "input_ids": batch.tokens_T[None],
            "position_ids": positions_T[None],
            "cu_seq_lens_q": batch.offsets_N1,
            "cu_seq_lens_k": batch.offsets_N1,
            "max_length_q": batch.max_length,
            "max_length_k": batch.max_length,
        }
        return inputs if cache is None else inputs | {"luthier_cache": cache}

    def _padded_inputs(self, batch: PackedBatch) -> dict[str, Any]:
        length, num_rows = batch.max_length, batch.num_sequences
        at_T = self._padded_index(batch)
        pad = self.config.pad_token_id if getattr(self.config, "pad_token_id", None) is not None else 0
        tokens = torch.full((num_rows * length,), pad, dtype=torch.int64, device=self.device)
        tokens[at_T] = batch.tokens_T
        mask = torch.zeros(num_rows * length, dtype=torch.int64, device=self.device)
        mask[at_T] = 1
        return {"input_ids": tokens.view(num_rows, length), "attention_mask": mask.view(num_rows, length)}

    def _padded_index(self, batch: PackedBatch) -> Tensor:
        lengths = torch.tensor(batch.lengths, device=self.device)
        rows_T = torch.arange(batch.num_sequences, device=self.device).repeat_interleave(lengths)
        return rows_T * batch.max_length + batch.positions_T

    def _flat(self, hidden: Tensor, at_T: Tensor | None) -> Tensor:
        return hidden[0] if at_T is None else hidden[:, self.num_lead :].flatten(0, 1)[at_T]

    def classify_rotary(self, batch: PackedBatch, cache: Any) -> None:
        """Choose LongRoPE's factors for each sequence of the next forward."""
        for rotary in self._rotaries:
            totals = torch.tensor(cache.lengths_after(batch) if cache is not None else batch.lengths)
            is_long_N = totals > rotary.short_positions
            counts = torch.tensor(batch.lengths)
            if self.is_packed:
                rotary.is_long_BL = is_long_N.repeat_interleave(counts)[None].to(self.device)
            else:
                rotary.is_long_BL = is_long_N[:, None].expand(-1, batch.max_length).to(self.device)

    def as_transformers(self) -> Any:
        """The model with its own attention and rotary choice, for a forward that does not come through this class."""
        self.config._attn_implementation = self._attention
        for rotary in self._rotaries:
            rotary.is_long_BL = None
        return self.model

    @property
    def longrope_limit(self) -> int | None:
        """Most positions of a sequence under LongRoPE's short factors, or None without LongRoPE."""
        return self._rotaries[0].short_positions if self._rotaries else None

    def set_checkpointing(self, enabled: bool, num_layers: int | None = None) -> None:
        """Recompute blocks' activations in the backward instead of keeping them.

        Args:
            num_layers: How many of the blocks; None for all. Only the fast body takes fewer.
        """
        self.is_checkpointing = enabled
        if self.fast_body is not None:
            self.fast_body.recompute((num_layers if num_layers is not None else self.num_layers) if enabled else 0)
        with warnings.catch_warnings():
            # transformers 5.20 renames these; the old names serve every version from 5.17 on.
            warnings.simplefilter("ignore", FutureWarning)
            if enabled:
                self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            elif self.model.is_gradient_checkpointing:
                self.model.gradient_checkpointing_disable()
        for module in self.model.modules():
            if hasattr(module, "gradient_checkpointing"):
                # transformers recomputes only in modules in training mode; their children stay in evaluation mode.
                module.training = enabled


def load_base(
    folder: Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    quantization: str | None = None,
    quantized_from: str | torch.dtype | None = None,
    use_reference: bool = False,
    wants_fast_body: bool | None = None,
) -> Base:
    """Load a causal language model, or an encoder, from a folder of safetensors.

    Args:
        dtype: Of the weights; where they are quantized, of the rest and of the products.
        quantization: "nf4" to hold the linear layers but the output layer in NF4, as QLoRA does; "fp8" to hold them
            in e4m3.
        quantized_from: The type that weights are rounded to before they are quantized; None for `dtype`. With another
            it gives the weights that were trained over in that type, computed with in this one.
        use_reference: Compute everything by the plain paths.
        wants_fast_body: Run the body by its fast blocks where a probe allows. By default in all but float64, which is
            for comparisons with transformers, whose norms round it to float32.

    Raises:
        ModelError: when the folder holds no such model.
        RecipeError: for NF4 without bitsandbytes.
    """
    model = load_model(folder, device=device, dtype=dtype, quantization=quantization, quantized_from=quantized_from)
    return Base(model, Path(folder), use_reference=use_reference, wants_fast_body=wants_fast_body)


def _sequence_segments(slots: tuple[int, ...], rows_each: int) -> tuple[Segment, ...]:
    segments: list[Segment] = []
    for index, slot in enumerate(slots):
        start, end = index * rows_each, (index + 1) * rows_each
        if segments and segments[-1].slot == slot:
            start = segments.pop().start
        segments.append(Segment(slot, start, end))
    return tuple(segments)
