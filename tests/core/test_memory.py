"""Free memory, with and without the limit of a container."""

import resource
from pathlib import Path

import pytest
import torch

from perfedrec.core import memory
from perfedrec.core.errors import ConfigError


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 5,000 kB of free memory."""
    (tmp_path / "meminfo").write_text("MemTotal:       9000 kB\nMemAvailable:   5000 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    return tmp_path


def test_free_memory_is_within_the_limit_of_a_container(machine: Path) -> None:
    assert memory.free_memory() == 5_120_000
    (machine / "memory.current").write_text("1000000\n")
    (machine / "memory.max").write_text("max\n")
    assert memory.free_memory() == 5_120_000
    (machine / "memory.max").write_text("3000000\n")
    assert memory.free_memory() == 2_000_000


def test_what_does_not_fit_is_refused_in_one_line(machine: Path) -> None:
    memory.check_memory(5_120_000, "this", "less")
    with pytest.raises(ConfigError) as error:
        memory.check_memory(7_000_000_000, "this", "less")
    assert str(error.value) == "this needs about 7.0 GB of memory, and 0.0 GB are free here; expected less"


def test_memory_is_given_back_wherever_that_is_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    memory.give_back()
    asked: list[int] = []
    library = type("Library", (), {"malloc_trim": staticmethod(asked.append)})
    monkeypatch.setattr(memory.sys, "platform", "linux")
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: library)
    memory.give_back()
    assert asked == [0]
    monkeypatch.setattr(memory.sys, "platform", "darwin")  # without glibc there is nothing to ask
    memory.give_back()
    assert asked == [0]


def test_zeros_take_memory_only_where_they_are_written() -> None:
    def taken() -> int:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()

    before = taken()
    made = memory.zeros(1 << 16, 256, like=torch.zeros(1))  # 64 MB
    made[: 1 << 10] = 1  # of which 1 MB is written
    few = taken() - before
    made[:] = 1
    assert few < 16_000_000 < 48_000_000 < taken() - before


@pytest.mark.parametrize("shape", [(), (0, 3), (5, 3), (1 << 10, 1 << 10)])
@pytest.mark.parametrize("like", [torch.zeros(1), torch.zeros(1, dtype=torch.int64)], ids=str)
def test_zeros_are_those_of_torch(shape: tuple[int, ...], like: torch.Tensor) -> None:
    made = memory.zeros(*shape, like=like)
    assert torch.equal(made, like.new_zeros(shape))
    assert made.dtype == like.dtype
    made += 1
    assert bool((made == 1).all())
