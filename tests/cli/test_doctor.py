"""`luthier doctor` finds what is wrong and says what to do."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest
import typer

from luthier.cli import doctor
from luthier.cli.doctor import check_disk, check_hub, check_packages, doctor_command


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "not" / "yet"))
    monkeypatch.setenv("LUTHIER_OFFLINE", "1")


def test_a_sound_machine_has_no_problem(capsys: pytest.CaptureFixture[str]) -> None:
    doctor_command(json=True)
    findings = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert {"Python", "packages", "processor", "memory", "disk of the cache", "GPU", "cache", "Hub"} <= set(findings)
    assert findings["packages"]["level"] == "ok"
    assert findings["cache"]["level"] == "warning"
    assert "luthier models --fetch" in findings["cache"]["advice"]


def test_a_missing_package_is_a_problem(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    needs = ["numpy>=1", "numpy<0.1", "a-package-that-is-not-there>=2", "never-wanted; extra == 'dev'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: needs)
    old, missing = check_packages()
    assert (old.name, old.level, old.advice) == ("numpy", "problem", "pip install 'numpy<0.1'")
    assert (missing.found, missing.advice) == ("not installed", "pip install 'a-package-that-is-not-there>=2'")

    with pytest.raises(typer.Exit) as caught:
        doctor_command(json=False)
    assert caught.value.exit_code == 2
    assert "pip install 'a-package-that-is-not-there>=2'" in capsys.readouterr().out


def test_a_short_disk_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LEAST_DISK_BYTES", 10**18)
    assert [finding.level for finding in check_disk()] == ["warning", "warning"]


def test_a_hub_switched_off_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_hub().found == "switched off by LUTHIER_OFFLINE"
    monkeypatch.delenv("LUTHIER_OFFLINE")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert check_hub().found == "switched off by HF_HUB_OFFLINE"
