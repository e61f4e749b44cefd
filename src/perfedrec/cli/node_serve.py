"""perfedrec node serve: a node's lists for an app on the same machine."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from perfedrec.cli.common import console, one_line
from perfedrec.cli.node import StoreFile
from perfedrec.core.errors import ConfigError, PerfedrecError

if TYPE_CHECKING:
    from perfedrec import Node

PORT = 8100
"""Where the interface is found, unless another place is chosen."""


def _warm(node: Node) -> None:
    """Read the model before the first question comes, which would wait for it: up to a second."""
    if users := node.users():
        with suppress(PerfedrecError):  # there is no model yet
            node.recommend(users[0], 1)


def serve(
    store: StoreFile,
    port: Annotated[int | None, typer.Option(help=f"port of 127.0.0.1; 0 for a free one (default: {PORT})")] = None,
    unix: Annotated[
        Path | None, typer.Option(help="listen on this Unix socket, which needs no token, and on no port")
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="file with the token; made where it is missing (default: a new token each time)")
    ] = None,
) -> None:
    """Answer an app on this machine: lists, items and interactions over HTTP, until SIGTERM or Ctrl-C.

    Only who has the token, or can use the Unix socket, gets an answer. The page /docs shows all questions.

    [bold]perfedrec node serve --store home.node[/bold]
    """
    with one_line():
        if unix is not None and (port is not None or token_file is not None):
            raise ConfigError(
                "--unix listens on no port and needs no token; expected it without --port and --token-file"
            )
        from threadpoolctl import threadpool_limits

        from perfedrec.federation.owner import Node
        from perfedrec.web.guard import Access
        from perfedrec.web.guard import token_file as read_token
        from perfedrec.web.node_api import node_api
        from perfedrec.web.running import listening
        from perfedrec.web.running import serve as answer

        access = None if unix is not None else Access(None if token_file is None else read_token(token_file))
        # One question has too little work for several threads, which would wait for each other.
        with (
            threadpool_limits(1),
            Node.open(store) as node,
            Node.open(store) as slow,
            listening(PORT if port is None else port, unix) as listener,
        ):
            _warm(node)
            console.print(f"{store}: answers at {listener.address}; Ctrl-C ends it", soft_wrap=True, highlight=False)
            if access is not None:
                where = f"token: {access.token}" if token_file is None else f"token: in {token_file}"
                console.print(where, soft_wrap=True, highlight=False)
            answer(node_api(node, slow, access), listener)
