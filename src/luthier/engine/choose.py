"""From logits to tokens: greedy or drawn, each row by its own parameters and nobody else's.

Shapes: P rows, V vocabulary, S the rows that are drawn, M candidates of a drawn row, B blocks of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.engine.request import SamplingParams, TokenLogprob
from luthier.ops.counter import mix_number

_NUM_CANDIDATES = (256, 4096)
"""A nucleus is first sought among this many likeliest tokens: a full sort takes ten times as long, and is seldom
needed."""

_BLOCK = 256
"""Tokens of the vocabulary that are weighed together before one of them is drawn."""


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
    weight_SV = (logits_SV - logits_SV.amax(dim=-1, keepdim=True)).div_(temperature_S1).exp_()
    uniform_S = torch.tensor([_uniform(params[row].seed, positions[row]) for row in rows], dtype=torch.float64)
    uniform_S = uniform_S.to(device)
    tokens = [0] * len(rows)
    free = [at for at, row in enumerate(rows) if params[row].top_p == 1.0]
    restricted = [at for at, row in enumerate(rows) if params[row].top_p < 1.0]
    for group in (free, restricted):
        if not group:
            continue
        own_SV, own_S = (weight_SV, uniform_S) if len(group) == len(rows) else (weight_SV[group], uniform_S[group])
        if group is free:
            drawn_S = _from_all(own_SV, own_S)
        else:
            top_p_S = torch.tensor([params[rows[at]].top_p for at in group], dtype=torch.float64, device=device)
            drawn_S = _from_nucleus(own_SV, own_S, top_p_S)
        for at, token in zip(group, drawn_S.tolist(), strict=True):
            tokens[at] = token
    return tokens


def _uniform(seed: int, position: int) -> float:
    """A number in (0, 1) from the seed and the position alone."""
    return (mix_number(seed, position) + 0.5) / 2**32


def _inverse(cumulative_SM: Tensor, share_S: Tensor) -> Tensor:
    """int64 [S]: where each row's cumulative weight first passes that share of the whole."""
    target_S1 = (share_S * cumulative_SM[:, -1])[:, None]
    return torch.searchsorted(cumulative_SM, target_S1, right=True)[:, 0].clamp(max=cumulative_SM.shape[-1] - 1)


def _from_all(weight_SV: Tensor, uniform_S: Tensor) -> Tensor:
    """Draw by weight: first a block of the vocabulary, then within it; float64 sums over all of it would cost more."""
    rest = -weight_SV.shape[-1] % _BLOCK
    padded_SV = F.pad(weight_SV, (0, rest)) if rest else weight_SV
    weight_SBM = padded_SV.view(len(padded_SV), -1, _BLOCK)
    block_SB = weight_SBM.sum(dim=-1).double()
    cumulative_SB = block_SB.cumsum(dim=-1)
    block_S = _inverse(cumulative_SB, uniform_S)
    at_S = torch.arange(len(block_S), device=block_S.device)
    passed_S = cumulative_SB[at_S, block_S] - block_SB[at_S, block_S]
    share_S = (uniform_S * cumulative_SB[:, -1] - passed_S) / block_SB[at_S, block_S]
    # Rounding may put the share at a bound; the last entry may weigh nothing and must not be drawn.
    share_S = share_S.clamp(min=0.0, max=1.0 - 1e-12)
    return block_S * _BLOCK + _inverse(weight_SBM[at_S, block_S].double().cumsum(dim=-1), share_S)


def _from_nucleus(weight_SV: Tensor, uniform_S: Tensor, top_p_S: Tensor) -> Tensor:
    """Draw from the smallest set of likeliest tokens that has `top_p` of the weight."""
    size = weight_SV.shape[-1]
    needed_S = top_p_S * weight_SV.sum(dim=-1).double()
    tokens_S = torch.empty_like(uniform_S, dtype=torch.int64)
    open_S = torch.arange(len(uniform_S), device=uniform_S.device)
    for num_candidates in (*(count for count in _NUM_CANDIDATES if count < size), size):
        candidate_SM, token_SM = weight_SV[open_S].topk(num_candidates, dim=-1)
        cumulative_SM = candidate_SM.double().cumsum(dim=-1)
        is_enough = cumulative_SM[:, -1] >= needed_S[open_S]
        if num_candidates == size:
            is_enough = torch.ones_like(is_enough)  # rounding may leave the whole a hair below top_p
        at, cumulative_SM = open_S[is_enough], cumulative_SM[is_enough]
        last_S1 = torch.searchsorted(cumulative_SM, needed_S[at][:, None]).clamp(max=num_candidates - 1)
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
