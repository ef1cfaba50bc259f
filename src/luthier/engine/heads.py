"""What a slot's head says, whatever kind of base it stands on.

Shapes: C places where a class is read, D hidden size, K classes.
"""

from __future__ import annotations

from torch import Tensor, nn

from luthier.base.encoder import head_logits
from luthier.objectives.sequence_head import class_logits
from luthier.objectives.token_head import tag_logits


def read_classes(head: nn.Module, hidden_CD: Tensor) -> Tensor:
    """Logits [C, K] in the head's dtype."""
    if not isinstance(head, nn.Linear):
        return head_logits(head, hidden_CD)
    if head.bias is not None:
        return tag_logits(hidden_CD, head.weight, head.bias)
    return class_logits(hidden_CD, head.weight)
