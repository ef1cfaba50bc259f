"""The Triton kernels against plain references in float64: outputs and gradients, on awkward shapes.

They run on a CUDA device, or on a CPU under Triton's interpreter (TRITON_INTERPRET=1); without either they are skipped.

Shapes: T rows, C columns, R rank, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from luthier.ops import low_rank, norm, rotary, swiglu
from luthier.ops.cached_attention import CachedLayer, attend_cached, attend_cached_reference
from luthier.ops.capability import is_interpreted, kernels_problem
from luthier.ops.low_rank import Factors, SlotFactors, Updates

pytestmark = pytest.mark.skipif(bool(kernels_problem()), reason=f"kernels do not run: {kernels_problem()}")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
"""Most relative 2-norm of a difference from float64: bfloat16 keeps 8 bits of a number, and the outputs are rounded."""
DTYPES = [torch.float32, torch.bfloat16]
DOT_DTYPES = DTYPES[:1] if is_interpreted() else DTYPES
"""The interpreter's matrix product does not know bfloat16."""


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def assert_close(found: Tensor, exact: Tensor, dtype: torch.dtype, times: float = 1.0) -> None:
    assert torch.isfinite(found).all()
    error = (found.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30)
    assert float(error) <= times * BOUNDS[dtype], float(error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 64), (3, 100), (5, 576), (2, 3072)])
@pytest.mark.parametrize("adds", [True, False])
def test_rms_norm(dtype: torch.dtype, rows: int, columns: int, adds: bool) -> None:
    x, weight, grad = (draw(rows, columns, seed=i, dtype=dtype) for i in range(3))
    weight = weight[0]
    residual = draw(rows, columns, seed=3, dtype=dtype) if adds else None
    exact_x = x.double().requires_grad_()
    inverse = torch.rsqrt(exact_x.pow(2).mean(dim=-1, keepdim=True) + 1e-5)
    exact = weight.double() * exact_x * inverse
    (exact_grad,) = torch.autograd.grad(exact, exact_x, grad.double())
    if residual is not None:
        exact_grad = exact_grad + residual.double()
    out, rstd = norm.rms_norm(x, weight, 1e-5)
    assert_close(out, exact.detach(), dtype)
    result = norm.rms_norm_backward_(grad, x, weight, rstd, residual)
    assert residual is None or result is residual
    assert_close(grad, exact.detach(), dtype)
    if columns > 1:  # a single feature's normalization has no slope
        assert_close(result, exact_grad, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "size"), [(1, 1, 2), (5, 3, 96), (7, 40, 64)])
def test_heads_are_copied_into_wider_rows(dtype: torch.dtype, tokens: int, heads: int, size: int) -> None:
    source, wide = draw(tokens, heads, size, dtype=dtype), draw(tokens, heads + 2, size, seed=1, dtype=dtype)
    expected = wide.clone()
    expected[:, 1:-1] = source
    rotary.copy_heads_(source, wide[:, 1:-1])
    assert torch.equal(wide, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "heads", "size", "rotated"), [(1, 1, 2, 2), (5, 3, 96, 96), (7, 40, 64, 64), (4, 6, 128, 96)]
)
def test_rotary(dtype: torch.dtype, tokens: int, heads: int, size: int, rotated: int) -> None:
    wide = draw(tokens, heads + 2, size, dtype=dtype)
    angles = draw(tokens, rotated // 2, seed=1).double() * 3
    cos, sin = (torch.cat([part, part], dim=-1) for part in (angles.cos(), angles.sin()))
    source = wide[:, :heads]
    exact = torch.empty(tokens, heads, size, dtype=torch.float64, device=DEVICE)
    rotary.rotate_reference_(source.double(), exact, cos.to(dtype).double(), sin.to(dtype).double())
    target = torch.full_like(source, float("nan"))
    rotary.rotate_(source, target, cos.to(dtype), sin.to(dtype))
    assert_close(target, exact, dtype)
    back = torch.full_like(source, float("nan"))
    rotary.rotate_(target, back, cos.to(dtype), sin.to(dtype), back=True)
    assert_close(back, source, dtype, times=2.0)
    others = wide[:, heads:].clone()
    rotary.rotate_(source, source, cos.to(dtype), sin.to(dtype))
    assert torch.equal(source, target)
    assert torch.equal(wide[:, heads:], others)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 100), (2, 1025), (5, 2048)])
