"""Classes of whole sequences: a linear head on the hidden state of the sequence's last token.

Shapes: C sequences with a class (or, in `token_head`, tagged tokens), D hidden size, K classes.

The pooling rule is that of transformers' `*ForSequenceClassification` for a text that does not end in the padding
token: the last token's hidden state after the final norm. The loss of a sequence is the cross-entropy of its class.
"""

from __future__ import annotations

from torch import Tensor

from luthier.objectives.language_modelling import TokenScores, next_token_nll_reference


def class_logits(pooled_CD: Tensor, head_KD: Tensor, bias_K: Tensor | None = None) -> Tensor:
    """Logits [C, K] in the head's dtype."""
    logits_CK = pooled_CD.to(head_KD.dtype) @ head_KD.t()
    return logits_CK if bias_K is None else logits_CK + bias_K


def class_nll(logits_CK: Tensor, classes_C: Tensor) -> TokenScores:
    """Cross-entropy of each sequence's class, and whether the likeliest class is the right one."""
    return next_token_nll_reference(logits_CK, classes_C)
