"""`luthier doctor`: what this machine has, what is missing, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import psutil
import typer
from rich.text import Text

from luthier.base import hub
from luthier.base.catalogue import CATALOGUE, DEFAULT_BASE, look_up
from luthier.base.fetch import cached_folder
from luthier.cli.console import out, print_json
from luthier.errors import LuthierError
from luthier.settings import read_settings

Level = Literal["ok", "warning", "problem"]

LEAST_MEMORY_BYTES = 2 * 1024**3
"""Tuning the default base takes about this much beside the system."""

LEAST_DISK_BYTES = 2 * 1024**3
SHOWN_PACKAGES = ("torch", "transformers", "peft", "tokenizers", "safetensors")

_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's report.

    Attributes:
        name: What was looked at.
        level: ok, warning (something will be slower or missing) or problem (training cannot work).
        found: What there is.
        advice: What to do, empty where all is well.
    """

    name: str
    level: Level
    found: str
    advice: str = ""


def doctor_command(
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON on standard output.")] = False,
) -> None:
    """Look at Python, packages, processor, memory, disk, GPUs, the cache and the network; exit code 2 on a problem."""
    findings = examine()
    if json:
        print_json([asdict(finding) for finding in findings])
    else:
        _print_findings(findings)
    if any(finding.level == "problem" for finding in findings):
        raise typer.Exit(2)


def examine() -> list[Finding]:
    """Every finding about this machine. It takes some seconds: torch is imported and the Hub is asked once."""
    checks: list[Callable[[], list[Finding]]] = [
        lambda: [check_python()],
        check_packages,
        lambda: [check_processor(), check_memory()],
        check_disk,
        lambda: [check_cuda(), check_fast_paths(), check_cache(), check_hub()],
    ]
    return [finding for check in checks for finding in check()]


def check_python() -> Finding:
    version = platform.python_version()
    if sys.version_info[:2] > (3, 13):
        return Finding("Python", "warning", version, "Luthier is tested on 3.11 to 3.13")
    return Finding("Python", "ok", version)


def check_packages(distribution: str = "luthier") -> list[Finding]:
    """Each package that Luthier needs against the versions it allows; one line if all are well."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(text) for text in importlib.metadata.requires(distribution) or []]
    except importlib.metadata.PackageNotFoundError:
        return [Finding("packages", "problem", f"{distribution} is not installed", "install it with pip")]
    wanted = [need for need in wanted if need.marker is None or need.marker.evaluate({"extra": ""})]
    problems, versions = [], {}
    for need in wanted:
        try:
            versions[need.name] = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(_package_problem(need.name, "not installed", str(need)))
            continue
        if not need.specifier.contains(versions[need.name], prereleases=True):
            problems.append(_package_problem(need.name, versions[need.name], str(need)))
    if problems:
        return problems
    shown = ", ".join(f"{name} {versions[name]}" for name in SHOWN_PACKAGES if name in versions)
    return [Finding("packages", "ok", f"{len(wanted)} as required: {shown}")]


def _package_problem(name: str, found: str, need: str) -> Finding:
    return Finding(name, "problem", found, f"pip install '{need}'")


def check_processor() -> Finding:
    """Cores that this process may use, and the vector instructions that decide the speed of a CPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    flags = _processor_flags()
    known = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    found = f"{cores} core{'s' if cores > 1 else ''}, {platform.machine()}" + (f", {', '.join(known)}" if known else "")
    if flags and platform.machine().lower() in ("x86_64", "amd64") and "avx2" not in flags:
        return Finding("processor", "warning", found, "without AVX2 training takes several times as long")
    return Finding("processor", "ok", found)


