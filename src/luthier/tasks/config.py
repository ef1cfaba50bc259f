"""Every task's config behind one discriminated field: `task: {type: ...}`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from luthier.tasks.art.schema import ArtConfig
from luthier.tasks.chat.schema import ChatConfig
from luthier.tasks.classification.schema import ClassificationConfig
from luthier.tasks.completion.schema import CompletionConfig
from luthier.tasks.music.schema import MusicConfig
from luthier.tasks.preference.schema import PreferenceConfig
from luthier.tasks.qa.schema import QaConfig
from luthier.tasks.tagging.schema import TaggingConfig
from luthier.tasks.text.schema import TextConfig
from luthier.tasks.translation.schema import TranslationConfig

TaskConfig = Annotated[
    ChatConfig
    | CompletionConfig
    | PreferenceConfig
    | QaConfig
    | TranslationConfig
    | TextConfig
    | ClassificationConfig
    | TaggingConfig
    | MusicConfig
    | ArtConfig,
    Field(discriminator="type"),
]
