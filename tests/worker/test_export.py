"""`luthier export --merged`: from a run, or from an adapter alone, to a folder that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from slots import distance, model_logits, sequences_for, slot_logits, stirred
from typer.testing import CliRunner

from luthier.base.identity import weights_identity
from luthier.base.load import load_base
from luthier.checkpoints.peft_format import write_adapter
from luthier.cli.main import app
from luthier.data.template import Renderer
from luthier.errors import ModelError, RunError
from luthier.recipe import Recipe, validate
from luthier.types import AdapterSpec
from luthier.worker.export import export_run
from luthier.worker.run_folder import RunFolder

SPEC = AdapterSpec(rank=2, alpha=8.0)


@pytest.fixture
def run(tiny_llama: Path, tmp_path: Path) -> Path:
    """A run that is done, as far as an export looks."""
    values = {"base": str(tiny_llama), "data": {"train": "train.jsonl"}, "output": str(tmp_path / "run")}
    folder = RunFolder.create(validate(Recipe, values, "recipe"))
    base = load_base(tiny_llama)
    write_adapter(stirred(base, SPEC), base, folder.adapter, base_name=str(tiny_llama))
    Renderer.load(tiny_llama).save(folder.adapter)
    folder.write_json("result.json", {"base_sha256": weights_identity(tiny_llama)})
    folder.set_state("done")
    return folder.path


def says_the_same(folder: Path, base_folder: Path) -> bool:
    from transformers import AutoModelForCausalLM

    base = load_base(base_folder)
    sequences = sequences_for(SPEC)
    expected = slot_logits(base, stirred(base, SPEC), sequences)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    return distance(model_logits(model, sequences, classifies=False), expected) < 1e-4


def test_the_command_writes_into_the_run_by_default(run: Path, tiny_llama: Path) -> None:
    done = CliRunner().invoke(app, ["export", str(run), "--merged"])
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(run / "merged")
    assert says_the_same(run / "merged", tiny_llama)


def test_an_adapter_alone_finds_the_base_that_it_names(run: Path, tiny_llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = ["export", str(run / "adapter"), "--merged", "--output", str(output), "--dtype", "float32"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert says_the_same(output, tiny_llama)


def test_an_output_that_is_not_empty_is_refused_before_any_work(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not empty"):
        export_run(run, run)
    assert not (run / "model.safetensors").exists()


def test_a_run_without_an_adapter_is_refused(run: Path, tmp_path: Path) -> None:
    (run / "adapter").rename(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="has no adapter yet"):
        export_run(run, tmp_path / "out")


def test_another_base_under_the_same_name_is_refused(run: Path, tmp_path: Path) -> None:
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    (run / "result.json").write_text(json.dumps(result | {"base_sha256": "0" * 64}), encoding="utf-8")
    with pytest.raises(ModelError, match="was trained over the weights 000000000000"):
        export_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_names_no_base_is_refused(run: Path, tmp_path: Path) -> None:
    path = run / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"base_model_name_or_path": None}), encoding="utf-8")
    with pytest.raises(ModelError, match="does not say which base"):
        export_run(run / "adapter", tmp_path / "out")
