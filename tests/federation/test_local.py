"""The processes of a federation on one machine."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from tests.ports import reserved_port

from perfedrec.core.errors import ConfigError
from perfedrec.federation import local
from perfedrec.runs import config
from perfedrec.runs.config import open_data

pytest.importorskip("flwr")


def test_a_node_that_ends_early_is_reported_and_the_others_end_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing listens on the port: a node that works waits for the coordinator, and ends cleanly when asked to."""
    monkeypatch.setattr(local, "GOODBYE", 600.0)
    told, ended, folder = list[str](), threading.Event(), tmp_path / "up"
    given = config.load(
        "recommended", None, ["data.path=synthetic:users=4,items=24,clusters=2,interactions_per_user=4"]
    )
    local.lay_out(folder, open_data(given.data), 2)
    (folder / "nodes" / "n1" / "store.db").unlink()

    def tell(line: str) -> None:
        told.append(line)
        ended.set()

    with local.nodes(folder, reserved_port(), tell=tell) as processes:
        assert ended.wait(600)
        log = folder / "nodes" / "n0" / local.LOG
        while "cannot be reached" not in log.read_text():
            assert processes[0].poll() is None
            ended.wait(0.1)
    assert told == [
        f"n1 has ended with code 2; expected it to run to the end, see {folder / 'nodes' / 'n1' / local.LOG}"
    ]
    assert processes[0].returncode == 0
    assert "Fatal" not in log.read_text()


def test_a_used_folder_is_refused_and_resume_is_named_where_it_works(tmp_path: Path) -> None:
    local.check_free(tmp_path / "new")
    local.check_free(tmp_path)
    (tmp_path / "run").mkdir()
    with pytest.raises(ConfigError, match=r"is not empty; expected a new folder$"):
        local.check_free(tmp_path)
    (tmp_path / "run" / "config.toml").touch()
    with pytest.raises(ConfigError, match=r"is not empty; expected a new folder \(or --resume to continue"):
        local.check_free(tmp_path)
    with pytest.raises(ConfigError, match="is a file; expected a new folder"):
        local.check_free(tmp_path / "run" / "config.toml")


def test_a_free_port_is_not_one_of_outgoing_connections() -> None:
    """Nodes call it before anything listens there, and could otherwise be connected to themselves."""
    outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    found = {local.free_port() for _ in range(20)}
    assert len(found) > 1
    assert all(10_000 <= port < outgoing for port in found)
