"""Tags of single tokens: a linear head with a bias on the hidden states of the tokens that have one.

Shapes: C tagged tokens, D hidden size, K tags.

The rule is that of transformers' `*ForTokenClassification`: every token's hidden state after the final norm, times one
matrix, plus a bias. Which tokens are read is the task's affair (`Example.tags`): of a word in several tokens it is the
last, the only one at which a causal model has seen the whole word. The loss is the cross-entropy a tagged token, so a
job's mean is over the tagged tokens of its whole optimizer batch, as transformers takes it over those of one batch.
"""

from __future__ import annotations

from torch import Tensor

from luthier.objectives.sequence_head import class_logits


def tag_logits(hidden_CD: Tensor, head_KD: Tensor, bias_K: Tensor) -> Tensor:
    """Logits [C, K] in the head's dtype."""
    return class_logits(hidden_CD, head_KD, bias_K)
