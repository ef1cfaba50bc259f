"""The documentation is read by these tests: links, commands, recipes, names and the written reference hold."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
import typer
import yaml

import luthier
from luthier.cli.main import app
from luthier.data.rows import RowProblem
from luthier.recipe import Recipe, load_recipe
from luthier.tasks.shapes import Shaper
from luthier.worker.compare import recipes_for

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "luthier"
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md"), *ROOT.glob("benchmarks/**/*.md")]
)
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.*)$", re.MULTILINE)

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def _blocks(text: str, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(text) if language in languages]


def _spans(text: str) -> list[str]:
    """Inline code outside of fenced blocks."""
    return INLINE.findall(FENCE.sub("", text))


def _anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings."""
    headings = HEADING.findall(FENCE.sub("", text))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _calls(text: str) -> Iterator[list[str]]:
    """Every `luthier ...` command line of a page, as words; those in blocks, indented or fenced, and those inline."""
    lines = [line for block in _blocks(text, "", "sh", "text") for line in block.splitlines()]
    lines += re.findall(r"^ {4,}(.*)$", FENCE.sub("", text), re.MULTILINE) + _spans(text)
    for line in lines:
        found = re.match(r"(?:\$ )?(?:\.venv/bin/)?luthier +(\w.*)$|(?:\$ )?luthier +(--\w.*)$", line.strip())
        if found:
            yield shlex.split(found[1] or found[2], comments=True)


def _load_builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_reference", ROOT / "docs" / "reference" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BUILD = _load_builder()


