"""Few requirements, each one used, each with a lower bound alone, and all solved in the environment of these tests."""

from __future__ import annotations

import ast
import sys
import tomllib
from importlib.metadata import packages_distributions, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CORE = {canonicalize_name(r.name): r for r in map(Requirement, PROJECT["dependencies"])}
EXTRAS = {
    canonicalize_name(Requirement(text).name)
    for texts in PROJECT["optional-dependencies"].values()
    for text in texts
    if not text.startswith("luthier")
}
COMES_WITH = {"anyio": "fastapi", "markupsafe": "jinja2", "starlette": "fastapi", "triton": "torch"}
"""Parts of a requirement that have a distribution of their own."""
NOT_IMPORTED = {"gguf"}
"""Needed by transformers to read a GGUF, never imported here."""


def imported() -> set[str]:
    """Distributions whose modules the package imports, at the top of a file or within a function."""
    owners = packages_distributions()
    modules: set[str] = set()
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                modules.add(node.module.partition(".")[0])
    outside = modules - set(sys.stdlib_module_names) - {"luthier"}
    names = {canonicalize_name(owners.get(module, [module])[0]) for module in outside}
    return {COMES_WITH.get(name, name) for name in names}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    found = imported()
    assert found - CORE.keys() - EXTRAS == set()
    assert CORE.keys() - found - NOT_IMPORTED == set()


def test_requirements_have_a_lower_bound_and_no_upper_one() -> None:
    assert {name: [s.operator for s in r.specifier] for name, r in CORE.items()} == {name: [">="] for name in CORE}


def test_one_environment_solves_them_all() -> None:
    for name, requirement in CORE.items():
        assert requirement.specifier.contains(version(name), prereleases=True), name


def test_heavy_packages_are_extras() -> None:
    assert not CORE.keys() & {"accelerate", "bitsandbytes", "datasets", "deepspeed", "fastapi", "liger-kernel", "ray"}
