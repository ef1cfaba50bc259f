"""One process at a time trains a run folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from worker.test_train import recipe_for, train_in_this_process

import luthier
from luthier.errors import RunError, StorageError
from luthier.worker.run_folder import HOLDER_FILE
from luthier.worker.run_lock import holding

HOLD = """
import sys
from luthier.worker.run_lock import holding
with holding([sys.argv[1]]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_that_another_process_trains_is_refused_by_its_name(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tiny_llama, tmp_path, train={"max_steps": 1})
    command = [sys.executable, "-c", HOLD, recipe["output"]]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        for resume in (False, True):
            with pytest.raises(RunError, match=rf"is being trained already, by process {other.pid} on .* since 20"):
                luthier.train(recipe, resume=resume)
        other.kill()  # the system lets go of what it held
    assert luthier.train(recipe).status == "done"
    assert not (tmp_path / "run" / HOLDER_FILE).exists()


def test_a_second_training_in_one_process_is_refused_too(tmp_path: Path) -> None:
    with (
        holding([str(tmp_path / "a"), str(tmp_path / "b")]),
        pytest.raises(RunError, match=f"by process {os.getpid()} "),
        holding([str(tmp_path / "b")]),
    ):
        pytest.fail("the lock was given twice")
    with holding([str(tmp_path / "b")]):
        holder = json.loads((tmp_path / "b" / HOLDER_FILE).read_text())
    assert holder["process"] == os.getpid()


def test_an_exclusive_run_holds_its_folder_in_its_own_process(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tiny_llama, tmp_path, train={"max_steps": 1}) | {"method": "full"}
    with holding([recipe["output"]]), pytest.raises(RunError, match="is being trained already"):
        luthier.train(recipe)
    assert train_in_this_process(recipe).status == "done"


def test_somebody_elses_folder_gets_no_lock(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("not a run")
    with holding([str(tmp_path)]):
        assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_folder_that_cannot_be_made_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="choose another folder"), holding([str(tmp_path / "file" / "run")]):
        pytest.fail("there is no such folder")
