"""The command as a user runs it: help, version, exit codes, and where an error goes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import luthier
from luthier.cli import main as cli
from luthier.errors import RecipeError

VERBS = ("init", "check", "train", "eval", "chat", "export", "models", "doctor")


def _luthier(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "luthier.cli.main", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def test_help_names_every_verb() -> None:
    result = CliRunner().invoke(cli.app, ["--help"])
    assert result.exit_code == 0
    assert all(verb in result.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str) -> None:
    result = CliRunner().invoke(cli.app, [verb, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_version(tmp_path: Path) -> None:
    done = _luthier("--version", folder=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"luthier {luthier.__version__}\n")


def test_a_missing_recipe_is_a_message_on_standard_error_and_exit_code_2(tmp_path: Path) -> None:
    done = _luthier("train", "nope.yaml", folder=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: there is no recipe at nope.yaml\n  to fix:   ")
    assert "Traceback" not in done.stderr


def test_a_misspelt_field_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("data: {train: t.jsonl}\ntrain: {epoch: 2}\n", encoding="utf-8")
    done = _luthier("train", "recipe.yaml", folder=tmp_path)
    assert done.returncode == 2
    assert "train.epoch is not a field (did you mean 'epochs'?)" in done.stderr


def test_a_wrong_override_is_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("data: {train: t.jsonl}\n", encoding="utf-8")
    done = _luthier("train", "recipe.yaml", "--set", "train.epochs", folder=tmp_path)
    assert done.returncode == 2
    assert "FIELD=VALUE" in done.stderr


def test_a_missing_argument_is_exit_code_2(tmp_path: Path) -> None:
    assert _luthier("eval", folder=tmp_path).returncode == 2


def test_an_export_without_a_kind_is_refused(tmp_path: Path) -> None:
    done = _luthier("export", "runs/first", folder=tmp_path)
    assert done.returncode == 2
    assert "luthier export runs/first --merged" in done.stderr


def _replace_app(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)


def test_an_error_keeps_brackets_and_long_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = "/data/" + "long/" * 40 + "[bold]x[/bold].jsonl"
    _replace_app(monkeypatch, RecipeError(f"there is no {path}", "a file", "name one"))
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"error: there is no {path}\n  expected: a file\n  to fix:   name one\n"


def test_an_interrupt_is_exit_code_130(monkeypatch: pytest.MonkeyPatch) -> None:
    _replace_app(monkeypatch, KeyboardInterrupt())
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert exit_info.value.code == 130


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    _replace_app(monkeypatch, ZeroDivisionError("a defect"))
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_the_python_face_takes_what_the_command_takes(tmp_path: Path) -> None:
    recipe = luthier.load_recipe({"data": {"train": "t.jsonl"}})
    assert isinstance(recipe, luthier.Recipe)
    assert set(luthier.__all__) <= set(dir(luthier))
    with pytest.raises(luthier.LuthierError, match="no recipe at"):
        luthier.train(tmp_path / "nope.yaml")
    with pytest.raises(AttributeError, match="nonsense"):
        _ = luthier.nonsense  # type: ignore[attr-defined]


def test_models_as_json_is_json_alone(tmp_path: Path) -> None:
    done = _luthier("models", "--json", folder=tmp_path)
    assert done.returncode == 0
    json.loads(done.stdout)
