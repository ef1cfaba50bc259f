"""What a base turns out to be when it is loaded: may it run packed, is its head plain, which layers share an input.

A packed forward is held against separate ones on sequences longer than any sliding window, and the packed attention
must have been called once a layer. An architecture that shifts positions, keeps its own attention or leaks state
between neighbours fails here, and runs padded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.engine.pack import BASE_SLOT, PackItem, pack
from luthier.types import Example

if TYPE_CHECKING:
    from luthier.base.load import Base

LONGEST_WINDOW = 512
"""A window past this many tokens is probed at a shorter length, for the time it would take: the window's arithmetic is
the same code at any size."""


@dataclass(frozen=True, slots=True)
class Findings:
    """Attributes:
    problem: Why packed running is out, or an empty string.
    head_is_plain: Whether logits are hidden x output weight^T (+ bias) and nothing else.
    shared_inputs: Groups of linear layers that read one and the same tensor.
    """

    problem: str
    head_is_plain: bool
    shared_inputs: tuple[tuple[str, ...], ...]


@torch.no_grad()
def probe(base: Base) -> Findings:
    """Run the base on a few random sequences, packed and apart."""
    examples = probe_examples(base)
    apart = [_hidden(base, example) for example in examples]
    problem = _packing_problem(base, examples, apart)
    return Findings(problem, _head_is_plain(base, examples[0], apart[0]), _shared_inputs(base, examples[0]))


def probe_examples(base: Base) -> list[Example]:
    """Random sequences longer than a short window and on both sides of a short LongRoPE limit."""
    window = getattr(base.config, "sliding_window", None) or 0
    lengths = [5, 17, window + 9 if 0 < window <= LONGEST_WINDOW else 33]
    limit = base.longrope_limit
    if limit is not None and limit <= LONGEST_WINDOW:
        lengths.append(limit + 7)  # one sequence of LongRoPE's long class beside short ones
    most = base.max_positions if base.is_encoder else None  # past it, tables of learned positions end
    random = np.random.default_rng(0)
    top = min(base.vocabulary_size, 32_000)
    sizes = [min(n, most or n) for n in lengths]
    return [Example(random.integers(0, top, size=n).astype(np.int32), np.zeros(n, dtype=np.float32)) for n in sizes]


def _hidden(base: Base, example: Example) -> Tensor:
    """A sequence's hidden states by the model's own attention."""
    return _states(base, _ids(base, example))[0]


def _states(base: Base, ids_NL: Tensor) -> Tensor:
    without_cache = {} if base.is_encoder else {"use_cache": False}
    states: Tensor = base.as_transformers().base_model(input_ids=ids_NL, **without_cache).last_hidden_state
    return states


def _ids(base: Base, example: Example) -> Tensor:
    return torch.from_numpy(example.tokens.astype(np.int64))[None].to(base.device)


def _packing_problem(base: Base, examples: list[Example], apart: list[Tensor]) -> str:
    from luthier.base import attention

    calls = 0
    original = attention.packed_attention

    def counted(*args: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(*args, **named)

    batch = pack([PackItem(example, BASE_SLOT) for example in examples], base.device)
    attention.AttentionInterface.register(attention.PACKED_ATTENTION, counted)
    try:
        packed = base.forward(batch).hidden_TD
    except Exception as error:  # any failure of a foreign architecture means the same: do not pack it
        return f"its packed forward fails ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
    finally:
        attention.AttentionInterface.register(attention.PACKED_ATTENTION, original)
    num_layers = base.config.get_text_config().num_hidden_layers
    if calls != num_layers:
        return f"its attention was called {calls} times for {num_layers} layers"
    expected = torch.cat(apart).double()
    difference = (packed.double() - expected).norm() / expected.norm()
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(base.dtype) or max(3e-2, 3 * rounding(base, examples[1]))
    if not difference < tolerance:
        return f"packed hidden states differ from separate ones by {difference:.1e} (relative; allowed {tolerance:.0e})"
    return ""


@torch.no_grad()
def rounding(base: Base, example: Example) -> float:
    """How far hidden states move (relative 2-norm) when nothing but the shape of the products changes.

    In 16 bits that differs much from model to model: a few percent on random weights of many layers.
    """
    ids = _ids(base, example)
    alone, among = (_states(base, ids.repeat(count, 1))[0].double() for count in (1, 5))
    return float((alone - among).norm() / alone.norm())


def _head_is_plain(base: Base, example: Example, hidden_LD: Tensor) -> bool:
    head = base.model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.in_features != hidden_LD.shape[-1]:
        return False
    logits_LV = base.as_transformers()(input_ids=_ids(base, example), use_cache=False).logits[0]
    own = F.linear(hidden_LD, head.weight, head.bias)
    return own.shape == logits_LV.shape and torch.allclose(own, logits_LV, rtol=1e-3, atol=1e-3)


def _shared_inputs(base: Base, example: Example) -> tuple[tuple[str, ...], ...]:
    """Neighbouring linear layers of one parent that were called one after another with the same tensor."""
    calls: list[tuple[str, Tensor]] = []
    hooks = [
        module.register_forward_pre_hook(lambda _m, args, name=name: calls.append((name, args[0])))
        for name, module in base.bank.linears.items()
    ]
    try:
        _hidden(base, example)
    finally:
        for hook in hooks:
            hook.remove()
    groups: list[list[tuple[str, Tensor]]] = []
    for name, given in calls:
        parent = name.rpartition(".")[0]
        if groups and groups[-1][-1][1] is given and groups[-1][-1][0].rpartition(".")[0] == parent:
            groups[-1].append((name, given))
        else:
            groups.append([(name, given)])
    names = [tuple(name for name, _ in group) for group in groups]
    once = len({name for group in names for name in group}) == len(calls)
    return tuple(group for group in names if len(group) > 1) if once else ()
