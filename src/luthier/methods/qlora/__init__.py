"""QLoRA: LoRA over a base whose linear layers are held in NF4 with double quantization.

    y = dequantize(W_nf4) x + c B A x,    c = alpha / r

Dettmers et al. 2023, arXiv:2305.14314. Trained and saved are LoRA's factors, by LoRA's arithmetic
(`methods/lora/layer.py`). What is QLoRA's own is the base: `base/nf4.py` holds it, `ops/nf4.py` dequantizes it, a layer
at a time. `config.py` has the recipe's fields.
"""
