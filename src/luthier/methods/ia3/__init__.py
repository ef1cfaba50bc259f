"""(IA)^3: learned factors of keys, values and the feed-forward's inner activations; no matrix at all.

    y = l * (W x + b)    for keys and values        y = W (l * x) + b    for the feed-forward's down projection

Trained: one vector l a target, which starts at one. Saved: the vectors, as PEFT names them.

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
arXiv:2205.05638. `config.py` the recipe's fields, `targets.py` which layers, `layer.py` the arithmetic, `files.py`
PEFT's files.
"""
