"""Where PiSSA and OLoRA let the factors start: at a part of the base's own weight, which is taken out of the base.

Shapes: I inputs, O outputs, R rank.

PiSSA (Meng et al. 2024, arXiv:2404.02948): the R largest singular values and vectors, W ~ U S V^T, with
    A = sqrt(S / c) V^T,  B = U sqrt(S / c).
OLoRA (Büyükakyüz 2024, arXiv:2406.01775): the first R columns and rows of W = Q R, with A = R_r, B = Q_r.

The base is shared, so it keeps its weight, and the slot subtracts c B A as it was at the start, frozen.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def principal_factors(weight_OI: Tensor, init: str, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A0 [R, I] and B0 [O, R] in the weight's dtype.

    Args:
        weight_OI: float32 at least.
        init: "pissa" or "olora".
        scale: The factor c that will multiply B A.
    """
    if init == "pissa":
        u_OM, values_M, v_MI = torch.linalg.svd(weight_OI, full_matrices=False)
        root_R = (values_M[:rank] / scale).sqrt()
        return root_R[:, None] * v_MI[:rank], u_OM[:, :rank] * root_R
    if init == "olora":
        q_OM, r_MI = torch.linalg.qr(weight_OI)
        return r_MI[:rank].contiguous(), q_OM[:, :rank].contiguous()
    raise ValueError(f"no start is called {init!r}")
