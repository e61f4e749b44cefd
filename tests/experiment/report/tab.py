"""A report in the browser."""

from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page

NAME = "</script><script>window.stolen = true</script>"
"""What a hostile data set might be called."""


class Tab:
    """A page in the browser that notes what goes wrong and what it asks of the network."""

    def __init__(self, browser: Browser, file: Path, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page: Page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(file.as_uri())
        self.page.wait_for_selector("html[data-drawn]", state="attached")

    def look(self, script: str, *arguments: Any) -> Any:
        """What a function of the page's own language answers."""
        return self.page.evaluate(script, *arguments)
