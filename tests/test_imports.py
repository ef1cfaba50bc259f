"""Importing without collecting garbage: for as long as the import takes, and as it was before."""

from __future__ import annotations

import gc

import pytest

from luthier.imports import importing


@pytest.mark.parametrize("was_enabled", [True, False])
def test_the_collector_rests_while_something_is_imported(was_enabled: bool) -> None:
    try:
        gc.enable() if was_enabled else gc.disable()
        with importing():
            assert not gc.isenabled()
        with pytest.raises(ImportError), importing():
            raise ImportError
        assert gc.isenabled() == was_enabled
    finally:
        gc.enable()
