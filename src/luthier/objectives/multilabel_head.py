"""Any number of labels of whole sequences: the linear head of `sequence_head`, each label decided by itself.

Shapes: C sequences, K labels.

The loss of a sequence is the mean over the labels of the binary cross-entropy of the label's sigmoid,

    nll_c = 1/K sum_k [ softplus(z_ck) - y_ck z_ck ],

so that a sequence weighs 1 however many labels there are, and a job's mean is transformers' loss of
`problem_type: multi_label_classification`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.objectives.language_modelling import TokenScores


def flags_nll(logits_CK: Tensor, flags_CK: Tensor) -> TokenScores:
    """Loss of each sequence, and whether exactly its labels have a probability of one half or more.

    Args:
        logits_CK: As `sequence_head.class_logits` gives them.
        flags_CK: 1 for a label that the sequence has, else 0.
    """
    wide_CK = logits_CK.to(torch.promote_types(logits_CK.dtype, torch.float32))
    flags_CK = flags_CK.to(wide_CK.dtype)
    nll_C = F.binary_cross_entropy_with_logits(wide_CK, flags_CK, reduction="none").mean(dim=-1)
    return TokenScores(nll_C, ((wide_CK.detach() >= 0) == (flags_CK > 0)).all(dim=-1))
