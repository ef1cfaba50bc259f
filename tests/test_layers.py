"""What may be loaded where, seen from outside: core without torch, the engine without pydantic, `--help` in a moment.

The contracts in pyproject.toml (`lint-imports`) hold the same layers over the source; these tests hold what is loaded.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "luthier"
HEAVY = ("torch", "transformers", "peft")
ENGINE = ("base", "checkpoints", "distributed", "engine", "evaluate", "export", "objectives", "ops")

BLOCK = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} is not there")

sys.meta_path.insert(0, Refuse())
"""


def _modules(*parts: str) -> list[str]:
    """Dotted names of a package's modules, or of one module."""
    path = PACKAGE.joinpath(*parts)
    files = [path.with_suffix(".py")] if path.with_suffix(".py").is_file() else sorted(path.rglob("*.py"))
    assert files, f"no module at {path}"
    names = (".".join(("luthier", *file.relative_to(PACKAGE).with_suffix("").parts)) for file in files)
    return [name.removesuffix(".__init__") for name in names]


def _core() -> list[str]:
    single = ("compute", "deepspeed_file", "errors", "files", "imports", "recipe", "settings", "strict", "types")
    names = [name for part in (*single, "data", "tasks") for name in _modules(part)]
    names += [name for name in _modules("methods") if name.endswith("config")]
    # Not core, but what a check and the service need to find a base without loading torch.
    return ["luthier", *names, "luthier.base.fetch", "luthier.base.catalogue"]


def _engine() -> list[str]:
    names = [name for part in ENGINE for name in _modules(part)]
    if importlib.util.find_spec("triton") is None:  # it comes with torch's builds for CUDA alone
        names = [name for name in names if not name.startswith("luthier.ops.kernels.")]
    return names + [name for name in _modules("methods") if not name.endswith("config")]


def _record() -> list[str]:
    names = [name for part in ("client", "registry", "service", "store") for name in _modules(part)]
    # Composing, but loaded by the API's process.
    return [
        *(name for name in names if ".migrations." not in name),
        "luthier.cli.serve",
        "luthier.cli.tenants",
        "luthier.worker.served_bases",
        "luthier.worker.supervisor",
    ]


def _run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def _heavy_after(statement: str) -> str:
    """What of `HEAVY` a new interpreter has loaded after `statement`."""
    done = _run(f"import sys\n{statement}\nprint(*(name for name in {HEAVY!r} if name in sys.modules))")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_core_does_not_load_torch() -> None:
    assert _heavy_after("\n".join(f"import {name}" for name in _core())) == ""


def test_the_record_does_not_load_torch() -> None:
    assert _heavy_after("\n".join(f"import {name}" for name in _record())) == ""


def test_the_command_line_and_the_top_level_do_not_load_torch() -> None:
    assert _heavy_after("import luthier.cli.main, luthier.worker.progress") == ""
    assert _heavy_after("import luthier; luthier.load_recipe; luthier.Recipe; dir(luthier)") == ""


def test_the_engine_runs_without_pydantic() -> None:
    imports = "\n".join(f"import {name}" for name in _engine())
    done = _run(BLOCK.format(blocked={"pydantic", "pydantic_core", "typer"}) + imports)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["pydantic", "typer"])
def test_the_refusal_behind_the_last_test_works(name: str) -> None:
    done = _run(BLOCK.format(blocked={"pydantic", "pydantic_core", "typer"}) + f"import {name}")
    assert done.returncode == 1
    assert f"{name} is not there" in done.stderr
