"""Classes of whole sequences.

Shapes: C sequences, D hidden size, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from luthier.objectives.sequence_head import class_logits, class_nll


def test_logits_and_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    pooled_CD, head_KD = torch.randn(6, 8, generator=generator), torch.randn(3, 8, generator=generator)
    classes_C = torch.tensor([0, 1, 2, 0, 1, 2])
    logits_CK = class_logits(pooled_CD, head_KD)
    scores = class_nll(logits_CK, classes_C)
    torch.testing.assert_close(logits_CK, F.linear(pooled_CD, head_KD))
    torch.testing.assert_close(scores.nll_P, F.cross_entropy(logits_CK, classes_C, reduction="none"))
    assert scores.is_correct_P.tolist() == [
        int(r.argmax()) == int(c) for r, c in zip(logits_CK, classes_C, strict=True)
    ]


def test_a_float32_head_over_a_bfloat16_body() -> None:
    generator = torch.Generator().manual_seed(0)
    pooled_CD = torch.randn(4, 8, generator=generator).bfloat16()
    head_KD = torch.randn(3, 8, generator=generator)
    assert class_logits(pooled_CD, head_KD).dtype == torch.float32
    torch.testing.assert_close(class_logits(pooled_CD, head_KD), F.linear(pooled_CD.float(), head_KD))
