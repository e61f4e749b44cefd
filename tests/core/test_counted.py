"""Numbers with their nouns."""

from perfedrec.core.counted import counted


def test_one_and_many() -> None:
    assert [counted(n, "user") for n in (0, 1, 2, 5224)] == ["0 users", "1 user", "2 users", "5,224 users"]
    assert [counted(n, "node is", "nodes are") for n in (1, 3)] == ["1 node is", "3 nodes are"]
