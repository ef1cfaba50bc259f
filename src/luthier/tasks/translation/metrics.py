"""Judging translations: sacrebleu's sums of a sentence, from which chrF and BLEU of any set of sentences follow.

chrF (Popović 2015) and BLEU (Papineni et al. 2002) are of a whole corpus: sums over its sentences come first, then one
formula. The sums are sacrebleu's (Post 2018, arXiv:1804.08771); `evaluate/corpus.py` has the formulas, and tests hold
the two against `corpus_score`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

CHRF, BLEU = "chrf", "bleu"


def sentence_statistics(hypothesis: str, references: Sequence[str], tokenizer: str) -> dict[str, tuple[float, ...]]:
    """Metric -> its sums of one sentence.

    - chrf: for each order 1 to 6, the n-grams of the hypothesis, of the closest reference, and of both.
    - bleu: the length of the hypothesis, of the closest reference, then for each order 1 to 4 the n-grams that are
      right, and for each order those there are.
    """
    chrf, bleu = _metric(CHRF, ""), _metric(BLEU, tokenizer)
    hypothesis = hypothesis.strip()
    # A text of nothing is a reference to sacrebleu, and no hypothesis.
    given = ([hypothesis], [[reference] for reference in references])
    return {
        CHRF: tuple(float(value) for value in chrf._extract_corpus_statistics(*given)[0]),
        BLEU: tuple(float(value) for value in bleu._extract_corpus_statistics(*given)[0]),
    }


def signatures(tokenizer: str, num_references: int) -> dict[str, str]:
    """Metric -> sacrebleu's signature, which says all that its value depends on."""
    found = {}
    for name, metric in ((CHRF, _metric(CHRF, "")), (BLEU, _metric(BLEU, tokenizer))):
        metric.corpus_score(["a"], [["a"]] * num_references)
        found[name] = str(metric.get_signature())
    return found


@functools.lru_cache(maxsize=8)
def _metric(name: str, tokenizer: str) -> Any:
    from sacrebleu import metrics

    return metrics.CHRF() if name == CHRF else metrics.BLEU(tokenize=tokenizer)