def test_swiglu(dtype: torch.dtype, rows: int, columns: int) -> None:
    both = draw(rows, 2 * columns, dtype=dtype) * 4
    gate, up = both.chunk(2, dim=1)
    exact_gate, exact_up = (part.double().requires_grad_() for part in (gate, up))
    exact = torch.nn.functional.silu(exact_gate) * exact_up
    grad = draw(rows, columns, seed=1, dtype=dtype)
    exact_grads = torch.autograd.grad(exact, (exact_gate, exact_up), grad.double())
    assert_close(swiglu.swiglu(gate, up), exact.detach(), dtype)
    swiglu.swiglu_backward_(grad, gate, up)
    assert_close(grad, exact.detach(), dtype)
    assert_close(gate, exact_grads[0], dtype)
    assert_close(up, exact_grads[1], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 2), (3, 320), (4, 4097), (2, 9000)])
def test_cross_entropy(dtype: torch.dtype, rows: int, vocabulary: int) -> None:
    from luthier.ops.kernels.cross_entropy import cross_entropy_

    logits = draw(rows, vocabulary, dtype=dtype) * 6
    logits[0, :2] = logits.max() + 1  # two that are the largest: the first is the likeliest
    targets = torch.tensor([1, 0, 5, vocabulary - 1][:rows], device=DEVICE) % vocabulary
    exact = logits.double().requires_grad_()
    exact_nll = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
    (exact_grad,) = torch.autograd.grad(exact_nll.sum(), exact)
    nll = torch.full((rows,), float("nan"), device=DEVICE)
    is_correct = torch.ones(rows, dtype=torch.bool, device=DEVICE)
    before = logits.clone()
    cross_entropy_(logits, targets, nll, is_correct, False)
    assert torch.equal(logits, before)
    torch.testing.assert_close(nll.double(), exact_nll.detach(), rtol=1e-5, atol=1e-5)
    assert is_correct.tolist() == [False, *(before[1:].argmax(dim=1) == targets[1:]).tolist()]
    cross_entropy_(logits, targets, nll, is_correct, True)
    assert_close(logits, exact_grad, dtype)


CASES: dict[str, tuple[int, int, int, Sequence[tuple[int, int, int]]]] = {
    # rows, inputs, outputs, (start, end, rank) of each slot; rank 0: the slot does not adapt the layer
    "one token": (1, 24, 40, [(0, 1, 3)]),
    "one slot": (70, 100, 130, [(0, 70, 16)]),
    "ragged, gaps, one without an update": (133, 257, 96, [(0, 1, 1), (1, 66, 5), (70, 90, 0), (90, 131, 17)]),
    "64 slots": (96, 48, 64, [(i, i + 1, 1 + i % 7) for i in range(64)]),
    "rank 256": (40, 130, 300, [(0, 20, 256), (20, 40, 2)]),
    "nobody": (20, 32, 32, [(0, 20, 0)]),
}


def make(case: str) -> tuple[Tensor, Tensor, list[Factors | None], list[tuple[int, int]], int]:
    rows, inputs, outputs, spans = CASES[case]
    factors: list[Factors | None] = []
    for seed, (_, _, rank) in enumerate(spans):
        a, b = draw(rank, inputs, seed=seed) / inputs**0.5, draw(outputs, rank, seed=100 + seed)
        grads = torch.ones_like(a), torch.ones_like(b)  # what an earlier micro-batch has left
        factors.append(Factors(a, b, *grads, scale=0.5 + seed / 7) if rank else None)
    return draw(rows, inputs), draw(rows, outputs, seed=7), factors, [span[:2] for span in spans], rows


