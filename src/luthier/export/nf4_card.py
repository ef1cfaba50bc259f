"""What a model is that was merged over a base in NF4, in words, for the README.md of its folder."""

from __future__ import annotations

from luthier.base.identity import BaseKey


def nf4_card(key: BaseKey) -> str:
    """The text.

    Args:
        key: The base that the adapter was trained over.
    """
    return f"""# A model tuned with QLoRA and merged

The adapter was trained over its base in NF4 with double quantization (bitsandbytes, compute type {key.dtype}). It was
merged onto the *dequantized* base: the values that the 4-bit weights stand for, plus the adapter's update. These are
not the base's original weights plus the update; that would be another model, which nobody trained or judged.

- The linear layers carry NF4's rounding of the base for good, though they are stored in a wider type now.
- Loaded as it is, this model says what base and adapter said in training; that was compared before the folder appeared.
- Quantized to 4 bits again it is rounded a second time. To stay in 4 bits, load the base in NF4 and the adapter on it.

Weights of the base: SHA-256 `{key.weights_hash}`
"""
