"""What a coordinator looks at before it starts anything."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from perfedrec.core.errors import ConfigError
from perfedrec.data.catalogue import Catalogue
from perfedrec.experiment import config
from perfedrec.experiment.certificates import make_certificates
from perfedrec.experiment.progress import Quiet
from perfedrec.experiment.serve import Terms, serve


@pytest.mark.parametrize(("asked", "threads"), [(0, 1), (2, 2)])
def test_a_coordinator_computes_in_one_thread_unless_told_otherwise(tmp_path: Path, asked: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    make_certificates(tmp_path / "certificates")
    (tmp_path / "keys").mkdir()
    given = config.load("recommended", None, [f"run.threads={asked}"], privacy="secure")
    try:
        with pytest.raises(ConfigError, match="no public keys"):
            serve(
                given,
                Catalogue(np.arange(5)),
                tmp_path / "run",
                tmp_path / "certificates",
                tmp_path / "keys",
                Terms(),
                Quiet(),
                lambda line: None,
            )
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
