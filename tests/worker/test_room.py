"""Whether a base fits where a worker would hold it: on a CPU, and on a GPU that is not here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from luthier.base.load import load_base
from luthier.engine.memory import MARGIN, available_bytes, available_to_others
from luthier.errors import MemoryShortError
from luthier.registry.seam import Room
from luthier.worker.plan import CONTEXT_BYTES
from luthier.worker.room import check_room, most_for_jobs, room_for
from luthier.worker.worker_options import WorkerOptions

GIB = 2**30


def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of 24 GiB, 20 of them free, and 2 more kept by this process for itself."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: GIB)


def options(base: Path, **values: object) -> WorkerOptions:
    return WorkerOptions(base="tiny", source=str(base), scratch=Path("none"), **values)  # type: ignore[arg-type]


def test_on_a_cpu_the_machines_memory_counts(tiny_llama: Path) -> None:
    room = room_for(options(tiny_llama))
    assert room.base == load_base(tiny_llama, device="cpu", dtype="float32").num_bytes
    assert 0 < room.free <= room.total
    check_room(room, options(tiny_llama))


def test_on_a_gpu_its_own_memory_counts_and_its_own_dtype(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = load_base(tiny_llama, device="cpu", dtype="bfloat16").num_bytes
    fake_gpu(monkeypatch)
    room = room_for(options(tiny_llama))
    assert room == Room(base=weights + CONTEXT_BYTES, free=22 * GIB, total=24 * GIB)


def test_another_process_may_not_have_what_this_one_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch)
    device = torch.device("cuda")
    assert (available_bytes(device), available_to_others(device)) == (22 * GIB, 20 * GIB)


def test_in_four_bits_a_base_takes_less(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_base(tiny_llama, device="cpu", dtype="bfloat16", quantization="nf4")
    fake_gpu(monkeypatch)
    plain, quantized = (room_for(options(tiny_llama, quantization=kind)) for kind in ("", "nf4"))
    assert quantized.base - CONTEXT_BYTES == loaded.num_bytes + loaded.dense_bytes
    assert quantized.base < plain.base


def test_what_does_not_fit_is_refused_with_all_sizes(tiny_llama: Path) -> None:
    room = Room(base=3 * GIB, free=5 * GIB, total=8 * GIB)
    check_room(room, options(tiny_llama))
    check_room(room, options(tiny_llama, need_bytes=2 * GIB))
    with pytest.raises(MemoryShortError, match=r"tiny takes 3\.00 .* needs 2\.50 GiB beyond it; 5\.00 .* of 8\.00"):
        check_room(room, options(tiny_llama, need_bytes=5 * GIB // 2))
    with pytest.raises(MemoryShortError, match=r"tiny takes 3\.00 GiB; 2\.00 GiB of 8\.00 GiB are free here"):
        check_room(Room(3 * GIB, 2 * GIB, 8 * GIB), options(tiny_llama))


def test_the_most_for_jobs_is_what_a_run_may_plan_to_take() -> None:
    room = Room(base=3 * GIB, free=8 * GIB, total=10 * GIB)
    assert most_for_jobs(room, GIB) == int(10 * GIB * MARGIN) - 3 * GIB
    assert most_for_jobs(room, 6 * GIB) == 6 * GIB
