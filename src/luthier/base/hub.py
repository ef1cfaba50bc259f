"""The Hub: what is cached of it, whether it answers, and fetching one model's files. Imports huggingface_hub only.

Only configs, tokenizers and safetensors are ever asked for. A Hub that does not answer is noticed within
`ANSWER_SECONDS`, whatever the resolver and the sockets are waiting for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from luthier.base.folder import SINGLE_WEIGHTS, WEIGHTS_INDEX, check_base_folder
from luthier.errors import ModelError

ANSWER_SECONDS = 6.0
_REQUEST_SECONDS = 4.0

TOKENIZER_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
WEIGHT_PATTERNS = (SINGLE_WEIGHTS, WEIGHTS_INDEX, "model-*.safetensors")

T = TypeVar("T")


class HubUnreachableError(Exception):
    """The Hub did not answer; the text says why, in one clause."""


def cached_snapshot(hub_id: str, revision: str) -> Path | None:
    """The newest cached snapshot that is whole, or None. Asks no network."""
    folder = _local_snapshot(hub_id, revision)
    if folder is None:
        return None
    try:
        check_base_folder(folder)
    except ModelError:  # a download that broke off, or only its tokenizer
        return None
    return folder


def cached_tokenizer(hub_id: str, revision: str) -> Path | None:
    """The cached snapshot if it holds at least the tokenizer, or None. Asks no network."""
    folder = _local_snapshot(hub_id, revision)
    return folder if folder is not None and (folder / "tokenizer.json").is_file() else None


def list_files(hub_id: str, revision: str) -> list[str]:
    """The names of a model's files; the first and quick question to the Hub.

    Raises:
        HubUnreachableError: if it does not answer within `ANSWER_SECONDS`.
        ModelError: if it answers that the model does not exist or may not be fetched.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    def ask() -> list[str]:
        siblings = HfApi().model_info(hub_id, revision=revision, timeout=_REQUEST_SECONDS).siblings
        return [sibling.rfilename for sibling in siblings or []]

    try:
        return _within(ANSWER_SECONDS, ask)
    except GatedRepoError:
        raise _gated(hub_id) from None
    except RevisionNotFoundError:
        raise ModelError(f"{hub_id} has no revision {revision!r} on the Hub", fix="name an existing one") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise ModelError(
            f"there is no folder {hub_id!r} here, and no model of that name on the Hub that you may see",
            "a folder, a Hub id, or a catalogue name",
            "check the spelling; for a private model log in with `hf auth login`",
        ) from None
    except HubUnreachableError:
        raise
    except Exception as error:
        # The HTTP library's own errors differ between versions of huggingface_hub; all of them mean the same here.
        raise HubUnreachableError(_one_line(error)) from error


def download(hub_id: str, revision: str, patterns: tuple[str, ...]) -> Path:
    """Fetch the files that match into the Hub's own cache; what is there already is not fetched again.

    Raises:
        ModelError: if the model is gated, or the download broke off (asking again goes on from there).
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    try:
        return Path(
            snapshot_download(
                hub_id, revision=revision, allow_patterns=list(patterns), etag_timeout=_REQUEST_SECONDS, max_workers=4
            )
        )
    except GatedRepoError:
        raise _gated(hub_id) from None
    except Exception as error:
        raise ModelError(
            f"the download of {hub_id} broke off: {_one_line(error)}",
            fix="try again; it goes on from where it stopped",
        ) from error


def download_base(hub_id: str, revision: str) -> Path:
    """Fetch a model's configs, tokenizer and safetensors.

    Raises:
        HubUnreachableError: if the Hub does not answer.
        ModelError: if the model has no safetensors, is gated, does not exist, or the download broke off.
    """
    names = list_files(hub_id, revision)
    if SINGLE_WEIGHTS not in names and WEIGHTS_INDEX not in names:
        raise ModelError(
            f"{hub_id} has no safetensors weights on the Hub",
            f"{SINGLE_WEIGHTS} or {WEIGHTS_INDEX}; other formats can run code or are for running only",
            "choose a model that has them, or convert it on a machine where you trust it and name the folder",
        )
    return download(hub_id, revision, TOKENIZER_FILES + WEIGHT_PATTERNS)


def _local_snapshot(hub_id: str, revision: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    # The one file that every model has leads to its snapshot; `snapshot_download` would judge completeness by files
    # that are never asked for here.
    found = try_to_load_from_cache(hub_id, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def _gated(hub_id: str) -> ModelError:
    return ModelError(
        f"{hub_id} is gated: its publisher wants the licence accepted first",
        "a Hub token whose owner was let in",
        f"accept the licence at https://huggingface.co/{hub_id}, then log in with `hf auth login`",
    )


def _within(seconds: float, ask: Callable[[], T]) -> T:
    """Run `ask` in a thread of its own: a stuck name lookup cannot be interrupted, only left behind."""
    answer: list[T] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            answer.append(ask())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work, daemon=True, name="luthier-hub")
    thread.start()
    thread.join(seconds)
    if failure:
        raise failure[0]
    if not answer:
        raise HubUnreachableError(f"no answer within {seconds:.0f} seconds")
    return answer[0]


def _one_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
