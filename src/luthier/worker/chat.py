"""Talk with a tuned model, an adapter or a base: one renderer with training, one resident base for both sides."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from luthier.base.adapter_files import CONFIG_FILE, read_adapter
from luthier.base.fetch import resolve
from luthier.base.folder import read_json
from luthier.base.identity import read_trained_over
from luthier.base.load import Base
from luthier.base.model import load_model
from luthier.checkpoints.peft_format import slot_from_adapter
from luthier.data.encoders import is_encoder
from luthier.data.template import Renderer
from luthier.engine.pack import BASE_SLOT
from luthier.engine.sample import Request, Sampler, SamplingParams
from luthier.errors import ModelError, RunError
from luthier.export.whole import is_of_peft
from luthier.methods.peft.layer import read_peft
from luthier.recipe import Recipe
from luthier.tasks.registry import head_of, task_for
from luthier.worker.loading import Placement, load_placed, load_tuned, placement_of
from luthier.worker.run_folder import RunFolder


class ChatSession:
    """A loaded model that replies to conversations.

    Args:
        base: The resident base.
        renderer: Tokenizer and chat template, as in training.
        slot: The tuned model's slot, or None for the base alone.
        original: Loads the base where `base` is a model whose own weights were trained, or None.
        is_completion: The model was tuned to continue text: the last turn's text is continued, without a chat template.
    """

    def __init__(
        self,
        base: Base,
        renderer: Renderer,
        slot: int | None,
        *,
        original: Callable[[], Base] | None = None,
        is_completion: bool = False,
    ) -> None:
        if not is_completion and not renderer.can_chat:
            raise ModelError(
                "this base has no chat template, so it cannot hold a conversation",
                fix="tune it with `task: chat` on a base with a template, or use a completion model",
            )
        self.base = base
        self.renderer = renderer
        self.slot = slot
        self.is_completion = is_completion
        self._original = original
        self._sampler = Sampler(base, renderer.decode, remembers=True)
        self._base_sampler: Sampler | None = self._sampler if original is None else None
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
            tokens = self.renderer.with_bos(self.renderer.encode(str(messages[-1]["content"])))
        else:
            tokens = self.renderer.chat_prompt(messages, tools)
        params = SamplingParams(
            max_new_tokens=max_new_tokens or 512,
            temperature=temperature,
            top_p=top_p,
            seed=seed or 0,
            stop_ids=tuple(self.renderer.stop_ids),
        )
        slot = BASE_SLOT if base or self.slot is None else self.slot
        sampler = self._sampler_of_base() if base else self._sampler
        name = str(next(self._names))
        sampler.submit(Request(name, np.array(tokens, dtype=np.int32), slot, params))
        try:
            while sampler.has_work:
                for event in sampler.step():
                    if event.text_delta:
                        yield event.text_delta
        finally:
            sampler.cancel(name)

    def _sampler_of_base(self) -> Sampler:
        """The base is another model where its own weights were trained; it is loaded when it is first asked."""
        if self._base_sampler is None:
            assert self._original is not None
            self._base_sampler = Sampler(self._original(), self.renderer.decode, remembers=True)
        return self._base_sampler


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
    _check_writes(folder)
    return ChatSession(load_placed(_place(folder)), Renderer.load(folder), None)


def _open_run(path: Path) -> ChatSession:
    run = RunFolder.open(path)
    recipe = run.recipe()
    if head_of(task_for(recipe.task)) is not None:
        raise RunError(
            f"{path} is of task {recipe.task.type}, whose model does not write",
            fix=f"ask it about rows with `luthier predict {path} FILE`, or judge it with `luthier eval {path}`",
        )
    placement = placement_of(recipe)
    tuned = load_tuned(run, recipe, placement)
    original = None
    if tuned.base_slot is None:
        original = partial(load_placed, placement, recipe.compute.threads)
    is_completion = recipe.task.type in ("completion", "text")
    return ChatSession(tuned.base, tuned.renderer, tuned.slot, original=original, is_completion=is_completion)


def _open_adapter(path: Path) -> ChatSession:
    if is_of_peft(path):
        return _open_peft(path)
    files = read_adapter(path)
    if files.base_name is None:
        raise ModelError(f"{path} does not say which base it was trained over", fix="set base_model_name_or_path in it")
    folder = resolve(files.base_name)
    _check_writes(folder)
    key = read_trained_over(files.folder)
    base = load_placed(replace(_place(folder), quantization=key.quantization if key is not None else None))
    slot = slot_from_adapter(base, path)
    tokenizer = path if (path / "tokenizer.json").exists() else folder
    return ChatSession(base, Renderer.load(tokenizer), slot.index)


def _open_peft(path: Path) -> ChatSession:
    base_name = read_json(path / CONFIG_FILE).get("base_model_name_or_path")
    if not base_name:
        raise ModelError(f"{path} does not say which base it was trained over", fix="set base_model_name_or_path in it")
    folder = resolve(base_name)
    _check_writes(folder)
    placement = _place(folder)
    base = read_peft(load_model(folder, device=placement.device, dtype=placement.dtype), folder, path)
    tokenizer = path if (path / "tokenizer.json").exists() else folder
    return ChatSession(base, Renderer.load(tokenizer), base.slot.index)


def _check_writes(folder: Path) -> None:
    """Refuse a base that reads and does not write, before it is loaded."""
    config = read_json(folder / "config.json")
    if is_encoder(config):
        raise ModelError(
            f"{folder} is an encoder ({config['model_type']}), which reads texts and does not write",
            "a base that writes, or a model tuned on one",
            "ask a run on an encoder about rows: `luthier predict RUN FILE`",
        )


def _place(folder: Path) -> Placement:
    return placement_of(Recipe.model_validate({"base": str(folder), "data": {"train": "-"}}))
