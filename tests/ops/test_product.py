"""Products with a frozen weight are torch's own, whichever kernel computes them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from luthier.ops import product
from luthier.ops.product import backward_product, forward_product

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@pytest.fixture(params=["chosen", "torch", "onednn"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernel that this machine chooses, and each of the two by force."""
    if request.param == "onednn" and not (
        torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    ):
        pytest.skip("torch is built without oneDNN")
    if request.param != "chosen":
        monkeypatch.setattr(product, "_prefers_onednn", lambda: request.param == "onednn")
    return request.param


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    value = {torch.float32: 1e-4, torch.float64: 1e-12, torch.bfloat16: 0.1}[dtype]
    return {"rtol": value, "atol": value}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 3, 5), (7, 64, 33), (64, 16, 1), (130, 48, 96)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_forward(kernel: str, dtype: torch.dtype, rows: int, inputs: int, outputs: int, has_bias: bool) -> None:
    x_MK, weight_NK = draw(rows, inputs, dtype=dtype), draw(outputs, inputs, dtype=dtype, seed=1)
    bias_N = draw(outputs, dtype=dtype, seed=2) if has_bias else None
    found = forward_product(x_MK, weight_NK, bias_N)
    assert found.dtype == dtype
    torch.testing.assert_close(found, F.linear(x_MK, weight_NK, bias_N), **tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 3, 5), (7, 64, 33), (130, 48, 96)])
def test_backward(kernel: str, dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> None:
    grad_MN, weight_NK = draw(rows, outputs, dtype=dtype), draw(outputs, inputs, dtype=dtype, seed=1)
    torch.testing.assert_close(backward_product(grad_MN, weight_NK), grad_MN @ weight_NK, **tolerance(dtype))


def test_strided_and_expanded_inputs(kernel: str) -> None:
    weight_NK = draw(9, 6, dtype=torch.float32, seed=1)
    strided_MK = draw(11, 12, dtype=torch.float32)[:, ::2]
    torch.testing.assert_close(forward_product(strided_MK, weight_NK), F.linear(strided_MK, weight_NK))
    transposed_MK = draw(6, 11, dtype=torch.float32).t()
    torch.testing.assert_close(forward_product(transposed_MK, weight_NK), F.linear(transposed_MK, weight_NK))
    expanded_MN = torch.ones(1, 1).expand(11, 9)  # the gradient of a plain sum
    torch.testing.assert_close(backward_product(expanded_MN, weight_NK), expanded_MN @ weight_NK)
    offset_MK = draw(20, 6, dtype=torch.float32)[5:12]
    torch.testing.assert_close(forward_product(offset_MK, weight_NK), F.linear(offset_MK, weight_NK))


def test_the_same_bytes_again(kernel: str) -> None:
    x_MK, weight_NK = draw(37, 64, dtype=torch.float32), draw(48, 64, dtype=torch.float32, seed=1)
    assert torch.equal(forward_product(x_MK, weight_NK), forward_product(x_MK.clone(), weight_NK.clone()))
