"""Any number of labels of whole sequences.

Shapes: C sequences, K labels.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from luthier.objectives.multilabel_head import flags_nll


def test_the_loss_is_transformers_mean_over_labels_and_right_is_every_label() -> None:
    logits_CK = torch.tensor([[2.0, -1.0, 0.0], [0.5, 0.5, -3.0], [-9.0, -9.0, -9.0]])
    flags_CK = torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    scores = flags_nll(logits_CK, flags_CK)
    assert float(scores.nll_P.mean()) == pytest.approx(float(F.binary_cross_entropy_with_logits(logits_CK, flags_CK)))
    by_hand = torch.log1p(torch.exp(torch.tensor([-2.0, -1.0, -0.0]))).mean()
    assert float(scores.nll_P[0]) == pytest.approx(float(by_hand))
    assert scores.is_correct_P.tolist() == [True, False, True]  # a half is enough; a text may have no label


def test_bfloat16_logits_are_scored_in_float32() -> None:
    scores = flags_nll(torch.tensor([[100.0, -100.0]]).bfloat16(), torch.tensor([[0.0, 1.0]]))
    assert scores.nll_P.dtype == torch.float32
    assert float(scores.nll_P) == pytest.approx(100.0)
