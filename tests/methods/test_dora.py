"""DoRA's parts: the norm without the weight, when it is computed, and PEFT's own arithmetic, dropout included.

Shapes: n rows, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from luthier.base.load import load_base
from luthier.engine.engine import Engine
from luthier.engine.job import TrainingJob
from luthier.methods.dora import layer as module
from luthier.methods.dora.layer import DORA, DoraFactors, weight_norm
from luthier.ops.base_linear import BaseLinear
from luthier.types import AdapterSpec, Example, TrainSpec

SPEC = AdapterSpec(method="dora", rank=3, alpha=7.5, rank_stabilized=True)


def layer(*, bias: bool = True, dtype: torch.dtype = torch.float64) -> BaseLinear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BaseLinear(nn.Linear(12, 9, bias=bias).to(dtype).requires_grad_(False))


def factors(base: BaseLinear, spec: AdapterSpec = SPEC) -> DoraFactors:
    """With every tensor moved from where it started."""
    generator = torch.Generator().manual_seed(1)
    made = DORA.create(spec, "layer", base, generator)
    with torch.no_grad():
        for parameter in made.named_parameters().values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return made


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 4e-3)]
)
def test_the_norm_needs_no_weight(dtype: torch.dtype, tolerance: float) -> None:
    base = layer(dtype=dtype)
    made = factors(base)
    weight_OI = base.weight_OI.double() + made.low.delta(torch.float64)
    found_O = weight_norm(base, made.low)
    assert found_O.dtype == base.wide_dtype
    torch.testing.assert_close(found_O.double(), weight_OI.norm(dim=1), rtol=tolerance, atol=tolerance)


def test_the_norm_is_computed_again_only_when_the_factors_change(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(module, "weight_norm", lambda *given: calls.append(1) or weight_norm(*given))
    base = layer()
    made = factors(base)
    made.norm(base)
    with torch.no_grad():
        made.magnitude_O += 1.0
    made.norm(base)
    assert len(calls) == 1
    for change in (made.low.a_RI, made.low.b_OR):
        with torch.no_grad():
            change += 0.1
        torch.testing.assert_close(made.norm(base), weight_norm(base, made.low))
    assert len(calls) == 3
    made.load({name: tensor.detach().clone() for name, tensor in made.tensors().items()})
    made.norm(base)
    assert len(calls) == 4


def test_a_step_computes_each_norm_once_however_it_is_split(
    tiny_llama: Path, make_examples: Callable[..., list[Example]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(module, "weight_norm", lambda *given: calls.append(1) or weight_norm(*given))
    engine = Engine(load_base(tiny_llama))
    slot = engine.base.bank.add(AdapterSpec(method="dora", rank=2), 0)
    train = TrainSpec(max_steps=3, batch_size=6, micro_batch_tokens=48)
    engine.add(TrainingJob("job", slot, make_examples(18, 0), train))
    num_forwards = 0
    while engine.has_work:
        engine.step()
        num_forwards += 1
    assert num_forwards > 6
    assert len(calls) == 3 * len(slot.adapters)


def test_what_serves_never_sees_the_norm_of_another_moment() -> None:
    base = layer()
    made = factors(base)
    with torch.inference_mode():
        made.norm(base)
    x_nI = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    made.output(base, x_nI, x_nI).sum().backward()  # a norm cached while sampling is fit for training
    assert made.magnitude_O.grad is not None


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("drops", [False, True], ids=["no dropout", "dropout"])
def test_outputs_and_gradients_are_pefts(bias: bool, drops: bool) -> None:
    """One layer of peft's own, with the same values and, for dropout, the same mask."""
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    base = layer(bias=bias)
    made = factors(base)
    config = LoraConfig(r=3, lora_alpha=7.5, use_rslora=True, use_dora=True, lora_dropout=0.5)  # type: ignore[arg-type]
    theirs = Linear(base.module, "default", config, r=3, lora_alpha=7.5).double()  # type: ignore[arg-type]
    with torch.no_grad():
        theirs.lora_A["default"].weight.copy_(made.low.a_RI)
        theirs.lora_B["default"].weight.copy_(made.low.b_OR)
        theirs.lora_magnitude_vector["default"].weight.copy_(made.magnitude_O)
    mask_nI = 2.0 * (torch.rand(6, 12, generator=torch.Generator().manual_seed(3)) > 0.5)

    class Fixed(nn.Module):
        def forward(self, x_nI: Tensor) -> Tensor:
            return x_nI * mask_nI.to(x_nI.dtype)

    theirs.lora_dropout["default"] = Fixed() if drops else nn.Identity()
    theirs.train()
    inputs = [torch.randn(6, 12, generator=torch.Generator().manual_seed(4), dtype=torch.float64) for _ in range(2)]
    mine_nI, their_nI = (x_nI.requires_grad_() for x_nI in inputs)
    our_nO = made.output(base, mine_nI, mine_nI * mask_nI if drops else mine_nI)
    their_nO = theirs(their_nI)
    torch.testing.assert_close(our_nO, their_nO, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(our_nO.square().sum(), [mine_nI, *made.named_parameters().values()])
    trained = [theirs.lora_A["default"], theirs.lora_B["default"], theirs.lora_magnitude_vector["default"]]
    expected = torch.autograd.grad(their_nO.square().sum(), [their_nI, *(part.weight for part in trained)])
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
