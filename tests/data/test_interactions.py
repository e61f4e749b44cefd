import numpy as np
import polars as pl
import pytest

from perfedrec.core.errors import DataError
from perfedrec.data import Interactions, interactions
from perfedrec.data.interactions import ordering


@pytest.fixture
def toy() -> Interactions:
    """User 10 took 7 and 5 (7 twice), user 3 took 9, user 42 took 5."""
    frame = pl.DataFrame(
        {"user": [10, 3, 10, 42, 10], "item": [7, 9, 5, 5, 7], "timestamp": [300, 100, 200, 400, 250], "x": [0] * 5}
    )
    return Interactions.from_frame(frame)


def test_from_frame_sorts_and_keeps_the_earliest_of_repeated_rows(toy: Interactions) -> None:
    assert toy.user_ids.tolist() == [3, 10, 42]
    assert toy.item_ids.tolist() == [5, 7, 9]
    assert toy.offsets.tolist() == [0, 1, 3, 4]
    assert toy.items.tolist() == [2, 0, 1, 0]
    assert toy.timestamps is not None
    assert toy.timestamps.tolist() == [100, 200, 250, 400]
    assert (toy.n_users, toy.n_items, toy.n_interactions) == (3, 3, 4)
    assert toy.degrees.tolist() == [1, 2, 1]
    assert toy.item_degrees.tolist() == [2, 1, 1]
    assert toy.users_of_rows().tolist() == [0, 1, 1, 2]


def test_frame_has_the_external_ids(toy: Interactions) -> None:
    assert toy.frame().rows() == [(3, 9, 100), (10, 5, 200), (10, 7, 250), (42, 5, 400)]


def test_arrays_are_read_only_and_those_of_the_caller_do_not_change() -> None:
    items = np.array([0, 1])
    data = Interactions(np.array([1]), np.array([1, 2]), np.array([0, 2]), items)
    for array in (data.user_ids, data.item_ids, data.offsets, data.items, data.item_degrees):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 5
    items[0] = 0  # the caller may still write


def test_string_ids() -> None:
    data = Interactions.from_frame(pl.DataFrame({"user": ["bob", "ann"], "item": ["x", "y"]}))
    assert data.user_ids.tolist() == ["ann", "bob"]
    assert data.items.tolist() == [1, 0]
    assert data.user_index("bob") == 1
    with pytest.raises(DataError, match="unknown user 'bobb'; expected one of the 2 users in the training data"):
        data.user_index("bobb")


def test_index_of_an_external_id(toy: Interactions) -> None:
    assert toy.user_index(10) == toy.user_index("10") == 1
    assert toy.item_index("9") == 2
    with pytest.raises(DataError, match="unknown user 11; expected one of the 3 users"):
        toy.user_index(11)
    with pytest.raises(DataError, match="unknown item 'abc'; expected a whole number, as all ids of items are"):
        toy.item_index("abc")
    with pytest.raises(DataError, match="unknown item 10; expected an id of the items in the data, such as 9"):
        toy.item_index(10)


def test_given_ids_are_used_in_their_order() -> None:
    frame = pl.DataFrame({"user": [1], "item": [5]})
    data = Interactions.from_frame(frame, user_ids=np.array([4, 1]), item_ids=np.array([6, 5, 2]))
    assert data.offsets.tolist() == [0, 0, 1]
    assert data.items.tolist() == [1]
    with pytest.raises(DataError, match="unknown item 5: it is not among the 1 given item ids"):
        Interactions.from_frame(frame, item_ids=np.array([6]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offsets": [0, 1]}, "offsets must run from 0 to 3 in 3 steps"),
        ({"offsets": [0, 4, 3]}, "offsets must not decrease"),
        ({"items": [0, 1, 2]}, "items must be indices from 0 to 1"),
        ({"items": [-1, 1, 1]}, "items must be indices from 0 to 1"),
        ({"items": [1, 0, 1]}, "ascending and unique"),
        ({"items": [1, 1, 1]}, "ascending and unique"),
        ({"items": [0.0, 1.0, 1.0]}, "flat array of integers"),
        ({"user_ids": [5, 5]}, "user_ids must not repeat an id"),
        ({"item_ids": [0.5, 1]}, "item_ids must be a flat array of integers or strings"),
        ({"timestamps": [1, 2]}, "for each of the 3 interactions"),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(changes: dict[str, list[float]], message: str) -> None:
    fields = {"user_ids": [5, 6], "item_ids": [7, 8], "offsets": [0, 2, 3], "items": [0, 1, 1], "timestamps": None}
    Interactions(**{name: None if value is None else np.array(value) for name, value in fields.items()})
    fields |= changes
    with pytest.raises(DataError, match=message):
        Interactions(**{name: None if value is None else np.array(value) for name, value in fields.items()})


def test_users_without_interactions_may_come_first_and_last() -> None:
    data = Interactions(np.arange(4), np.arange(3), np.array([0, 0, 2, 3, 3]), np.array([1, 2, 0]))
    assert data.degrees.tolist() == [0, 2, 1, 0]


def test_a_frame_without_items_is_refused() -> None:
    with pytest.raises(DataError, match="needs the column 'item', got user, thing"):
        Interactions.from_frame(pl.DataFrame({"user": [1], "thing": [2]}))


def test_an_ordering_is_by_one_key_after_the_other() -> None:
    rng = np.random.default_rng(2)
    users, times, chance = rng.integers(9, size=300), rng.integers(-4, 4, size=300), rng.random(300)
    for scale in (1, 1 << 56):  # the second does not fit into one number with the others
        order = ordering(users, times * scale, chance)
        assert np.array_equal(order, np.lexsort((chance, times, users)))
    assert np.array_equal(ordering(chance, users), np.argsort(chance))
    assert ordering(users[:0], chance[:0]).size == 0


def test_blocks_of_users_are_all_rows_in_turn(toy: Interactions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interactions, "ROWS_AT_ONCE", 1)
    assert list(toy.blocks()) == [(slice(i, i + 1), slice(*toy.offsets[i : i + 2].tolist())) for i in range(3)]
    monkeypatch.setattr(interactions, "ROWS_AT_ONCE", 3)
    assert list(toy.blocks()) == [(slice(0, 2), slice(0, 3)), (slice(2, 3), slice(3, 4))]
