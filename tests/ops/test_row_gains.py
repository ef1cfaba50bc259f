"""Rows multiplied by factors an output: the in-place node against the plain reference, outputs and every gradient.

Shapes: T rows, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from luthier.ops.row_gains import RowGain, row_gains, row_gains_reference

Spans = Sequence[tuple[int, int, bool]]

CASES: dict[str, Spans] = {
    "all rows": [(0, 12, False)],
    "all rows, bias too": [(0, 12, True)],
    "gaps of no slot": [(2, 5, False), (7, 8, True)],
    "two that touch": [(0, 6, True), (6, 12, False)],
    "an empty segment": [(3, 3, False), (3, 9, True)],
}


def build(spans: Spans, has_bias: bool, dtype: torch.dtype, wide: torch.dtype) -> tuple[Tensor, Tensor | None, list]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int, to: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(to)

    gains = [RowGain(start, end, draw(5, to=wide).requires_grad_(), spans) for start, end, spans in spans]
    return draw(12, 5, to=dtype).requires_grad_(), draw(5, to=dtype) if has_bias else None, gains


def run(function: object, u_TO: Tensor, bias_O: Tensor | None, gains: list[RowGain]) -> list[Tensor]:
    given_TO = u_TO * 1.0  # the node writes over its input, which may be no leaf
    out_TO = function(given_TO, bias_O, gains)  # type: ignore[operator]
    weights = torch.randn(out_TO.shape, generator=torch.Generator().manual_seed(2)).bfloat16().to(out_TO.dtype)
    wanted = [u_TO, *(gain.gain_O for gain in gains)]
    return [out_TO.detach(), *torch.autograd.grad((out_TO * weights).sum(), wanted)]


@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_equal_the_reference(name: str, has_bias: bool) -> None:
    case = build(CASES[name], has_bias, torch.float64, torch.float64)
    for ours, plain in zip(run(row_gains, *case), run(row_gains_reference, *case), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_factors_near_one_are_not_rounded_to_bfloat16() -> None:
    u_TO, bias_O, _ = build([], True, torch.bfloat16, torch.float32)
    gain_O = torch.full((5,), 1.003).requires_grad_()  # 1 in bfloat16
    gains = [RowGain(0, 12, gain_O, False)]
    ours, plain = run(row_gains, u_TO, bias_O, gains), run(row_gains_reference, u_TO, bias_O, gains)
    assert [tensor.dtype for tensor in ours] == [torch.bfloat16, torch.bfloat16, torch.float32]
    exact = u_TO.detach().double() * 1.003 + bias_O.double()  # type: ignore[union-attr]
    for found in (ours[0], plain[0]):
        assert float((found.double() - exact).norm() / exact.norm()) < 2e-3
    torch.testing.assert_close(ours[2], plain[2], rtol=2e-2, atol=2e-2)


def test_rows_of_no_slot_keep_their_bytes() -> None:
    u_TO, _, gains = build(CASES["gaps of no slot"], False, torch.float32, torch.float32)
    before = u_TO.detach().clone()
    out_TO = row_gains(u_TO.detach().clone(), None, gains)
    untouched = [0, 1, 5, 6, 8, 9, 10, 11]
    assert torch.equal(out_TO[untouched], before[untouched])
    assert not torch.equal(out_TO[2:5], before[2:5])
