"""Which layers (IA)^3 scales where nobody names them: by what architectures call keys, values and down projections."""

from __future__ import annotations

from collections.abc import Sequence

from luthier.errors import RecipeError

ATTENTION = (
    ("k_proj", "v_proj"),
    ("qkv_proj",),
    ("query_key_value",),
    ("Wqkv",),
    ("att_proj",),
    ("attention.key", "attention.value"),
    ("self.key", "self.value"),
    ("k_lin", "v_lin"),
    ("key_proj", "value_proj"),
)
"""Keys and values, or the projection that makes queries, keys and values in one: then PEFT too scales the whole."""

FEEDFORWARD = (
    "down_proj",
    "fc2",
    "fc_out",
    "dense_4h_to_h",
    "ff_out",
    "ffn.lin2",
    "mlp.Wo",
    "wo",
    "w2",
    "mlp.c_proj",
    "output.dense",
)
"""The layer behind the activation, whose input is scaled."""


def default_targets(names: Sequence[str]) -> tuple[str, ...]:
    """Suffixes of the layers that the paper scales.

    Args:
        names: Of all linear layers of the base.

    Raises:
        RecipeError: where the base calls them otherwise.
    """
    attention = next((ends for ends in ATTENTION if all(_some(names, end) for end in ends)), ())
    feedforward = next((end for end in FEEDFORWARD if _some(names, end)), None)
    if not attention or feedforward is None:
        ends = sorted({name.rsplit(".", 1)[-1] for name in names})
        missing = "no keys and values" if not attention else "no down projection of a feed-forward"
        raise RecipeError(
            f"method.targets: among the linear layers of this base, {missing} are known by name to ia3",
            f"some of {', '.join(ends)}",
            "name them in method.targets, and in method.feedforward those whose input is to be scaled",
        )
    return (*attention, feedforward)


def default_feedforward(names: Sequence[str]) -> tuple[str, ...]:
    """Of the layers `names`, those that are down projections."""
    return tuple(name for name in names if any(_ends(name, end) for end in FEEDFORWARD))


def _some(names: Sequence[str], end: str) -> bool:
    return any(_ends(name, end) for name in names)


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith("." + end)
