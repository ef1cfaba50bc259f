"""Products with a weight in NF4 against bitsandbytes' own dequantization and plain products.

Shapes: T rows, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor

from luthier.ops.lora_linear import FrozenLinear, LowRank, lora_linear, lora_linear_reference
from luthier.ops.nf4 import Nf4Weight, nf4_linear_reference, quantize
from luthier.ops.product import backward_product, forward_product, frozen_product

SIZES = [(64, 64), (112, 64), (33, 50), (7, 30), (3, 129), (640, 576)]
"""[O, I], some with blocks that begin within a row, or with an odd count."""


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_weight_is_bitsandbytes_own(size: tuple[int, int]) -> None:
    weight_OI = draw(*size)
    packed, state = quantize_4bit(weight_OI, blocksize=64, compress_statistics=True, quant_type="nf4")
    ours = quantize(weight_OI)
    expected_OI = dequantize_4bit(packed, state)
    assert torch.equal(ours.dense(), expected_OI)
    assert ours.shape == weight_OI.shape
    assert 0.05 < float((expected_OI - weight_OI).norm() / weight_OI.norm()) < 0.12  # NF4's error on a normal weight
    assert torch.equal(ours.dense(torch.float64), expected_OI.double())
    assert torch.equal(ours.dense(torch.bfloat16), expected_OI.bfloat16())


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_products_equal_dequantize_then_multiply(size: tuple[int, int], dtype: torch.dtype) -> None:
    weight = quantize(draw(*size))
    x_TI, bias_O, grad_TO = (
        draw(11, size[1], seed=1).to(dtype),
        draw(size[0], seed=2).to(dtype),
        draw(11, size[0], seed=3).to(dtype),
    )
    dense_OI = weight.dense(dtype)
    tolerance = {"rtol": 1e-2, "atol": 1e-1} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(forward_product(x_TI, weight, bias_O), F.linear(x_TI, dense_OI, bias_O), **tolerance)
    torch.testing.assert_close(backward_product(grad_TO, weight), grad_TO @ dense_OI, **tolerance)


def test_the_product_is_differentiable_and_keeps_no_dense_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Tensor]] = []

    def watched(weight: Nf4Weight, dtype: torch.dtype | None = None) -> Tensor:
        dense_OI = original(weight, dtype)
        made.append(weakref.ref(dense_OI))
        return dense_OI

    original = Nf4Weight.dense
    monkeypatch.setattr(Nf4Weight, "dense", watched)
    weight = quantize(draw(96, 64))
    kept: list[Tensor] = []
    x = draw(2, 5, 64, seed=1).requires_grad_()
    other = x.detach().clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = frozen_product(x, weight)
    assert kept == []
    y.square().sum().backward()
    assert len(made) == 2  # once in the forward, once in the backward
    assert [reference() for reference in made] == [None, None]
    nf4_linear_reference(other, weight).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-5, atol=1e-4)


def layers(weights: list[Nf4Weight], seed: int) -> list[FrozenLinear]:
    """Query, key and value as a group has them: updates of two slots, each layer's factors its own."""
    made = []
    for index, weight in enumerate(weights):
        size_O, size_I = weight.shape
        updates = []
        for at, (start, end, rank) in enumerate([(0, 6, 4), (6, 13, 2)]):
            a_RI = draw(rank, size_I, seed=seed + 10 * index + at).requires_grad_()
            b_OR = draw(size_O, rank, seed=seed + 10 * index + at + 5).requires_grad_()
            updates.append(LowRank(start, end, a_RI, b_OR, 0.5))
        made.append(FrozenLinear(weight, draw(size_O, seed=seed + index), tuple(updates)))
    return made


def test_the_fused_node_over_nf4_equals_the_reference() -> None:
    weights = [quantize(draw(size_O, 64, seed=size_O)) for size_O in (64, 32, 32)]
    results = []
    for compute in (lora_linear, lora_linear_reference):
        x_TI = draw(16, 64, seed=7).requires_grad_()
        group = layers(weights, 20)
        outputs = compute(x_TI, group)
        sum((out * (1 + at)).square().sum() for at, out in enumerate(outputs)).backward()  # type: ignore[union-attr]
        factors = [f for layer in group for update in layer.updates for f in (update.a_RI.grad, update.b_OR.grad)]
        results.append([*(out.detach() for out in outputs), x_TI.grad, *factors])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("size", [(576, 576), (1536, 576)], ids=str)
def test_a_layer_takes_under_three_tenths_of_bfloat16(size: tuple[int, int]) -> None:
    weight = quantize(draw(*size))
    assert weight.num_bytes < 0.30 * 2 * size[0] * size[1]
    nested = weight.state.state2
    assert nested.blocksize == 256  # double quantization
    assert weight.state.absmax.dtype == torch.uint8
