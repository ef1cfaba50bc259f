"""Talk with a tuned model, an adapter or a base: one renderer with training, one resident base for both sides."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from luthier.base.adapter_files import read_adapter
from luthier.base.fetch import resolve
from luthier.base.identity import read_trained_over
from luthier.base.load import Base
from luthier.checkpoints.peft_format import slot_from_adapter
from luthier.data.template import Renderer
from luthier.engine.pack import BASE_SLOT
from luthier.engine.sample import Request, Sampler, SamplingParams
from luthier.engine.slot import Slot
from luthier.errors import ModelError, RunError
from luthier.recipe import Recipe
from luthier.worker.loading import Placement, load_placed, placement_of
from luthier.worker.run_folder import RunFolder


class ChatSession:
    """A loaded model that replies to conversations.

    Args:
        base: The resident base.
        renderer: Tokenizer and chat template, as in training.
        slot: The tuned model's slot, or None for the base alone.
        is_completion: The model was tuned to continue text: the last turn's text is continued, without a chat template.
    """

    def __init__(self, base: Base, renderer: Renderer, slot: Slot | None, *, is_completion: bool = False) -> None:
        if not is_completion and not renderer.can_chat:
            raise ModelError(
                "this base has no chat template, so it cannot hold a conversation",
                fix="tune it with `task: chat` on a base with a template, or use a completion model",
            )
        self.base = base
        self.renderer = renderer
        self.slot = slot
        self.is_completion = is_completion
        self._sampler = Sampler(base, renderer.decode, remembers=True)
        self._names = itertools.count()

    @property
    def has_adapter(self) -> bool:
        """Whether there is a tuned model besides the base."""
        return self.slot is not None

    def reply(
        self,
        messages: list[dict[str, Any]],
        *,
        base: bool = False,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        max_new_tokens: int | None = None,
        tools: list[dict[str, Any]] | None = None,
    ) -> Iterator[str]:
        """Stream the reply to a conversation as pieces of text.

        Args:
            messages: OpenAI's form, the last one from the user.
            base: Let the base reply, without the adapter.
            seed: Repeats the same draws at temperature > 0; None is 0.
        """
        if self.is_completion:
            tokens = self.renderer.encode(str(messages[-1]["content"]))
            if self.renderer.bos_id is not None and tokens[:1] != [self.renderer.bos_id]:
                tokens = [self.renderer.bos_id, *tokens]
        else:
            tokens = self.renderer.chat_prompt(messages, tools)
        params = SamplingParams(
            max_new_tokens=max_new_tokens or 512,
            temperature=temperature,
            top_p=top_p,
            seed=seed or 0,
            stop_ids=tuple(self.renderer.stop_ids),
        )
        slot = BASE_SLOT if base or self.slot is None else self.slot.index
        name = str(next(self._names))
        self._sampler.submit(Request(name, np.array(tokens, dtype=np.int32), slot, params))
        try:
            while self._sampler.has_work:
                for event in self._sampler.step():
                    if event.text_delta:
                        yield event.text_delta
        finally:
            self._sampler.cancel(name)


def open_chat(model: str | Path) -> ChatSession:
    """Load what `model` names: a run folder, a PEFT adapter's folder, or a base (a folder or a name).

    Raises:
        RunError: for a run without an adapter, or one whose task has nothing to say (a classifier).
        ModelError: for an adapter or a base that does not load.
    """
    path = Path(model)
    if RunFolder(path).has_state:
        return _open_run(path)
    if (path / "adapter_config.json").exists():
        return _open_adapter(path)
    folder = resolve(str(model))
    return ChatSession(load_placed(_place(folder)), Renderer.load(folder), None)


def _open_run(path: Path) -> ChatSession:
    run = RunFolder.open(path)
    recipe = run.recipe()
    if recipe.task.type == "classification":
        raise RunError(f"{path} is a classifier, which does not write", fix="judge it with `luthier eval`")
    if not run.adapter.exists():
        raise RunError(f"{path} has no adapter yet", fix="let it train, or go on with `luthier train ... --resume`")
    base = load_placed(placement_of(recipe), recipe.compute.threads)
    slot = slot_from_adapter(base, run.adapter)
    is_completion = recipe.task.type in ("completion", "text")
    return ChatSession(base, Renderer.load(run.adapter), slot, is_completion=is_completion)


def _open_adapter(path: Path) -> ChatSession:
    files = read_adapter(path)
    if files.base_name is None:
        raise ModelError(f"{path} does not say which base it was trained over", fix="set base_model_name_or_path in it")
    folder = resolve(files.base_name)
    key = read_trained_over(files.folder)
    base = load_placed(replace(_place(folder), quantization=key.quantization if key is not None else None))
    slot = slot_from_adapter(base, path)
    tokenizer = path if (path / "tokenizer.json").exists() else folder
    return ChatSession(base, Renderer.load(tokenizer), slot)


def _place(folder: Path) -> Placement:
    return placement_of(Recipe.model_validate({"base": str(folder), "data": {"train": "-"}}))
