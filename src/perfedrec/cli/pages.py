"""perfedrec node app and perfedrec tour: pages for people, on their own machine."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import typer

from perfedrec.cli.common import Quiet, console, hint_to_resume, one_line, reporter
from perfedrec.core.extras import needed_by

Port = Annotated[int, typer.Option(help="port on 127.0.0.1 (0: a free one)")]
Show = Annotated[
    bool | None,
    typer.Option("--open/--no-open", help="open the page in a browser (default: where there is a desktop)"),
]


def app(
    store: Annotated[Path, typer.Option("--store", help="the node's file")], port: Port = 0, show: Show = None
) -> None:
    """Open a page for the people whose data are in a node's file: lists, all that is stored, what left this device.

    The page is on 127.0.0.1 alone. The address that is printed lets one browser in, once. Ctrl-C ends the page.

    [bold]perfedrec node app --store home.node[/bold]
    """
    with one_line():
        _serve(store, port, show)


def tour(
    output: Annotated[Path, typer.Option(help="folder of the federation; the same folder opens it again")] = Path(
        "tour"
    ),
    port: Port = 0,
    show: Show = None,
    quiet: Quiet = False,
) -> None:
    """Start a federation of four homes with invented people and things, train it, and open the page of one of them.

    It takes about a minute. Ctrl-C ends the page; the folder stays.

    [bold]perfedrec tour[/bold]
    """
    with one_line():
        from perfedrec.federation import local
        from perfedrec.federation import tour as guide

        with _extra():
            import perfedrec.web.node_pages  # noqa: F401 - before a minute of training

        os.environ |= local.environment()
        if not guide.is_trained(output):
            with guide.alone(output):
                if not (output / "data" / guide.DETAILS).exists():
                    console.print("inventing people and things ...", soft_wrap=True)
                    guide.prepare(output)
                console.print("four homes train a model together; what they have stays with them ...", soft_wrap=True)
                with hint_to_resume(["tour", "--output", output]):
                    guide.train(output, reporter(quiet, False), lambda line: None)
        console.print(f"{output} has the federation; {guide.PEOPLE[0]} lives in the home on this page", soft_wrap=True)
        _serve(guide.home(output), port, show)


@contextmanager
def _extra() -> Iterator[None]:
    """The extra ``web`` is named where a package of it is missing, also one that another extra has as well."""
    with needed_by("the page", "web"):
        import python_multipart  # noqa: F401 - starlette needs it for forms, and does not bring it

        yield


def _serve(store: Path, port: int, show: bool | None) -> None:
    """Serve the page of a node until Ctrl-C."""
    from perfedrec.federation.owner import Node

    with _extra():
        from perfedrec.web.guard import Access, Guard
        from perfedrec.web.node_pages import BODY_LIMIT, NodePages
        from perfedrec.web.running import listening, serve

    with Node.open(store) as node, listening(port) as listener, ExitStack() as until_end:
        access = Access()

        def address() -> str:
            return f"{listener.address}/?token={access.one_time()}"

        # Requests that come before the server runs wait for it.
        print(f"open {address()}", flush=True)
        print("this address lets one browser in, once; Ctrl-C ends the page", flush=True)
        if _has_desktop() if show is None else show:
            webbrowser.open(until_end.enter_context(leading_to(address(), store)))
        advice = "start it again for another address"
        if sys.stdin.isatty():
            advice = "press Enter in the terminal in which it was started for another address"
            print("press Enter for another address", flush=True)
            threading.Thread(target=_answer, args=(address,), daemon=True).start()
        serve(Guard(NodePages(node).app(), access, body_limit=BODY_LIMIT, advice=advice), listener)


@contextmanager
def leading_to(address: str, beside: Path) -> Iterator[str]:
    """The address of a file that leads to another ``address``, and that only this user can read. The words with which a
    browser is started can be read by every user of the machine."""
    descriptor, name = tempfile.mkstemp(f".{beside.name}.html", "open-", beside.absolute().parent, text=True)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(f'<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0; url={address}">')
        yield Path(name).as_uri()
    finally:
        os.unlink(name)


def _answer(address: Callable[[], str]) -> None:
    """Print another address for each line that is typed."""
    while os.read(0, 4096):  # not sys.stdin: Python aborts if this thread holds its lock at the end
        print(f"open {address()}", flush=True)


def _has_desktop() -> bool:
    """Whether a browser with windows can be opened here, and not one that would take the terminal."""
    return sys.platform == "darwin" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
