"""The records of a coordinator that keeps what it opens, and their audit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from perfedrec.audit.federation import audit_records, lists_of
from perfedrec.core.aggregate import BASIS_GRID, FIXED_POINT, Aggregate
from perfedrec.core.errors import CheckpointError, ConfigError
from perfedrec.core.types import Plan
from perfedrec.methods.federated.perfedrec_pp import PerFedRecPP
from perfedrec.runs.config import load
from perfedrec.runs.folder import RunFolder
from perfedrec.runs.opened import FOLDER, Opened, read, write

USERS, ITEMS, DIM = 40, 300, 16


def neighbour_rows(cohort: list[int], lists: dict[int, torch.Tensor]) -> torch.Tensor:
    """[1, m, d] a sum in which all rows of a client are multiples of its vector."""
    rows = torch.zeros(ITEMS, DIM)
    for user in cohort:
        vector = torch.randn(DIM, generator=torch.Generator().manual_seed(user))
        rows[lists[user]] += vector / lists[user].numel() ** 0.5
    return rows[None]


@pytest.fixture
def kept(tmp_path: Path) -> tuple[Path, dict[int, torch.Tensor]]:
    """A federation's folder with thirty rounds of such sums, and the users' lists by identity."""
    generator = torch.Generator().manual_seed(0)
    lists = {user: torch.randperm(ITEMS, generator=generator)[:12].sort().values for user in range(USERS)}
    identities = torch.arange(USERS) * 7 + 1000
    folder = RunFolder(tmp_path / "run")
    folder.claim()
    folder.write_settings(load("recommended", privacy="secure", overrides=["privacy.rank=0"]))
    folder.write_name("a name")
    for number in range(1, 31):
        cohort = torch.randperm(USERS, generator=generator)[:6]
        opened = Opened(number, "train", cohort, neighbour_rows(cohort.tolist(), lists), 0)
        write(folder.path, number + 6, opened, identities)
    return folder.path, {int(identities[user]): items for user, items in lists.items()}


def test_records_of_sums_by_item_name_the_users_of_a_federation(kept: tuple[Path, dict[int, torch.Tensor]]) -> None:
    folder, lists = kept
    steps = list[int]()
    found = audit_records(folder, lists, lambda done, total: steps.append(done))
    assert steps == list(range(1, 31))
    figures = {(each.attack, each.metric): each.value for each in found.findings}
    name = "collinear rows of neighbour sums"
    assert figures[name, "users exposed"] == pytest.approx(6)
    assert figures[name, "item precision"] == 1
    assert figures[name, "users named"] > 10
    assert (folder / "audit.json").is_file()

    blind = audit_records(folder, {}, lambda done, total: None)
    counted = {(each.attack, each.metric): (each.value, each.guessing) for each in blind.findings}
    assert 6 <= counted[name, "groups of rows"][0] < 6.5  # two users can share three items
    assert counted[name, "groups of rows"][1] == 0
    assert counted[name, "users named"][0] > 10
    assert any(note.startswith("item lists") for note in blind.notes)


def test_what_is_kept_is_read_again(tmp_path: Path) -> None:
    lift = torch.randn(ITEMS, 5)
    for number, phase in ((6, "clusters"), (7, "train")):
        write(
            tmp_path,
            number,
            Opened(number - 6, phase, torch.tensor([2, 0]), torch.randn(1, 5, 4), 1, lift),
            torch.tensor([30, 31, 32]),
        )
    first, second = read(tmp_path)
    assert (first.number, first.phase, second.number, second.phase) == (0, "clusters", 1, "train")
    assert second.cohort.tolist() == [32, 30]
    assert second.lift is not None
    assert torch.equal(second.lift, lift)
    (tmp_path / FOLDER / "round-000007.safetensors").write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match="damaged record of opened sums"):
        read(tmp_path)
    with pytest.raises(CheckpointError, match=r"kept no sums; expected .* --keep-sums"):
        read(tmp_path / "elsewhere")


def test_what_a_coordinator_sees_is_lifted_by_the_basis_of_its_state() -> None:
    method = PerFedRecPP(load("recommended", privacy="secure", overrides=["model.embedding_dim=4"]).build().settings)
    basis = (torch.eye(ITEMS)[:, :3] * (BASIS_GRID - 1)).to(torch.int16)
    sums = torch.arange(12, dtype=torch.float64).view(3, 4)
    total = Aggregate(3, 9, torch.arange(3), sums * FIXED_POINT, torch.zeros(1, dtype=torch.float64))

    class State:
        round, items = len(method.phases), torch.zeros(ITEMS, 4)

    State.basis = basis  # type: ignore[attr-defined]
    seen = Opened.of(method, State(), Plan("train", torch.arange(9)), total)  # type: ignore[arg-type]
    assert seen is not None
    assert seen.number == 1
    ((kind, place, rows),) = seen.tables()
    assert (kind, place) == ("training", 0)
    assert torch.allclose(rows[:3], sums.float(), rtol=1e-3)
    assert not rows[3:].any()


def test_a_folder_without_nodes_files_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no nodes' files; expected a folder with store\.db or \*\.node files"):
        lists_of(tmp_path)
