"""A layer held in fp8: how far rounding moves it, and the GPU's products against the plain path.

Shapes: T rows, I inputs, O outputs.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from luthier.base.load import load_base
from luthier.engine.pack import PackItem, pack
from luthier.engine.step import train_step
from luthier.ops.capability import fp8_problem
from luthier.ops.fp8 import fits_fp8, fp8_backward, fp8_forward, quantize_rows, quantize_rows_reference, quantize_weight
from luthier.ops.product import frozen_product
from luthier.types import AdapterSpec, Example

PRODUCT_ERROR = 0.045
"""Relative 2-norm of a product's error on Gaussian numbers: both operands keep four significant bits."""


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_value_moves_by_a_sixteenth_of_itself_at_most(scale: float) -> None:
    weight = draw(32, 48) * scale
    weight[3] = 0.0
    dense = quantize_weight(weight).dense()
    floor = weight.abs().amax(dim=1, keepdim=True) / 448 * 2**-9  # below this, e4m3 counts in even steps
    assert (((dense - weight).abs() <= weight.abs() / 16 + floor) | (weight == 0)).all()
    assert torch.equal(dense[3], weight[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_stay_within_the_stated_error(dtype: torch.dtype) -> None:
    x, weight, grad = draw(40, 128, dtype=dtype), draw(96, 128, seed=1, dtype=dtype), draw(40, 96, seed=2, dtype=dtype)
    bias = draw(96, seed=3, dtype=dtype)
    held = quantize_weight(weight)
    assert distance(fp8_forward(x, held, bias), x @ weight.t() + bias) < PRODUCT_ERROR
    assert distance(fp8_backward(grad, held), grad @ weight) < PRODUCT_ERROR
    leaf = x[None].clone().requires_grad_()
    out = frozen_product(leaf, held, bias)
    assert torch.equal(out[0], fp8_forward(x, held, bias))
    (found,) = torch.autograd.grad(out, leaf, grad[None])
    assert torch.equal(found[0], fp8_backward(grad, held))


def test_sizes_that_the_product_does_not_take() -> None:
    assert fits_fp8(torch.empty(32, 48))
    assert not fits_fp8(torch.empty(32, 40))


def test_training_over_an_fp8_base_stays_close(tiny_llama: Path) -> None:
    """The fast blocks and the model's own modules agree over fp8, and the loss is near the unrounded base's."""
    random = np.random.default_rng(0)
    examples = [Example(random.integers(4, 250, size=20).astype(np.int32), np.ones(20, dtype=np.float32)) for _ in "ab"]
    losses, gradients = [], []
    for quantization, fast in (("fp8", True), ("fp8", False), (None, False)):
        base = load_base(tiny_llama, dtype="float64", quantization=quantization, wants_fast_body=fast)
        assert base.quantization == quantization
        assert (base.fast_body is not None) == fast, base.fast_body_problem
        slot = base.bank.add(AdapterSpec(rank=4), 0)
        batch = pack([PackItem(example, slot.index) for example in examples])
        report = train_step(base, batch, {slot.index: 38.0})[slot.index]
        losses.append(report.nll_sum / report.weight_sum)
        gradients.append(torch.cat([p.grad.flatten() for p in slot.parameters().values() if p.grad is not None]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert distance(gradients[0], gradients[1]) < 0.05
    assert losses[1] == pytest.approx(losses[2], rel=0.05)
    assert losses[1] != losses[2]


@pytest.mark.gpu
@pytest.mark.skipif(bool(fp8_problem()), reason=f"no fp8 products: {fp8_problem()}")
@pytest.mark.parametrize("rows", [1, 17, 300, 4096])
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 32), (576, 1536), (3072, 9216)])
def test_the_gpus_products_equal_the_plain_path(rows: int, inputs: int, outputs: int) -> None:
    x = draw(rows, inputs, dtype=torch.bfloat16).cuda()
    weight = (draw(outputs, inputs, seed=1) / inputs**0.5).bfloat16().cuda()
    grad = draw(rows, outputs, seed=2, dtype=torch.bfloat16).cuda()
    held = quantize_weight(weight)
    values, scales = quantize_rows(x)
    plain_values, plain_scales = quantize_rows_reference(x)
    torch.testing.assert_close(scales, plain_scales, rtol=1e-6, atol=0)
    assert (values.float() != plain_values.float()).float().mean() < 1e-3  # a division's last bit may decide a tie
    for found, plain, exact in (
        (fp8_forward(x, held, None), fp8_forward(x.double(), held, None), x.double() @ weight.double().t()),
        (fp8_backward(grad, held), fp8_backward(grad.double(), held), grad.double() @ weight.double()),
    ):
        assert distance(found, plain) < 1e-2
        assert distance(found, exact) < PRODUCT_ERROR
