"""From logits to tokens: greedy or drawn, each row by its own parameters and nobody else's.

Shapes: P rows, V vocabulary, S the rows that are drawn, M candidates of a drawn row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from luthier.engine.request import SamplingParams, TokenLogprob
from luthier.ops.counter import mix_number

_NUM_CANDIDATES = (256, 4096)
"""A nucleus is first sought among this many likeliest tokens: a full sort takes ten times as long, and is seldom
needed."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A row's token. Where `is_finite` is false the logits were no numbers, and the token means nothing."""

    token: int
    is_finite: bool
    logprob: TokenLogprob | None = None


def choose(logits_PV: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> list[Choice]:
    """Choose each row's next token.

    Args:
        logits_PV: In any floating dtype; computed on in float32 at least.
        positions: Position in its sequence of the token to choose.
    """
    if logits_PV.dtype in (torch.float16, torch.bfloat16):
        logits_PV = logits_PV.float()
    best_P, at_P = logits_PV.max(dim=-1)
    is_finite = best_P.isfinite().tolist()
    tokens = at_P.tolist()
    drawn = [row for row, param in enumerate(params) if param.temperature > 0 and is_finite[row]]
    if drawn:
        for row, token in zip(drawn, _draw(logits_PV, params, positions, drawn), strict=True):
            tokens[row] = token
    logprobs = _logprobs(logits_PV, params, tokens)
    return [Choice(token, is_finite[row], logprobs.get(row)) for row, token in enumerate(tokens)]


def _draw(
    logits_PV: Tensor, params: Sequence[SamplingParams], positions: Sequence[int], rows: Sequence[int]
) -> list[int]:
    device = logits_PV.device
    logits_SV = logits_PV if len(rows) == len(params) else logits_PV[torch.tensor(rows, device=device)]
    temperature_S1 = torch.tensor([[params[row].temperature] for row in rows], dtype=logits_SV.dtype, device=device)
    # The largest becomes 0 first, so that no temperature overflows.
    probability_SV = ((logits_SV - logits_SV.amax(dim=-1, keepdim=True)) / temperature_S1).softmax(dim=-1)
    uniform_S = torch.tensor([_uniform(params[row].seed, positions[row]) for row in rows], dtype=torch.float64)
    top_p_S = torch.tensor([params[row].top_p for row in rows], dtype=torch.float64)
    uniform_S, top_p_S = uniform_S.to(device), top_p_S.to(device)
    tokens_S = torch.empty(len(rows), dtype=torch.int64, device=device)
    whole = top_p_S == 1.0
    if whole.any():
        tokens_S[whole] = _inverse(probability_SV[whole].double().cumsum(-1), uniform_S[whole])
    restricted = (~whole).nonzero().flatten()
    if len(restricted):
        tokens_S[restricted] = _nucleus(probability_SV[restricted], top_p_S[restricted], uniform_S[restricted])
    return tokens_S.tolist()


def _uniform(seed: int, position: int) -> float:
    """A number in (0, 1) from the seed and the position alone."""
    return (mix_number(seed, position) + 0.5) / 2**32


def _inverse(cumulative_SM: Tensor, uniform_S: Tensor) -> Tensor:
    """int64 [S]: where each row's cumulative mass first passes its share `uniform` of the whole."""
    target_S1 = (uniform_S * cumulative_SM[:, -1])[:, None]
    return torch.searchsorted(cumulative_SM, target_S1, right=True)[:, 0].clamp(max=cumulative_SM.shape[-1] - 1)


def _nucleus(probability_SV: Tensor, top_p_S: Tensor, uniform_S: Tensor) -> Tensor:
    size = probability_SV.shape[-1]
    tokens_S = torch.empty_like(top_p_S, dtype=torch.int64)
    open_S = torch.arange(len(top_p_S), device=top_p_S.device)
    for num_candidates in (*(count for count in _NUM_CANDIDATES if count < size), size):
        candidate_SM, token_SM = probability_SV[open_S].topk(num_candidates, dim=-1)
        cumulative_SM = candidate_SM.double().cumsum(-1)
        is_enough = cumulative_SM[:, -1] >= top_p_S[open_S]
        if num_candidates == size:
            is_enough = torch.ones_like(is_enough)  # rounding may leave the whole a hair below top_p
        at = open_S[is_enough]
        cumulative_SM = cumulative_SM[is_enough]
        last_S1 = torch.searchsorted(cumulative_SM, top_p_S[at][:, None]).clamp(max=num_candidates - 1)
        inside_SM = cumulative_SM.minimum(cumulative_SM.gather(1, last_S1))
        tokens_S[at] = token_SM[is_enough].gather(1, _inverse(inside_SM, uniform_S[at])[:, None])[:, 0]
        open_S = open_S[~is_enough]
        if not len(open_S):
            break
    return tokens_S


def _logprobs(logits_PV: Tensor, params: Sequence[SamplingParams], tokens: Sequence[int]) -> dict[int, TokenLogprob]:
    wanted = {row: param.num_logprobs for row, param in enumerate(params) if param.num_logprobs is not None}
    if not wanted:
        return {}
    rows_S = torch.tensor(list(wanted), device=logits_PV.device)
    logprob_SV = logits_PV[rows_S].log_softmax(dim=-1)
    chosen = logprob_SV.gather(1, torch.tensor([[tokens[row]] for row in wanted], device=rows_S.device))[:, 0].tolist()
    most = min(max(wanted.values()), logprob_SV.shape[-1])
    values, indices = (part.tolist() for part in logprob_SV.topk(most, dim=-1))
    return {
        row: TokenLogprob(tokens[row], chosen[i], tuple(zip(indices[i][:count], values[i][:count], strict=True)))
        for i, (row, count) in enumerate(wanted.items())
    }
