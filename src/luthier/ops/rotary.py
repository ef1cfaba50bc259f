"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) in the half-split layout of transformers.

Shapes: T tokens, H heads, D head size, E rotated features (E <= D), whose tables hold each angle twice.

    (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin),    x1 = x[:E/2], x2 = x[E/2:E]

Its backward is the rotation by the opposite angle.
"""

from __future__ import annotations

from torch import Tensor

from luthier.ops.capability import runs_kernels


def rotate_(source_THD: Tensor, target_THD: Tensor, cos_TE: Tensor, sin_TE: Tensor, *, back: bool = False) -> None:
    """Write the rotated heads to `target_THD`, which may be `source_THD` itself. Features past E are kept.

    Args:
        source_THD, target_THD: Strided by token as they like; the heads of a token stand next to one another.
        back: Rotate by the opposite angle.
    """
    if runs_kernels(source_THD):
        from luthier.ops.kernels import rotary

        rotary.rotate(source_THD, target_THD, cos_TE, sin_TE, -1.0 if back else 1.0)
    else:
        rotate_reference_(source_THD, target_THD, cos_TE, sin_TE, back=back)


def copy_heads_(source_THD: Tensor, target_THD: Tensor) -> None:
    """Write heads that are not rotated to `target_THD`; strides as in `rotate_`."""
    if runs_kernels(source_THD):
        from luthier.ops.kernels import rotary

        rotary.copy(source_THD, target_THD)
    else:
        target_THD.copy_(source_THD)


def rotate_reference_(
    source_THD: Tensor, target_THD: Tensor, cos_TE: Tensor, sin_TE: Tensor, *, back: bool = False
) -> None:
    half = cos_TE.shape[-1] // 2
    cos_T1E, sin_T1E = cos_TE[:, None, :half], sin_TE[:, None, :half]
    if back:
        sin_T1E = -sin_T1E
    first, second = source_THD[..., :half], source_THD[..., half : 2 * half]
    turned = first * cos_T1E - second * sin_T1E, second * cos_T1E + first * sin_T1E
    target_THD[..., :half], target_THD[..., half : 2 * half] = turned
    if target_THD.data_ptr() != source_THD.data_ptr():
        target_THD[..., 2 * half :] = source_THD[..., 2 * half :]