def _rounded(factors: Factors, dtype: torch.dtype) -> Factors:
    return replace(factors, a_RI=factors.a_RI.to(dtype), b_OR=factors.b_OR.to(dtype))


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_low_rank_products(case: str, dtype: torch.dtype, with_residual: bool) -> None:
    x, y, factors, bounds, rows = make(case)
    x, y = x.to(dtype), y.to(dtype)
    residual = draw(*y.shape, seed=9, dtype=dtype) if with_residual else None
    grad = draw(*y.shape, seed=11, dtype=dtype)
    exact_x, exact_y, exact_grad_x = x.double(), y.double(), x.double()
    if residual is not None:
        exact_y += residual.double()
    exact_factors = []
    for (start, end), each in zip(bounds, factors, strict=True):
        if each is None:
            continue
        a, b, g = each.a_RI.to(dtype).double(), each.b_OR.to(dtype).double(), grad[start:end].double()
        exact_y[start:end] += each.scale * exact_x[start:end] @ a.t() @ b.t()
        exact_grad_x[start:end] += each.scale * g @ b @ a
        exact_factors.append(1 + each.scale * (g @ b).t() @ exact_x[start:end])
        exact_factors.append(1 + each.scale * g.t() @ (exact_x[start:end] @ a.t()))
    updates = Updates(bounds, [SlotFactors([None, each and _rounded(each, dtype)]) for each in factors], rows, x.device)
    assert updates.uses_kernels
    assert not updates.acts_on(0)
    low = None
    if updates.acts_on(1):
        low = low_rank.down(x, 1, updates)
    low_rank.up_(y, low, 1, updates, residual)
    assert_close(y, exact_y, dtype)
    if low is not None:
        grad_x = x.clone()
        short = low_rank.down_backward(grad, low, 1, updates)
        low_rank.up_backward_(grad_x, None, short, 1, updates)
        low_rank.up_backward_(None, x, short, 1, updates)
        assert_close(grad_x, exact_grad_x, dtype)
        found = [grad for each in factors if each is not None for grad in (each.grad_a_RI, each.grad_b_OR)]
        for one, other in zip(found, exact_factors, strict=True):
            assert_close(one, other, dtype, times=2.0)  # the low-rank middle is rounded too


@pytest.mark.parametrize("seed", range(4 if is_interpreted() else 16))
def test_low_rank_products_of_random_shapes(seed: int) -> None:
    random = np.random.default_rng(seed)
    spans, at = [], int(random.integers(0, 5))
    for _ in range(int(random.integers(1, 9))):
        end = at + int(random.integers(1, 90))
        spans.append((at, end, int(random.integers(0, 40))))
        at = end + int(random.integers(0, 2) * random.integers(0, 40))
    CASES["random"] = (at + 3, int(random.integers(1, 300)), int(random.integers(1, 300)), spans)
    try:
        test_low_rank_products("random", torch.float32, bool(seed % 2))
    finally:
        del CASES["random"]


def test_tiles_cover_every_row_once() -> None:
    bounds = [(3, 70), (70, 71), (100, 100), (120, 200)]
    tiles = low_rank.tile_rows_of(bounds, 230, 32)
    rows = np.concatenate([np.arange(start, end) for _, start, end in tiles])
    assert sorted(rows.tolist()) == list(range(230))
    owner = np.full(230, -1)
    for segment, (start, end) in enumerate(bounds):
        owner[start:end] = segment
    assert all((owner[start:end] == segment).all() and 0 < end - start <= 32 for segment, start, end in tiles)


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(2, 2, 96), (9, 3, 64), (4, 1, 32)])
@pytest.mark.parametrize("window", [None, 1, 70])
@pytest.mark.parametrize("ends", [(1,), (5, 130, 0, 64), (65, 1, 2, 200, 129, 3, 0, 66, 128)])
def test_cached_attention(
    dtype: torch.dtype, heads: int, key_heads: int, size: int, window: int | None, ends: Sequence[int]
) -> None:
    num_tokens = len(ends)
    rows = torch.arange(num_tokens, device=DEVICE).flip(0) + 1
    keys, values = (draw(num_tokens + 1, key_heads, 200, size, seed=i, dtype=dtype) for i in range(2))
    together = draw(num_tokens, (heads + 2 * key_heads) * size, seed=2, dtype=dtype)  # heads stand in wider rows
    sizes = [heads * size, key_heads * size, key_heads * size]
    query, key, value = (part.unflatten(1, (-1, size)) for part in together.split(sizes, dim=1))
    at = torch.tensor(ends, device=DEVICE)
    exact_cache = CachedLayer(keys.double(), values.double(), rows, at)
    exact = attend_cached_reference(query.double(), key.double(), value.double(), exact_cache, size**-0.5, window)
    found = attend_cached(query, key, value, CachedLayer(keys, values, rows, at), size**-0.5, window)
    assert_close(found, exact, dtype)
    assert torch.equal(keys.double(), exact_cache.keys_RKLD)  # the new ones stored, and no other touched
    assert torch.equal(values.double(), exact_cache.values_RKLD)
