"""The fused low-rank product against the plain reference: outputs and every gradient.

Shapes: T rows, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from luthier.ops.lora_linear import FrozenLinear, LowRank, lora_linear, lora_linear_reference

Spans = Sequence[tuple[int, int, int]]
"""(start, end, rank) of the updates of one layer."""


@dataclass(frozen=True)
class Case:
    """Attributes:
    num_rows, num_inputs: Shape of the shared input.
    layers: For each layer its outputs, whether it has a bias, and its updates.
    """

    num_rows: int
    num_inputs: int
    layers: tuple[tuple[int, bool, Spans], ...]


def slots(count: int, rows_each: int = 1) -> Spans:
    return [(i * rows_each, (i + 1) * rows_each, 1 + i % 5) for i in range(count)]


CASES = {
    "one row": Case(1, 5, ((7, True, [(0, 1, 3)]),)),
    "one slot": Case(9, 6, ((4, False, [(0, 9, 2)]),)),
    "no update": Case(6, 5, ((4, True, []), (3, False, []))),
    "ragged": Case(23, 8, ((6, True, [(0, 1, 2), (1, 14, 5), (14, 23, 1)]),)),
    "gaps of no slot": Case(20, 7, ((5, True, [(3, 6, 2), (11, 12, 4)]),)),
    "64 slots": Case(64, 9, ((5, False, slots(64)), (8, True, slots(64)))),
    "rank 256, past both sides": Case(12, 16, ((10, False, [(0, 5, 256), (5, 12, 1)]),)),
    "layers with different updates": Case(
        17, 8, ((6, True, [(0, 9, 3), (9, 17, 2)]), (4, False, [(0, 9, 8)]), (9, True, []), (2, False, [(9, 17, 2)]))
    ),
    "layers whose segments differ": Case(15, 8, ((6, False, [(0, 10, 3)]), (6, True, [(4, 8, 2), (8, 15, 3)]))),
    "an empty segment": Case(8, 5, ((4, False, [(0, 8, 2), (8, 8, 3)]),)),
}


def build(case: Case, dtype: torch.dtype = torch.float64, factors: torch.dtype | None = None, seed: int = 0) -> tuple:
    """The input [T, I] and the layers, with trainable factors."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(to)

    wide = factors or dtype
    layers = []
    for number, (num_outputs, has_bias, spans) in enumerate(case.layers):
        updates = tuple(
            LowRank(
                start,
                end,
                draw(rank, case.num_inputs, to=wide).requires_grad_(),
                draw(num_outputs, rank, to=wide).requires_grad_(),
                0.5 + number + rank / 7,
            )
            for start, end, rank in spans
        )
        bias_O = draw(num_outputs) if has_bias else None
        layers.append(FrozenLinear(draw(num_outputs, case.num_inputs), bias_O, updates))
    return draw(case.num_rows, case.num_inputs), layers


def run(function: object, x_TI: Tensor, layers: list[FrozenLinear], used: Sequence[int] | None = None) -> list[Tensor]:
    """Outputs, and gradients of a random weighting of them (of the layers in `used`)."""
    outputs = function(x_TI, layers)  # type: ignore[operator]
    generator = torch.Generator().manual_seed(5)
    parts = [
        (out * torch.randn(out.shape, generator=generator).bfloat16().to(out.dtype)).sum()  # the same in every dtype
        for index, out in enumerate(outputs)
        if used is None or index in used
    ]
    wanted = [factor for layer in layers for update in layer.updates for factor in (update.a_RI, update.b_OR)]
    wanted += [x_TI] if x_TI.requires_grad else []
    gradients = torch.autograd.grad(sum(parts), wanted, allow_unused=True) if wanted else ()
    return [*outputs, *(torch.zeros_like(w) if g is None else g for g, w in zip(gradients, wanted, strict=True))]


def assert_equal(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-11) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("wants_input", [True, False], ids=["input-grad", "frozen-input"])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_equal_the_reference(name: str, wants_input: bool) -> None:
    x_TI, layers = build(CASES[name])
    x_TI.requires_grad_(wants_input)
    if not wants_input and not any(layer.updates for layer in layers):
        return  # nothing has a gradient then
    assert_equal(run(lora_linear, x_TI, layers), run(lora_linear_reference, x_TI, layers))


