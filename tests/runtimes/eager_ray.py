"""A stand-in for Ray in one process: calls are done at once, values travel as Ray sends them, and workers die on
demand."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import ray


@dataclass
class Value:
    """What a call has returned, or the error that it ended with."""

    content: bytes = b""
    buffers: list[bytes] = field(default_factory=list)
    error: BaseException | None = None

    @staticmethod
    def of(thing: Any) -> Value:
        buffers: list[Any] = []
        content = ray.cloudpickle.dumps(thing, protocol=5, buffer_callback=buffers.append)
        return Value(content, [bytes(each.raw()) for each in buffers])

    def get(self) -> Any:
        """The value, whose arrays are read-only, as those from Ray's store are."""
        if self.error is not None:
            raise self.error
        return pickle.loads(self.content, buffers=self.buffers)  # noqa: S301 - made by Value.of


class Actor:
    """An object whose methods are called by ``actor.method.remote(...)``."""

    def __init__(self, made: Any, ray: EagerRay) -> None:
        self.made, self.ray, self.dead = made, ray, False

    def __getattr__(self, name: str) -> Any:
        def options(num_returns: int = 1) -> SimpleNamespace:
            return SimpleNamespace(remote=lambda *given: self._call(name, num_returns, given))

        return SimpleNamespace(options=options, remote=lambda *given: self._call(name, 1, given))

    def _call(self, name: str, n: int, given: tuple[Any, ...]) -> Any:
        failed = [each for each in given if isinstance(each, Value) and each.error is not None]
        if failed:
            return self._several(failed[0], n)
        deadly = not self.dead and self.ray.kills(self, name)
        found: Any = None
        if not self.dead and deadly != "before":
            try:
                found = getattr(self.made, name)(*(each.get() if isinstance(each, Value) else each for each in given))
            except Exception as error:
                return self._several(Value(error=ray.exceptions.RayTaskError(name, "", error)), n)
        self.dead = self.dead or bool(deadly)
        if self.dead:
            return self._several(Value(error=ray.exceptions.RayActorError()), n)
        return Value.of(found) if n == 1 else [Value.of(each) for each in found]

    @staticmethod
    def _several(value: Value, n: int) -> Any:
        return value if n == 1 else [value] * n


class EagerRay:
    """The part of Ray that :mod:`perfedrec.runtimes.cluster` uses. ``kills(actor, method)`` says whether an actor dies
    in a call, "before" it does anything or "after" it."""

    exceptions, cloudpickle = ray.exceptions, ray.cloudpickle

    def __init__(self, kills: Callable[[Actor, str], str] = lambda actor, name: "") -> None:
        self.kills, self.actors = kills, list[Actor]()

    put = staticmethod(Value.of)

    def get(self, what: Any, timeout: float = 0) -> Any:
        return [each.get() for each in what] if isinstance(what, list) else what.get()

    def remote(self, kind: Any) -> Any:
        def start(*given: Any) -> Actor:
            made = kind(*(each.get() if isinstance(each, Value) else each for each in given))
            self.actors.append(Actor(made, self))
            return self.actors[-1]

        return SimpleNamespace(options=lambda **more: SimpleNamespace(remote=start))

    def kill(self, actor: Actor) -> None:
        actor.dead = True

    def shutdown(self) -> None:
        self.actors = []
