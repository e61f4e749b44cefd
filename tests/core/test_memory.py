"""Free memory, with and without the limit of a container."""

from pathlib import Path

import pytest

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