@every_page
def test_relative_links_resolve(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in LINK.findall(FENCE.sub("", text)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page}: {link}"
        if anchor:
            assert anchor in _anchors(target.read_text(encoding="utf-8")), f"{page}: {link}"


@every_page
def test_commands_are_taken_by_the_command_line(page: Path) -> None:
    """Every command is parsed by the verb's own parser; nothing is run. A verb's bare name is a mention of it."""
    for words in _calls(page.read_text(encoding="utf-8")):
        while words[0] in ("--server", "--key"):
            words = words[2:]
        verb, *arguments = words
        if verb in ("--help", "--version"):
            continue
        assert verb in COMMANDS, f"{page}: luthier {' '.join(words)}"
        if not arguments or arguments == ["--help"]:
            continue
        context = COMMANDS[verb].make_context(verb, list(arguments))
        recipe = {"data": {"train": "train.jsonl"}, "task": "completion"}
        overrides = [text for text in context.params.get("overrides") or [] if "..." not in text]
        if verb == "compare":
            recipes_for(recipe, context.params["methods"].split(","), None, overrides)
        for override in overrides if verb != "compare" else []:
            load_recipe(recipe, [override])


def test_the_commands_of_every_verb_are_shown() -> None:
    shown = {words[0] for words in _calls((ROOT / "README.md").read_text(encoding="utf-8"))}
    assert shown >= set(COMMANDS)


def test_a_wrong_command_would_be_noticed() -> None:
    assert list(_calls("    luthier train r.yaml --resume  # go on\n")) == [["train", "r.yaml", "--resume"]]
    assert list(_calls("so `luthier chat RUN --base` does\n")) == [["chat", "RUN", "--base"]]
    with pytest.raises(Exception, match="--resumee"):
        COMMANDS["train"].make_context("train", ["r.yaml", "--resumee"])


@every_page
def test_recipes_hold(page: Path) -> None:
    """A block of YAML is a recipe; one without a `data` section shows a part of one."""
    for block in _blocks(page.read_text(encoding="utf-8"), "yaml"):
        recipe = load_recipe({"data": {"train": "train.jsonl"}} | yaml.safe_load(block))
        Shaper(recipe.task.type, recipe.data.format, recipe.data.fields, recipe.data.template)


@every_page
def test_python_compiles_and_names_what_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    code = "\n".join(_blocks(text, "python"))
    compile(code, str(page), "exec")
    spans = "\n".join(span for span in _spans(text) if re.fullmatch(r"luthier\.\w+(\(.*\))?", span))
    for name in re.findall(r"\bluthier\.(\w+)", code + "\n" + spans):
        assert hasattr(luthier, name), f"{page}: luthier.{name}"


@every_page
def test_make_targets_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    lines = [line.strip() for block in _blocks(text, "", "sh") for line in block.splitlines()] + _spans(text)
    for line in lines:
        if found := re.match(r"make ([a-z-]+)", line):
            assert found[1] in targets, f"{page}: {line}"


def _resolve(name: str) -> Path | None:
    """A path as ARCHITECTURE.md writes it: under the package, else under the project."""
    return next((root / name for root in (SOURCE, SOURCE.parent, ROOT) if (root / name).exists()), None)


@functools.cache
def _defined(path: Path) -> set[str]:
    """What a module defines: functions, classes, methods as Class.method, and assigned names."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
        targets: list[Any] = node.targets if isinstance(node, ast.Assign) else []
        targets += [node.target] if isinstance(node, ast.AnnAssign) else []
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


@pytest.mark.parametrize("name", ["ARCHITECTURE.md", "CONTRIBUTING.md", "docs/concepts/masks.md"])
def test_paths_and_names_of_the_code_exist(name: str) -> None:
    spans = _spans((ROOT / name).read_text(encoding="utf-8"))
    paths = [span for span in spans if re.fullmatch(r"[\w.-]+(/[\w.*-]+)*(\.py|/)(::?[\w.]+)?", span)]
    # A bare file name in CONTRIBUTING.md is one that each task or method has.
    paths = [span for span in paths if not span.startswith(".") and ("/" in span or name != "CONTRIBUTING.md")]
    assert paths, "the pattern finds nothing"
    for span in paths:
        file, _, symbol = span.replace("::", ":").partition(":")
        if "*" in file:
            assert any(root.glob(file) for root in (SOURCE, ROOT)), span
            continue
        path = _resolve(file.rstrip("/"))
        assert path is not None, f"{name}: {span}"
        assert not symbol or symbol in _defined(path), f"{name}: {span}"


def test_architecture_names_every_package() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    packages = {path.name for path in SOURCE.iterdir() if path.is_dir() and not path.name.startswith("__")}
    assert {name for name in packages if f"`{name}/" not in text} == set()


def test_the_recipe_reference_is_up_to_date() -> None:
    assert BUILD.PAGE.read_text(encoding="utf-8") == BUILD.page(), "run: python docs/reference/build.py"


def test_every_field_of_the_recipe_is_documented() -> None:
    """In the models themselves, whose docstrings make the page; sections are documented by their models."""
    seen = [Recipe]
    for model in seen:
        assert (model.__doc__ or "").strip(), model
        for name, (field, meaning) in BUILD.documented_fields(model).items():
            assert len(meaning.strip()) >= 10, f"{model.__name__}.{name}"
            assert f"`{name}`" in BUILD.page()
            seen += [other for other in BUILD.choices(field.annotation) if hasattr(other, "model_fields")]
    assert len(seen) > 6, "the sections were not visited"


def test_every_kind_of_problem_is_in_the_data_guide() -> None:
    source = "\n".join(path.read_text(encoding="utf-8") for path in (SOURCE / "data").glob("*.py"))
    kinds = {*re.findall(r'kind="(\w+)"', source), *get_args(RowProblem)}
    assert len(kinds) > 10
    guide = (ROOT / "docs/guides/data.md").read_text(encoding="utf-8")
    assert {kind for kind in kinds if f"| `{kind}` |" not in guide} == set()


def test_every_page_of_the_documentation_is_linked() -> None:
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / link).resolve() for link in LINK.findall(index.read_text(encoding="utf-8"))}
    pages = {page for page in (ROOT / "docs").rglob("*.md") if page.name != "template.md"} - {index}
    assert pages <= linked
