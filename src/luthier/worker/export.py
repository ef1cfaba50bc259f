"""From a run or an adapter to files for other runtimes."""

from __future__ import annotations

from pathlib import Path

from luthier.base.adapter_files import CONFIG_FILE, read_adapter
from luthier.base.fetch import resolve
from luthier.base.folder import read_json
from luthier.base.identity import read_trained_over, weights_identity
from luthier.errors import ModelError, RunError
from luthier.export.merged import check_free, export_merged
from luthier.export.whole import export_model, export_peft_merged, is_of_peft
from luthier.worker.progress import Progress, SilentProgress
from luthier.worker.run_folder import RunFolder, owns_weights


def export_run(run: str | Path, output: Path, *, dtype: str = "auto", progress: Progress | None = None) -> Path:
    """Write a run's base and adapter, or a PEFT adapter's, as one plain transformers folder.

    Args:
        run: A run's folder, or an adapter's as PEFT writes it.
        output: Missing or empty.
        dtype: As `export_merged` takes it; "auto" for the base's own.

    Raises:
        RunError: when the run has no adapter yet, or `output` is not empty.
        ModelError: when the base cannot be had or is another one, or the export differs from base and adapter.
        StorageError: where writing fails.
    """
    progress = progress or SilentProgress()
    check_free(output)
    path = Path(run)
    saved_dtype = None if dtype == "auto" else dtype
    recipe = RunFolder.open(path).recipe() if RunFolder(path).has_state else None
    if recipe is not None and owns_weights(recipe):
        model = RunFolder.open(path).model
        if not model.exists():
            raise RunError(f"{path} has no model yet", fix="let it train, or go on with --resume")
        return export_model(model, output, dtype=saved_dtype, on_progress=progress.stage)
    base_folder, adapter = _of_run(path, progress) if RunFolder(path).has_state else _of_adapter(path, progress)
    if is_of_peft(adapter) or (recipe is not None and recipe.method.runs == "exclusive"):
        return export_peft_merged(base_folder, adapter, output, dtype=saved_dtype, on_progress=progress.stage)
    export_merged(base_folder, adapter, output, dtype=saved_dtype, on_progress=progress.stage)
    key = read_trained_over(read_adapter(adapter).folder)
    if key is not None and key.quantization is not None:
        progress.note(
            f"merged onto the base as it was in training, dequantized from {key.quantization.upper()}, not onto its "
            f"original weights; {output / 'README.md'} says what that means"
        )
    return output


def _of_run(path: Path, progress: Progress) -> tuple[Path, Path]:
    folder = RunFolder.open(path)
    if not folder.adapter.exists():
        raise RunError(f"{path} has no adapter yet", fix="let it train, or go on with --resume")
    name = folder.recipe().base
    base_folder = resolve(name, progress.note)
    trained_over = (folder.read_json("result.json") or {}).get("base_sha256")
    found = weights_identity(base_folder)
    if trained_over not in (None, found):
        raise ModelError(
            f"{path} was trained over the weights {trained_over[:12]}, and {name} has {found[:12]} now",
            "the same base",
            f"put back what {name} was when the run trained",
        )
    return base_folder, folder.adapter


def _of_adapter(path: Path, progress: Progress) -> tuple[Path, Path]:
    if is_of_peft(path):
        folder, base_name = path, read_json(path / CONFIG_FILE).get("base_model_name_or_path")
    else:
        files = read_adapter(path)
        folder, base_name = files.folder, files.base_name
    if not base_name:
        raise ModelError(
            f"{folder} does not say which base it was trained over",
            "base_model_name_or_path in adapter_config.json",
            "write its base there: a Hub id, a catalogue name or a folder",
        )
    return resolve(base_name, progress.note), folder
