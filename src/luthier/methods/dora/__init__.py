"""DoRA: the adapted weight apart into length and direction, each row's length trained by itself.

    y = m / |W + c B A|_row * (W + c B A) x + b,    c = alpha / r

Trained: A and B of every target, and m, one number an output, which starts at the rows' lengths in the base. Saved: the
three, as PEFT names them. The norm is a constant to the gradient (section 4.3 of the paper).

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353.
`config.py` the recipe's fields, `layer.py` the arithmetic, `files.py` PEFT's files.
"""
