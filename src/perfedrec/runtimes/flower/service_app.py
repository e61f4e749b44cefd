"""The neighbourhood service as a process of a deployment.

It is told method and options in every message, as nodes are, and keeps its state after each round, so that it and the
coordinator may be restarted at any time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from perfedrec.runtimes.flower.codec import Setup, Task, UploadError
from perfedrec.runtimes.flower.node_app import Work
from perfedrec.runtimes.flower.service import SERVE, NeighbourhoodService, StateStore, needed


class ServiceApp:
    """The app of the neighbourhood service with the key ``private`` for nodes with the common public key ``clients``.

    ``build`` makes the method that a configuration in TOML describes. Another ``version`` of this package than its own
    is refused.
    """

    about = "the neighbourhood service"

    def __init__(
        self, private: bytes, clients: bytes, build: Callable[[str], Any], version: str, shelf: StateStore
    ) -> None:
        self.private, self.clients, self.build, self.version, self.shelf = private, clients, build, version, shelf
        self.done = Work()
        self._joined: tuple[Setup, NeighbourhoodService] | None = None

    def app(self) -> ClientApp:
        """The ``ClientApp``."""
        app = ClientApp()

        @app.query()
        def present(message: Message, context: Context) -> Message:
            self._agreed(Setup.read(message.content))
            return Message(RecordDict(), reply_to=message)

        @app.train(SERVE.partition(".")[2])
        def serve(message: Message, context: Context) -> Message:
            service = self._agreed(Setup.read(message.content))
            answer = service.answer(message.content)
            self.done.play(service.run, Task.round_of(message.content))
            return Message(answer, reply_to=message)

        return app

    def _agreed(self, setup: Setup) -> NeighbourhoodService:
        if self._joined is None or self._joined[0] != setup:
            if setup.version != self.version:
                raise UploadError("version", f"it runs version {self.version}, the coordinator {setup.version}")
            algorithm = self.build(setup.configuration)
            if not needed(algorithm):
                raise UploadError("configuration", "it has nothing to do in the coordinator's configuration")
            service = NeighbourhoodService(algorithm, self.private, self.clients, self.shelf, setup.run)
            self._joined = setup, service
        return self._joined[1]
