"""Which nodes a coordinator counts: limits, growth, quarantine, and what it writes down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.federation.test_members import keys, seen

from perfedrec.core.errors import ConfigError
from perfedrec.federation.admission import Admission, Limits
from perfedrec.federation.members import Register
from perfedrec.runtimes.flower import Apart, UploadError

NAMES = {1: "a", 2: "b", 9: "service"}
KEYS = {b"key of a": "a", b"key of b": "b", b"key of service": "service"}


def admission(folder: Path, told: list[str] | None = None, **limits: Any) -> Admission:
    made = Admission(Register(keys(folder, "a", "b", "service")), Limits(**limits), KEYS, (told or []).append)
    made.know(NAMES)
    return made


def test_a_key_whose_file_was_renamed_is_told_once(tmp_path: Path) -> None:
    admission(tmp_path / "keys").begin(hosts(12, 3))
    told, keys_now = list[str](), {b"key of a": "ann", b"key of b": "b"}
    renamed = Admission(Register(tmp_path / "keys"), Limits(), keys_now, told.append)
    (line,) = told
    assert line.startswith(f"{tmp_path}/keys/ann.pub is the key of node a: a node is known by the name of the file")
    assert "name the file a.pub again" in line
    renamed.know({1: "ann", 2: "b"})
    renamed.begin(hosts(12, 3))
    Admission(Register(tmp_path / "keys"), Limits(), keys_now, told.append)
    assert told == [line]


def hosts(*counts: int) -> dict[int, torch.Tensor]:
    return {node: torch.arange(count) for node, count in enumerate(counts, 1)}


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_users": 0},
        {"max_growth": 0.5},
        {"quarantine": -1},
        {"max_joins": 0},
        {"max_requests": 0},
        {"max_megabytes": -1},
    ],
)
def test_limits_that_are_not_possible_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"^{next(iter(wrong))} is .*; expected"):
        Limits(**wrong)


def test_a_node_claims_as_many_users_as_it_may(tmp_path: Path) -> None:
    given = admission(tmp_path / "keys", max_users=500)
    given.claim(1, 500)
    with pytest.raises(
        UploadError, match=r"it claims 501 users; expected 500 at most \(serve --max-users\)"
    ) as refused:
        given.claim(1, 501)
    assert refused.value.reason == "limit"
    assert given.apart() == {}


def test_a_node_that_claims_ten_times_as_many_users_is_held_until_it_is_admitted(tmp_path: Path) -> None:
    first = admission(tmp_path / "keys")
    first.begin(hosts(12, 3))
    told = list[str]()
    given = Admission(Register(tmp_path / "keys"), Limits(), KEYS, told.append)
    given.know(NAMES)
    given.claim(1, 120)  # ten times as many are not more than ten times as many
    given.claim(2, 100)  # of fewer than ten users ten are ten times as many
    assert given.apart() == {}
    given.claim(1, 121)
    why = "it claims 121 users and had 12 before (serve --max-growth 10)"
    assert given.apart() == {1: Apart("held", why)}
    number = given.nodes()["a"].decision
    folder = tmp_path / "keys"
    assert told == [
        f"node a is held until you decide: {why}; perfedrec federation nodes {folder} --admit a or --exclude a, or "
        f"--undo {number}"
    ]
    given.claim(1, 121)  # asked again, it is not held twice
    given.begin(hosts(121, 3))
    assert len(told) == 1
    assert given.nodes()["a"].users == 12
    Register(folder).admit("a")
    assert given.apart() == {}
    given.claim(1, 121)
    assert given.apart() == {}
    off = admission(folder, max_growth=0)
    off.claim(1, 10_000_000)
    assert off.apart() == {}


def test_nodes_of_the_first_run_are_not_new_and_later_ones_are(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    Register(keys(folder, "a", "b")).exclude("b")  # a decision before the first run makes it no later one
    given = admission(folder, quarantine=2)
    assert given.apart() == {2: Apart("excluded", "the operator has excluded it", excluded=True)}
    given.begin(hosts(5))
    Register(folder).undo(1)
    later = admission(folder, quarantine=2)
    assert later.apart() == {2: Apart("new", "it is new: what it sends counts after 2 more rounds")}
    later.begin(hosts(5, 5))
    for number, left in ((7, 1), (8, 0)):
        later.waited("r", number, frozenset({1, 2, 9}))
        assert later.nodes()["b"].left == left
    assert later.apart() == {}
    assert admission(folder, quarantine=50).apart() == {}  # it stays a member


def test_a_round_without_a_new_node_does_not_count_for_it(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    admission(folder).begin(hosts(5))
    given = admission(folder, quarantine=1)
    given.begin(hosts(5, 5))
    given.waited("r", 0, frozenset({1}))
    assert given.apart().keys() == {2}


def test_what_is_written_down_at_the_begin_of_a_run(tmp_path: Path) -> None:
    folder, told = tmp_path / "keys", list[str]()
    admission(folder).begin(hosts(5, 6))
    assert [(each["node"], each["users"], each["waits"]) for each in Register(folder).lines()] == [
        ("a", 5, 0),
        ("b", 6, 0),
    ]
    admission(folder).begin(hosts(5, 4))  # no news
    assert len(Register(folder).lines()) == 2
    changed = Admission(Register(folder), Limits(), {b"another": "a", b"key of b": "b"}, told.append)
    changed.know(NAMES)
    changed.begin(hosts(5, 6))
    assert len(Register(folder).lines()) == 3
    assert "node a has another key than before" in told[0]


def test_what_was_read_before_holds_while_the_register_cannot_be_read(tmp_path: Path) -> None:
    folder, told = tmp_path / "keys", list[str]()
    register = Register(keys(folder, "a", "b"))
    register.add(seen("a"))
    register.exclude("a", "a note that is not for the node")
    given = Admission(Register(folder), Limits(), KEYS, told.append)
    given.know(NAMES)
    before = given.apart()
    register.path.write_text("not JSON\n")
    assert given.apart() == given.apart() == before == {1: Apart("excluded", "the operator has excluded it", True)}
    assert len(told) == 1
    with pytest.raises(ConfigError):
        Admission(Register(folder), Limits(), KEYS, told.append)


def test_a_folder_of_keys_that_cannot_be_written_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path / "keys")
    with pytest.raises(ConfigError, match=r"keys: cannot be written; expected a folder of keys in which"):
        admission(tmp_path / "keys")
