"""Invented titles and covers for synthetic items, so that a list of them can be read and looked at.

Everything is drawn with keys (:mod:`perfedrec.core.words`): the same items always get the same titles and covers.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from perfedrec.core.errors import ConfigError
from perfedrec.core.words import WordKey, symmetric

GENRES = ("Mystery", "Science fiction", "Comedy", "Nature", "Adventure")
"""One for each taste cluster of synthetic items."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    "Amber Borrowed Careful Distant Early Faded Gentle Hidden Idle Lasting Northern Patient Quiet Restless Salt Second "
    "Slow Small Tidal Unsent Velvet Wandering Winter Yellow"
)
NOUNS = (
    _words("Alibi Cellar Inspector Keyhole Ledger Letter Locksmith Pathologist Signature Staircase Stranger Witness"),
    _words("Airlock Android Colony Comet Engine Horizon Observatory Orbit Paradox Satellite Signal Starship"),
    _words("Bakery Bridesmaid Cousin Holiday Landlord Neighbour Picnic Plumber Rehearsal Sandwich Umbrella Waiter"),
    _words("Estuary Fern Glacier Heron Meadow Moss Orchard Otter River Starling Thicket Tundra"),
    _words("Atlas Caravan Compass Expedition Harbour Lantern Lighthouse Pilot Rope Summit Treasure Voyage"),
)
"""Words of each genre."""

FIRST_YEAR, YEARS = 1962, 62

WIDTH, HEIGHT = 180, 240
"""Pixels of a cover."""

PALETTES = (
    ((38, 44, 62), (104, 76, 92), (214, 170, 112), (238, 224, 196)),
    ((22, 30, 66), (70, 74, 160), (96, 176, 196), (236, 232, 240)),
    ((250, 228, 176), (240, 150, 88), (206, 84, 88), (92, 52, 78)),
    ((226, 232, 206), (134, 172, 128), (60, 112, 98), (28, 56, 62)),
    ((248, 224, 198), (224, 138, 92), (64, 126, 140), (34, 54, 80)),
)
"""Colours of each genre: the ground, two shades, and the one of shapes."""

Pixels = NDArray[np.float32]
KEY = WordKey(0).fold("invented items")


def titles(genres: Sequence[int]) -> list[str]:
    """A title for each item, all of them different, from the words of its genre (a number of :data:`GENRES`).

    Raises :class:`ConfigError` where a genre has more items than titles.
    """
    found, used = [], [0] * len(GENRES)
    orders = [_order(number) for number in range(len(GENRES))]
    for genre in genres:
        if used[genre] == len(orders[genre]):
            raise ConfigError(f"there are {len(orders[genre])} titles of each genre; expected no more items than that")
        adjective, noun = orders[genre][used[genre]]
        used[genre] += 1
        found.append(f"The {adjective} {noun}")
    return found


def _order(genre: int) -> list[tuple[str, str]]:
    """All pairs of words of a genre, in a drawn order."""
    pairs = [(adjective, noun) for adjective in ADJECTIVES for noun in NOUNS[genre]]
    words = KEY.fold("titles", genre).words(np.arange(len(pairs)))
    return [pairs[each] for each in np.argsort(words, kind="stable")]


def year(item: int) -> int:
    """An invented year."""
    return FIRST_YEAR + KEY.fold("year", item).value % YEARS


def cover(item: int, genre: int) -> bytes:
    """A small picture of an item, as PNG: hills, waves or a town under a sun, in the colours of its genre."""
    draws = symmetric(np.uint64(KEY.fold("cover", item).value), 24)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32) / WIDTH
    ground, light, shade, dark = (np.array(each, dtype=np.float32) for each in PALETTES[genre])
    high = HEIGHT / WIDTH
    canvas = ground + (light - ground) * (y / high * (0.35 + 0.25 * draws[0]))[..., None]

    def paint(inside: Pixels, colour: Pixels) -> None:
        """Colour what is inside, by its distance [height, width] from the edge; the edge itself is smooth."""
        share = np.clip(inside * WIDTH + 0.5, 0, 1)[..., None]
        canvas[...] = canvas + (colour - canvas) * share

    radius = 0.17 + 0.07 * draws[3]
    away = np.hypot(x - (0.5 + 0.28 * draws[1]), y - high * (0.34 + 0.14 * draws[2]))
    paint(radius - away, light if draws[4] > 0 else shade)
    if draws[5] > 0.3:
        paint(0.055 * radius - np.abs(away - 1.3 * radius), dark)
    layers: list[Pixels] = [(light + shade) / np.float32(2), shade, dark]
    for layer, colour in enumerate(layers):
        edge = high * (0.58 + 0.15 * layer) + _skyline(x[:1], draws[6 + 5 * layer : 11 + 5 * layer], genre)
        paint(y - edge, colour)
    return _png(np.rint(canvas).astype(np.uint8))


def _skyline(x: Pixels, draws: NDArray[np.float64], genre: int) -> Pixels:
    """The height of a layer over the width of a cover: roofs for mysteries and comedies, waves or hills otherwise."""
    if GENRES[genre] in ("Mystery", "Comedy"):
        steps = np.floor(x * (7 + 3 * draws[0]) + draws[1])
        roofs: Pixels = (0.09 * np.sin(steps * (2.3 + draws[2]) + 5 * draws[3])).astype(np.float32)
        return roofs
    sharp = GENRES[genre] == "Adventure"
    wave = np.sin(2 * np.pi * (x * (0.9 + 0.5 * draws[0]) + draws[1]))
    wave = 2 * np.abs(wave) - 1 if sharp else wave
    hills: Pixels = (0.09 * wave + 0.035 * np.sin(2 * np.pi * (x * (2.4 + draws[2]) + draws[3]))).astype(np.float32)
    return hills


def _png(pixels: NDArray[np.uint8]) -> bytes:
    """A picture [height, width, 3] as a PNG file."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, _ = pixels.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
