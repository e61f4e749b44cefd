import os
import subprocess
import sys

import pytest
import torch

from perfedrec.core.threads import NUMBERS_PER_THREAD, threads_for


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        (0, 1),
        (2 * NUMBERS_PER_THREAD - 1, 1),
        (2 * NUMBERS_PER_THREAD, 2),
        (3 * NUMBERS_PER_THREAD, 3),
        (99 * NUMBERS_PER_THREAD, 3),
    ],
)
def test_little_work_is_done_on_few_threads(numbers: int, expected: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with threads_for(numbers):
            assert torch.get_num_threads() == expected
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("given", "expected"), [(None, "passive"), ("active", "active")])
def test_threads_wait_without_the_processor_unless_told_otherwise(given: str | None, expected: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {} if given is None else {"OMP_WAIT_POLICY": given}
    code = "import sys, perfedrec, os; assert 'torch' not in sys.modules; print(os.environ['OMP_WAIT_POLICY'])"
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == expected
