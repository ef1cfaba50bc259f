"""Captured steps of sampling on a CUDA device: the same logits as the steps themselves, and as the plain path's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from engine.test_sample import adapt, decode, prompt

from luthier.base.load import load_base
from luthier.engine.pack import BASE_SLOT
from luthier.engine.reply_graphs import ReplyGraphs
from luthier.engine.request import Request, SamplingParams
from luthier.engine.sample import Sampler

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_llama_tied"])
def test_captured_replies_have_the_plain_paths_logprobs(
    model: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder: Path = request.getfixturevalue(model)
    base = load_base(folder, device="cuda", dtype="bfloat16")
    slots = [adapt(base, seed).index for seed in range(3)] + [BASE_SLOT]
    requests = [
        Request(str(i), prompt(10 + 9 * i, i), slots[i % 4], SamplingParams(max_new_tokens=70, num_logprobs=0))
        for i in range(7)
    ]
    replays = []
    original = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(1) or original(graph))
    captured = Sampler(base, decode, max_rows=5).run(requests)
    assert len(replays) > 50
    monkeypatch.setattr(ReplyGraphs, "run", lambda *_: None)
    plain = Sampler(base, decode, max_rows=5).run(requests)
    for one, other in zip(captured, plain, strict=True):
        # Near ties may fall otherwise in bfloat16; up to there the log-probabilities agree.
        same = next((i for i, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=True)) if a != b), 70)
        assert same >= 4
        assert one.logprobs is not None
        assert other.logprobs is not None
        found, expected = ([p.logprob for p in reply.logprobs[:same]] for reply in (one, other))
        np.testing.assert_allclose(found, expected, atol=0.06)
