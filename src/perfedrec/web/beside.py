"""The operator's page in a process of its own, beside the coordinator, which it can neither stop nor delay."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from perfedrec.core.errors import ConfigError
from perfedrec.core.extras import needed_by
from perfedrec.web.guard import token_file
from perfedrec.web.running import Listener, listening

TOKEN = "operator.token"
"""The file with the operator's token, beside the folder of the run."""

GOODBYE = 15.0
"""Seconds that the process has to end before it is killed."""


@contextmanager
def reserved(port: int | None) -> Iterator[Listener | None]:
    """Listen on the port of ``--page-port``; nothing with ``None``. Raises :class:`ConfigError` for a port that cannot
    be used."""
    if port is None:
        yield None
        return
    with needed_by("--page-port", "web"):
        import jinja2  # noqa: F401 - the page needs it, in the other process
    with ExitStack() as stack:
        try:
            listener = stack.enter_context(listening(port))
        except ConfigError as error:
            raise ConfigError(str(error).replace("--port", "--page-port")) from None
        yield listener


@contextmanager
def page_beside(listener: Listener | None, run: Path) -> Iterator[None]:
    """Show the operator's page about the ``run`` on a listener, until the end of the block. The page ends when this
    process does, however that happens."""
    if listener is None:
        yield
        return
    token = run.absolute().parent / TOKEN
    token.parent.mkdir(parents=True, exist_ok=True)
    token_file(token)
    number = listener.socket.fileno()
    command = [sys.executable, "-m", "perfedrec", "federation", "page", str(run), "--token", str(token)]
    command += ["--listen-on", str(number), "--until-stdin-closes"]
    # In a session of its own: Ctrl-C lets the coordinator end its round first.
    process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=(number,), start_new_session=True)
    listener.socket.close()
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(GOODBYE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdin is not None:
            process.stdin.close()