def _processor_flags() -> set[str]:
    """Linux tells; elsewhere the set is empty and nothing is concluded from it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return set(line.partition(":")[2].split())


def check_memory() -> Finding:
    try:
        import torch

        from luthier.engine.memory import available_bytes

        free_bytes = available_bytes(torch.device("cpu"))
    except ImportError:  # reported under packages
        free_bytes = psutil.virtual_memory().available
    found = f"{_gigabytes(free_bytes)} free of {_gigabytes(psutil.virtual_memory().total)}"
    if free_bytes < LEAST_MEMORY_BYTES:
        return Finding(
            "memory", "warning", found, f"close programs: {DEFAULT_BASE} wants {_gigabytes(LEAST_MEMORY_BYTES)}"
        )
    return Finding("memory", "ok", found)


def check_disk() -> list[Finding]:
    """Room where the cache is and where runs are written."""
    places = {"disk of the cache": read_settings().cache_folder, "disk of this folder": Path.cwd()}
    return [_check_disk(name, _existing_parent(place)) for name, place in places.items()]


def _check_disk(name: str, folder: Path) -> Finding:
    free_bytes = shutil.disk_usage(folder).free
    found = f"{_gigabytes(free_bytes)} free at {folder}"
    if not os.access(folder, os.W_OK):
        return Finding(name, "problem", f"{folder} may not be written", "choose another with LUTHIER_CACHE or `output`")
    if free_bytes < LEAST_DISK_BYTES:
        return Finding(name, "warning", found, f"make room: a base and a run want {_gigabytes(LEAST_DISK_BYTES)}")
    return Finding(name, "ok", found)


def check_cuda() -> Finding:
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding("GPU", "problem", f"torch cannot be imported: {error}", "reinstall torch")
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return Finding("GPU", "ok", "; ".join(f"{each.name}, {_gigabytes(each.total_memory)}" for each in devices))
    if shutil.which("nvidia-smi"):
        advice = "this torch does not see the GPU: install a CUDA build of torch that fits the driver"
        return Finding("GPU", "warning", f"none for torch {torch.__version__}", advice)
    return Finding("GPU", "ok", "none; jobs run on the processor")


def check_fast_paths() -> Finding:
    """Which of the engine's fast paths this machine can take. A base may still be one that they do not know."""
    try:
        from luthier.ops.capability import fp8_problem, kernels_problem
    except (ImportError, OSError):  # reported under GPU
        return Finding("fast paths", "ok", "none without torch")
    paths = (("Triton kernels and captured steps", kernels_problem()), ("fp8 products", fp8_problem()))
    return Finding("fast paths", "ok", "; ".join(f"{name}: {f'off, {why}' if why else 'on'}" for name, why in paths))


def check_cache() -> Finding:
    folder = read_settings().cache_folder
    cached = [entry.name for entry in CATALOGUE if cached_folder(entry.name)]
    found = f"{folder}: {', '.join(cached) or 'no base yet'}"
    if DEFAULT_BASE not in cached:
        return Finding("cache", "warning", found, f"`luthier models --fetch {DEFAULT_BASE}` while there is a network")
    return Finding("cache", "ok", found)


def check_hub() -> Finding:
    settings = read_settings()
    if settings.hub_offline:
        name = "LUTHIER_OFFLINE" if settings.offline else "HF_HUB_OFFLINE"
        return Finding("Hub", "warning", f"switched off by {name}", "only cached bases and folders can be used")
    entry = look_up(DEFAULT_BASE)
    try:
        hub.list_files(entry.hub_id, entry.revision)
    except (hub.HubUnreachableError, LuthierError) as error:
        advice = f"cached bases, folders and {DEFAULT_BASE} (from the package index) work without it"
        return Finding("Hub", "warning", f"does not answer: {str(error).splitlines()[0]}", advice)
    return Finding("Hub", "ok", "answers")


def _existing_parent(folder: Path) -> Path:
    folder = folder.absolute()
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1024**3:.1f} GiB"


def _print_findings(findings: list[Finding]) -> None:
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        line = Text(f"{finding.level:8}", style=_STYLES[finding.level])
        line.append(f"{finding.name:{width}}  {finding.found}", style="not bold default")
        out().print(line, soft_wrap=True)
        if finding.advice:
            out().print(Text(f"{'':8}{'':{width}}  -> {finding.advice}", style="dim"), soft_wrap=True)
