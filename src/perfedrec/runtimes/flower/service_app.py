"""The neighbourhood service as a process of a deployment.

Like a node it reads the method and its options in every message. It keeps its state after each round, so that it and
the coordinator may be restarted at any time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from perfedrec.runtimes.flower.codec import Setup, Task, UploadError
from perfedrec.runtimes.flower.node_loop import Activity
from perfedrec.runtimes.flower.service import SERVE, NeighbourhoodService, StateStore, needs_service


class ServiceApp:
    """The app of the neighbourhood service with the key ``private`` for nodes with the common public key ``clients``.

    ``build`` makes the method that a configuration in TOML describes. A coordinator with another ``version`` of this
    package is refused. States are kept in the ``state_store``.
    """

    description, absence = "the neighbourhood service", None

    def __init__(
        self, private: bytes, clients: bytes, build: Callable[[str], Any], version: str, state_store: StateStore
    ) -> None:
        self.private, self.clients, self.build, self.version = private, clients, build, version
        self.state_store, self.activity = state_store, Activity()
        self._joined: tuple[Setup, NeighbourhoodService] | None = None

    def app(self) -> ClientApp:
        """The ``ClientApp``."""
        app = ClientApp()

        @app.query()
        def present(message: Message, context: Context) -> Message:
            self._join(Setup.read(message.content))
            return Message(RecordDict(), reply_to=message)

        @app.train(SERVE.partition(".")[2])
        def serve(message: Message, context: Context) -> Message:
            service = self._join(Setup.read(message.content))
            answer = service.answer(message.content)
            self.activity.play(service.run, Task.round_of(message.content))
            return Message(answer, reply_to=message)

        return app

    def _join(self, setup: Setup) -> NeighbourhoodService:
        """The service in the run of a ``setup``. Raises :class:`UploadError` where it cannot take part in it."""
        if self._joined is None or self._joined[0] != setup:
            if setup.version != self.version:
                raise UploadError("version", f"it runs version {self.version}, the coordinator {setup.version}")
            algorithm = self.build(setup.configuration)
            if not needs_service(algorithm):
                raise UploadError("configuration", "the coordinator's configuration needs no neighbourhood service")
            service = NeighbourhoodService(algorithm, self.private, self.clients, self.state_store, setup.run)
            self._joined = setup, service
        return self._joined[1]
