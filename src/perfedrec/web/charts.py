"""Small charts as SVG inside a page. Colours and letters come from the style of the page, by classes: the content
policy of a page allows no style in its text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 300, 170
LEFT, RIGHT, TOP, BOTTOM = 44, 6, 10, 24
BARS = 60
"""The most bars in a chart: of more rounds the last ones are shown."""

Numbers = Sequence[float | None]


@dataclass(frozen=True)
class Series:
    """The values of one curve or of one part of stacked bars (``None``: there is none), its name, and its colour: the
    number of a colour of the page."""

    name: str
    values: Numbers
    colour: int = 1


def lines(series: Sequence[Series], labels: Sequence[str], unit: str = "", mark: int | None = None) -> Markup:
    """A chart of curves over rounds with these ``labels``; the point at ``mark`` is marked."""
    top = _top(series)
    parts = [_axes(top, labels, unit)]
    step = (WIDTH - LEFT - RIGHT) / max(len(labels) - 1, 1)
    for each in series:
        points = [(LEFT + step * at, _y(value, top)) for at, value in enumerate(each.values) if value is not None]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline class="line c{each.colour}" points="{path}"/>')
        if len(points) <= 2 * BARS:
            parts += [f'<circle class="dot c{each.colour}" cx="{x:.1f}" cy="{y:.1f}" r="2.2"/>' for x, y in points]
    if mark is not None and series and (value := series[0].values[mark]) is not None:
        parts.append(f'<circle class="mark" cx="{LEFT + step * mark:.1f}" cy="{_y(value, top):.1f}" r="6"/>')
    return _svg(parts, series, labels, unit)


def bars(series: Sequence[Series], labels: Sequence[str], unit: str = "") -> Markup:
    """A chart of stacked bars, one for each of the last rounds."""
    labels = labels[-BARS:]
    series = [Series(each.name, each.values[-BARS:], each.colour) for each in series]
    top = _top(
        [Series("", [sum(value or 0 for value in stack) for stack in zip(*(s.values for s in series), strict=True)])]
    )
    parts = [_axes(top, labels, unit)]
    step = (WIDTH - LEFT - RIGHT) / max(len(labels), 1)
    wide = min(step * 0.75, 24.0)
    for at in range(len(labels)):
        below = 0.0
        for each in series:
            value = each.values[at] or 0.0
            if value > 0:
                x, y = LEFT + step * (at + 0.5) - wide / 2, _y(below + value, top)
                high = _y(below, top) - y
                parts.append(
                    f'<rect class="bar c{each.colour}" x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{high:.1f}"/>'
                )
            below += value
    return _svg(parts, series, labels, unit)


def nice(value: float) -> float:
    """The next of 1, 2, 2.5 and 5 times a power of ten from a value on; 1 for nothing."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(each * power for each in (1, 2, 2.5, 5, 10) if value <= each * power * (1 + 1e-9))


def short(value: float) -> str:
    """A number in few letters: ``1.5k``, ``20M``, ``.05``."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _top(series: Sequence[Series]) -> float:
    return nice(max((value for each in series for value in each.values if value is not None), default=0.0))


def _y(value: float, top: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - value / top)


def _axes(top: float, labels: Sequence[str], unit: str) -> str:
    parts = []
    for share in (0.0, 0.5, 1.0):
        y = _y(share * top, top)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        text = short(share * top) + (unit if share == 1 else "")
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>')
    if labels:
        low = HEIGHT - 6
        parts.append(f'<text class="tick" x="{LEFT}" y="{low}">{escape(labels[0])}</text>')
        if len(labels) > 1:
            last = escape(labels[-1])
            parts.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{low}" text-anchor="end">{last}</text>')
    return "".join(parts)


def _svg(parts: Sequence[str], series: Sequence[Series], labels: Sequence[str], unit: str) -> Markup:
    """The chart, with its last values in words for those who do not see it."""
    told = []
    for each in series:
        known = [(label, value) for label, value in zip(labels, each.values, strict=True) if value is not None]
        if known:
            told.append(f"{each.name}: {short(known[-1][1])}{unit} in {known[-1][0]}")
    text = escape("; ".join(told) or "nothing so far")
    drawn = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text}">{"".join(parts)}</svg>'
    if len(series) < 2:
        return Markup(drawn)
    keys = "".join(f'<li class="c{each.colour}">{escape(each.name)}</li>' for each in series)
    return Markup(f'{drawn}<ul class="keys">{keys}</ul>')