@pytest.mark.parametrize("seed", range(25))
def test_random_shapes(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    num_rows = pick(1, 60)
    layers = []
    for _ in range(pick(1, 4)):
        spans, at = [], pick(0, 4)
        while at < num_rows:
            end = min(num_rows, at + pick(1, 20))
            spans.append((at, end, pick(1, 12)))
            at = end + pick(0, 3)
        layers.append((pick(1, 20), bool(pick(0, 2)), spans))
    x_TI, built = build(Case(num_rows, pick(1, 24), tuple(layers)), seed=seed)
    x_TI.requires_grad_()
    assert_equal(run(lora_linear, x_TI, built), run(lora_linear_reference, x_TI, built))


def test_gradcheck() -> None:
    x_TI, layers = build(Case(5, 3, ((2, True, [(0, 2, 2), (3, 5, 1)]), (3, False, [(0, 2, 1)]))))
    factors = [factor for layer in layers for update in layer.updates for factor in (update.a_RI, update.b_OR)]

    def compute(x_TI: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        given = iter(factors)
        rebuilt = [
            replace(layer, updates=tuple(replace(u, a_RI=next(given), b_OR=next(given)) for u in layer.updates))
            for layer in layers
        ]
        return lora_linear(x_TI, rebuilt)

    assert torch.autograd.gradcheck(compute, (x_TI.requires_grad_(), *factors))


def test_an_output_that_nobody_uses() -> None:
    x_TI, layers = build(CASES["layers with different updates"])
    x_TI.requires_grad_()
    assert_equal(run(lora_linear, x_TI, layers, [0, 3]), run(lora_linear_reference, x_TI, layers, [0, 3]))


def test_a_strided_input_and_an_expanded_gradient() -> None:
    x_TI, layers = build(Case(14, 6, ((5, True, [(0, 7, 2)]),)))
    wide = torch.zeros(14, 12, dtype=torch.float64)
    wide[:, ::2] = x_TI
    found, expected = (function(wide[:, ::2], layers)[0] for function in (lora_linear, lora_linear_reference))
    torch.testing.assert_close(found, expected)
    factors = [layers[0].updates[0].a_RI, layers[0].updates[0].b_OR]
    for one, other in zip(
        torch.autograd.grad(found.sum(), factors), torch.autograd.grad(expected.sum(), factors), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["ragged", "layers with different updates", "64 slots"])
def test_float32(name: str) -> None:
    x_TI, layers = build(CASES[name], torch.float32)
    x_TI.requires_grad_()
    assert_equal(run(lora_linear, x_TI, layers), run(lora_linear_reference, x_TI, layers), 2e-4)


@pytest.mark.parametrize("name", ["one row", "ragged", "layers with different updates", "64 slots"])
def test_float32_factors_over_a_bfloat16_base(name: str) -> None:
    """Relative to the exact result in float64, within 2% in norm: bfloat16 keeps 8 bits, outputs round twice."""
    x_TI, layers = build(CASES[name], torch.bfloat16, torch.float32)
    x_TI.requires_grad_()
    exact_x = x_TI.detach().double().requires_grad_()
    exact_layers = [
        FrozenLinear(
            layer.weight_OI.double(),
            None if layer.bias_O is None else layer.bias_O.double(),
            tuple(
                replace(
                    u, a_RI=u.a_RI.detach().double().requires_grad_(), b_OR=u.b_OR.detach().double().requires_grad_()
                )
                for u in layer.updates
            ),
        )
        for layer in layers
    ]
    found, reference = run(lora_linear, x_TI, layers), run(lora_linear_reference, x_TI, layers)
    exact = run(lora_linear_reference, exact_x, exact_layers)
    for ours, plain, truth in zip(found, reference, exact, strict=True):
        assert ours.dtype == plain.dtype
        error = (ours.double() - truth).detach().norm()
        assert float(error) <= 0.02 * float(truth.detach().norm()) + 1e-6


def test_rows_without_an_update_keep_the_bases_bytes() -> None:
    x_TI, layers = build(CASES["gaps of no slot"], torch.float32)
    plain = lora_linear(x_TI, [replace(layers[0], updates=())])[0]
    mixed = lora_linear(x_TI, layers)[0]
    rows = torch.ones(20, dtype=torch.bool)
    rows[3:6] = rows[11] = False
    assert torch.equal(mixed[rows], plain[rows])
    assert not torch.equal(mixed[~rows], plain[~rows])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_frozen_factors_beside_trained_ones(dtype: torch.dtype) -> None:
    """A start that is taken out of the base again: two updates over the same rows, of which one gets no gradient."""
    wide = torch.promote_types(dtype, torch.float32)
    x_TI, layers = build(Case(17, 8, ((6, True, [(0, 9, 3), (9, 17, 2)]), (4, False, [(0, 9, 2)]))), dtype, wide)
    layers = [
        replace(
            layer,
            updates=tuple(
                part
                for u in layer.updates
                for part in (
                    replace(u, a_RI=2 * u.a_RI.detach(), b_OR=2 * u.b_OR.detach(), scale=-u.scale / 3),
                    u,
                )
            ),
        )
        for layer in layers
    ]
    x_TI.requires_grad_()
    wanted = [f for layer in layers for u in layer.updates for f in (u.a_RI, u.b_OR) if f.requires_grad]
    assert len(wanted) == 6
    results = []
    for function in (lora_linear, lora_linear_reference):
        outputs = function(x_TI, layers)
        gradients = torch.autograd.grad(sum(out.square().sum() for out in outputs), [x_TI, *wanted])
        results.append([*outputs, *gradients])
    if dtype == torch.float64:
        assert_equal(*results)
    else:
        for ours, plain in zip(*results, strict=True):
            ours, plain = ours.detach().double(), plain.detach().double()
            assert float((ours - plain).norm()) <= 0.03 * float(plain.norm())
