"""Judging short answers as SQuAD does (Rajpurkar et al. 2016, arXiv:1606.05250; 2018, arXiv:1806.03822).

An answer is normalized: lower case, no punctuation, no English articles, single spaces. Exact match and F1 over words
are the best over a question's right answers. A question without an answer is right exactly when nothing is answered.
Scripts that write without spaces count characters as words there, as MLQA does (Lewis et al. 2020, arXiv:1910.07475),
and punctuation is that of all scripts.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_UNSPACED = re.compile("([\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff])")
"""Thai, Lao, kana, Han."""


def normalize(answer: str) -> str:
    """The answer in the form in which answers are compared."""
    lowered = answer.lower()
    # SQuAD takes out string.punctuation, of which "$" and the like are symbols.
    kept = "".join(c for c in lowered if not (unicodedata.category(c).startswith("P") or c in "$+<=>^`|~"))
    return " ".join(_ARTICLES.sub(" ", kept).split())


def exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the prediction is one of the answers, once normalized; with no answers, whether it is empty."""
    return any(normalize(prediction) == normalize(answer) for answer in answers or [""])


def f1(prediction: str, answers: Sequence[str]) -> float:
    """The best word F1 over the answers, 0 to 1; with no answers, 1 for an empty prediction."""
    return max(_f1(prediction, answer) for answer in answers or [""])


def _f1(prediction: str, answer: str) -> float:
    found, right = _words(prediction), _words(answer)
    if not found or not right:  # as SQuAD 2.0: nothing was right to say, or nothing was said
        return float(found == right)
    shared = sum((Counter(found) & Counter(right)).values())
    return 2 * shared / (len(found) + len(right))


def _words(answer: str) -> list[str]:
    return _UNSPACED.sub(r" \1 ", normalize(answer)).split()
