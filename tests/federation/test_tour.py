"""The federation that newcomers are shown: invented things, and the folder of it."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from tests.web.test_node_pages import Home

from perfedrec import ConfigError, Node
from perfedrec.federation import invented, tour
from perfedrec.federation.agreement import federated

pytest.importorskip("flwr")


def test_titles_are_different_ones_of_their_genre_and_always_the_same() -> None:
    genres = [item % 5 for item in range(400)]
    found = invented.titles(genres)
    assert len(set(found)) == 400
    assert found[:200] == invented.titles(genres[:200])
    for title, genre in zip(found, genres, strict=True):
        article, adjective, noun = title.split(" ")
        assert (article, adjective in invented.ADJECTIVES, noun in invented.NOUNS[genre]) == ("The", True, True)
    words = [noun for nouns in invented.NOUNS for noun in nouns]
    assert len(set(words)) == len(words) == len(invented.GENRES) * 12
    most = len(invented.ADJECTIVES) * 12
    with pytest.raises(ConfigError, match=f"there are {most} titles of each genre"):
        invented.titles([0] * (most + 1))
    years = {invented.year(item) for item in range(300)}
    assert (min(years) >= 1962, max(years) <= 2023, len(years) > 50) == (True, True, True)


def pixels(png: bytes) -> np.ndarray:
    """The pixels of a picture as this program writes it: without filters."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    place, parts = 8, {}
    while place < len(png):
        (size,) = struct.unpack(">I", png[place : place + 4])
        kind, content = png[place + 4 : place + 8], png[place + 8 : place + 8 + size]
        assert struct.unpack(">I", png[place + 8 + size : place + 12 + size]) == (zlib.crc32(kind + content),)
        parts[kind], place = content, place + 12 + size
    width, height = struct.unpack(">II", parts[b"IHDR"][:8])
    rows = np.frombuffer(zlib.decompress(parts[b"IDAT"]), np.uint8).reshape(height, 1 + 3 * width)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, 3)


def test_covers_are_pictures_in_the_colours_of_their_genre() -> None:
    for genre, (ground, *_, dark) in enumerate(invented.PALETTES):
        cover = invented.cover(3, genre)
        assert cover == invented.cover(3, genre) != invented.cover(4, genre)
        seen = pixels(cover)
        assert seen.shape == (invented.HEIGHT, invented.WIDTH, 3)
        assert tuple(seen[0, 0]) == ground
        assert tuple(seen[-1, 0]) == dark
        assert len(cover) < 8000


def full(path: Path) -> None:
    raise OSError("full")


def test_the_folder_of_a_tour_is_complete_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tour, "HOMES", (4, 16, 16, 16))
    monkeypatch.setattr(tour, "ITEMS", 140)
    cover = invented.cover(0, 0)
    monkeypatch.setattr(invented, "cover", lambda item, genre: cover)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="is not empty; expected a new folder"):
        tour.prepare(tmp_path / "mine")
    with monkeypatch.context() as broken:
        broken.setattr(tour, "read_details", full)
        with pytest.raises(OSError, match="full"):
            tour.prepare(tmp_path / "tour")
    assert [each.name for each in tmp_path.iterdir()] == ["mine"]
    folder = tmp_path / "tour"
    tour.prepare(folder)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["mine", "tour"]
    assert not tour.is_trained(folder)
    assert federated(tour.configuration(folder)).protection.secure
    hosted = []
    for number in range(4):
        with Node.open(folder / "nodes" / f"n{number}" / "store.db") as node:
            hosted.append(node.users())
            assert node.rules()["require"] == ["secure"]
            item = node.items_of(node.users()[0])[0]
            assert item["title"].split()[1] in invented.ADJECTIVES
            assert node.picture(item["item"]) is not None
    assert hosted[0] == list(tour.PEOPLE)
    assert [len(each) for each in hosted] == [4, 16, 16, 16]
    assert {each.partition(",")[0] for each in hosted[2]} == {"house 2"}
    with Node.open(tour.home(folder)) as node:
        assert "Who are you? " in Home(node).text("/")
