"""Helpers that open a report in a browser and read its text and tables."""

import html
import re
from pathlib import Path
from typing import Any

import numpy as np
from playwright.sync_api import Browser, Page

NAME = "</script><script>window.stolen = true</script>"
"""The name of a data set that tries to inject a script."""


class Tab:
    """A page in the browser that records its errors (``errors``) and its requests (``requests``)."""

    def __init__(self, browser: Browser, file: Path, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(0)  # only pytest ends a test that hangs
        self.page: Page = self.context.new_page()
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())
        self.page.wait_for_selector("html[data-drawn]", state="attached")

    def look(self, script: str, *arguments: Any) -> Any:
        """The result of a JavaScript function in the page."""
        return self.page.evaluate(script, *arguments)


MARKS = """name => [...document.querySelectorAll(`#${name} .scatterlayer .trace`)].map(trace =>
  [...trace.querySelectorAll('.points > path, .points > .point')].map(mark => {
    const found = /translate\\(([-\\d.e]+)[, ]+([-\\d.e]+)\\)/.exec(mark.getAttribute('transform'));
    return [parseFloat(found[1]), parseFloat(found[2])];
  }))"""
AXIS = "([name, axis]) => document.querySelector(`#${name} .${axis}title`).textContent"


def same_up_to_scale(pixels: list[float], values: list[float], *, falling: bool = False) -> bool:
    """Whether positions on the screen are a linear function of the values, to half a pixel."""
    slope, start = np.polyfit(values, pixels, 1)
    assert (slope < 0) == falling
    return bool(np.abs(np.array(pixels) - (slope * np.array(values) + start)).max() < 0.5)


def text_of(report: Path) -> str:
    """The text that a reader sees, without markup and scripts."""
    page = report.read_text(encoding="utf-8")
    body = re.sub(r"<(script|style)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def rows_of(report: Path, caption: str) -> dict[str, dict[str, str]]:
    """A table of a report: for each row, by its first cell, the cells by the names of the columns."""
    page = report.read_text(encoding="utf-8")
    after = page[page.index(f'aria-label="{html.escape(caption)}"') :]
    table = after[: after.index("</table>")]
    lines = [
        [html.unescape(re.sub(r"<[^>]+>", "", cell)) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line)]
        for line in table.split("<tr>")[1:]
    ]
    return {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[1:]}
