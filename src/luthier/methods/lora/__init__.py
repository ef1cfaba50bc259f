"""LoRA: a low-rank update beside each adapted linear layer.

    y = W x + b + c B A x,    A [r, inputs], B [outputs, r], c = alpha / r

Trained: A and B of every target. Saved: both, as PEFT names them. Variants by fields of one config: `rank_stabilized`
(rsLoRA, c = alpha / sqrt(r)), `lora_plus_ratio` (LoRA+, a higher rate for B), `init: pissa | olora` (`start.py`).

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.
`config.py` the recipe's fields, `layer.py` the arithmetic, `files.py` PEFT's files.
"""
