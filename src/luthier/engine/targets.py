"""Which linear layers a method adapts: from names to names, without any weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from luthier.errors import RecipeError, nearest
from luthier.methods.registry import METHODS
from luthier.types import AdapterSpec


def resolve_targets(spec: AdapterSpec, names: Sequence[str], output_name: str | None) -> list[str]:
    """The layers that `spec` adapts, in the model's order.

    Args:
        names: Of all linear layers of the base, in the model's order.
        output_name: The output layer's, which "all-linear" leaves out.

    Raises:
        RecipeError: when a target matches nothing; it lists what there is.
    """
    targets = METHODS[spec.method].targets(spec, names)
    if targets == "all-linear":
        inner = [name for name in names if name != output_name]
        if not inner:
            raise RecipeError(
                "method.targets: all-linear finds no linear layer in this base besides its output layer",
                "a base whose layers are torch.nn.Linear (GPT-2, for one, is built of Conv1D)",
                "choose another base; `luthier models` lists some",
            )
        return inner
    for field, wanted in (("targets", targets), ("feedforward", spec.feedforward or ())):
        for end in wanted:
            if not any(ends_with(name, end) for name in names):
                ends = sorted({name.rsplit(".", 1)[-1] for name in names})
                raise RecipeError(
                    f"method.{field}: no linear layer of the base is named {end!r}{nearest(end, ends)}",
                    f"one of {', '.join(ends)}",
                )
    return [name for name in names if any(ends_with(name, end) for end in targets)]


def check_layers(spec: AdapterSpec, layers: Mapping[str, tuple[int, int]], output_name: str | None) -> list[str]:
    """The layers that `spec` adapts, once each of them can be adapted so.

    Args:
        layers: Every linear layer's inputs and outputs, in the model's order.

    Raises:
        RecipeError: for a target that matches nothing, or a layer that the method refuses.
    """
    names = resolve_targets(spec, list(layers), output_name)
    for name in names:
        METHODS[spec.method].check(spec, name, *layers[name])
    return names


def ends_with(name: str, end: str) -> bool:
    """Whether `end` is the name's last parts, or all of it."""
    return name == end or name.endswith("." + end)
