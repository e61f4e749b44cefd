"""The protocol of a federated algorithm: all that a runtime, the audit and the report use of a method.

Client functions are batch-first: they take the flat rows of any number of users (:class:`~perfedrec.core.types.Rows`),
so that a simulator passes a cohort, a node the users it hosts, and a phone one user, through the same code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, Self, TypeVar

from torch import Tensor

from perfedrec.core.aggregate import Aggregate, Aggregator
from perfedrec.core.keys import Key
from perfedrec.core.types import Embedding, Plan, Published, Rows, Spec, Update


@dataclass(frozen=True)
class Phase:
    """A kind of round, and how privacy treats what clients hand over in it.

    ``name`` stands in plans, messages and reports. ``bound``: "clip" limits the norm of a client's part by
    ``privacy.clip``; "unit" brings it to length 1 where noise is added, whatever its length was, so that no clip has to
    be chosen from people's data. ``noise`` names the option under ``privacy.noise`` that holds the noise of the phase's
    sums, ``None`` for a phase that has no sums. ``coordinates``: whether the mechanism per coordinate applies
    (``privacy.norm = "coordinate"``); it does not to counts.
    """

    name: str
    bound: Literal["clip", "unit"] = "unit"
    noise: str | None = None
    coordinates: bool = True

    @property
    def release(self) -> str:
        """Its name in the ledger of releases."""
        return self.noise or self.name


TRAIN = Phase("train", "clip", "training")
"""A round of training. Every method has it; it follows the method's own ``phases``."""


class Protects(Protocol):
    """What protects the data that leave clients (:class:`perfedrec.privacy.protection.Protection`)."""

    @property
    def sums(self) -> bool:
        """Whether clients contribute to sums alone: no vector and no edge of a user leaves its client."""

    @property
    def secure(self) -> bool:
        """Whether sums are taken by secure aggregation: nobody but the client sees what it hands over."""

    def upload(self, phase: str, update: Update, key: Key) -> Update:
        """What B users hand over, clipped and noised, each for itself. ``key`` is the key of the clients' work."""

    def add_noise(self, phase: str, aggregate: Aggregate, asked: int, key: Key) -> Aggregate:
        """A sum over some of a cohort's clients as it leaves them, with the noise that they add; the cohort has
        ``asked`` clients."""

    def aborted(self, phase: str, clients: int, asked: int) -> bool:
        """Whether too few ``clients`` of those ``asked`` answered for their sum to be opened."""


class RoundState(Protocol):
    """What every server state has."""

    @property
    def round(self) -> int:
        """Rounds played so far, phases before training included."""

    @property
    def items(self) -> Tensor:
        """[m, d] the global item table."""


class ClientRecord(Protocol):
    """What every client state has. It is a record whose fields have one row per user, except those whose
    ``field(metadata={"per": "row"})`` says one per interaction."""

    @property
    def loss(self) -> Tensor:
        """[B] the mean loss of each user's last round of training."""

    @property
    def participations(self) -> Tensor:
        """[B] rounds of training that each user took part in."""


class Received(Protocol):
    """What every broadcast has. Fields with ``field(metadata={"per": "user"})`` have one row per user, those with
    ``{"per": "group"}`` one block of rows per group."""

    @property
    def items(self) -> Tensor:
        """[m, d] the global item table."""

    def download_bytes(self, together: bool = False) -> int:
        """Bytes that one client receives, or that a node receives for all its users ``together``."""


S = TypeVar("S", bound=RoundState)
B = TypeVar("B", bound=Received)
C = TypeVar("C", bound=ClientRecord)


class Algorithm(Protocol[S, B, C]):
    """A federated algorithm: pure functions over an explicit server state S, a broadcast B and a client state C.

    ``server`` may reuse the storage of the state that it was given.
    """

    broadcast_type: ClassVar[type[Any]]
    """The class of B."""

    settings: Any
    """Its options, with the sections ``privacy`` and ``selection`` among them."""

    @property
    def protection(self) -> Protects:
        """What clips, adds noise and states guarantees."""

    @property
    def aggregator(self) -> Aggregator:
        """How the parts of a round become one aggregate."""

    @property
    def phases(self) -> Sequence[Phase]:
        """The phases played before training, one round each."""

    @property
    def reports_vectors(self) -> bool:
        """Whether clients hand over vectors of their users."""

    @property
    def needs_degrees(self) -> bool:
        """Whether it starts from the item degrees of ``spec``: no phase of its own releases them."""

    @property
    def needs_service(self) -> bool:
        """Whether a neighbourhood service has work to do; the method is then a :class:`ServedAlgorithm`."""

    @property
    def finetune_rounds(self) -> int:
        """Rounds of local training that serve a user best who was not in training."""

    # --- the server ---

    def init(self, spec: Spec, key: Key) -> S:
        """The server's state before the first round."""

    def plan(self, state: S, key: Key) -> Plan:
        """Phase and cohort of the next round."""

    def n_groups(self, state: S) -> int:
        """Groups (tables) that the next round's updates are summed by."""

    def groups(self, state: S, users: Tensor) -> Tensor:
        """[B] the group of each of ``users``."""

    def broadcast(self, state: S, users: Tensor) -> B:
        """What users [B] receive in this round; large tables are shared, not copied.

        :data:`~perfedrec.core.types.NEWCOMER` in place of a user stands for anybody whom the state does not know.
        """

    def server(self, state: S, phase: str, aggregate: Aggregate, key: Key) -> S:
        """The next state."""

    def serving(self, state: S) -> S:
        """The part of a state that recommending needs; a broadcast of it serves :meth:`scores`."""

    def releases(self, rounds: int, n_users: int) -> list[Any]:
        """All that a run of ``rounds`` rounds of training releases, for the ledger
        (:class:`perfedrec.privacy.ledger.Release`)."""

    # --- the clients ---

    def init_clients(self, rows: Rows, key: Key) -> C:
        """What the users of a block hold before their first round."""

    def client(self, phase: str, broadcast: B, rows: Rows, client_state: C, key: Key) -> tuple[Update, C]:
        """The users' work: what they hand over, before protection, and what they keep."""

    def init_new_user(self, broadcast: B, rows: Rows, client_state: C) -> C:
        """The client states of users who were not in training, when they receive the ``broadcast`` that it led to."""

    def without_privacy(self) -> Self:
        """The same method without decoys, masking and noise: for work of a client that it hands over to nobody."""

    # --- recommending ---

    def scores(self, broadcast: B, rows: Rows, client_state: C) -> Tensor:
        """[B, m] scores of all items for the users of a block."""

    def explain(self, broadcast: B, rows: Rows, client_state: C) -> dict[str, Tensor]:
        """Named parts [B, m] that sum to :meth:`scores`."""

    def embedding(self, broadcast: B, rows: Rows, client_state: C) -> Embedding | None:
        """Where the shared model puts users and items, ``None`` for a method without vectors."""

    def user_vectors(self, broadcast: B, rows: Rows, client_state: C) -> Tensor | None:
        """[B, d] the vectors with which items are scored in training, which an attacker would like to have; ``None``
        for a method that scores otherwise."""


class ServedAlgorithm(Algorithm[S, B, C], Protocol):
    """An algorithm whose ``server`` is two roles, which may live apart: a neighbourhood service and a coordinator."""

    def open_service(self, n_users: int, device: Any = None) -> Any:
        """What the service holds before the first round: ``reports`` [n, L, d] and ``start`` [n, d] or ``None``."""

    def serve(
        self, service: Any, phase: str, played: int, aggregate: Aggregate, centroids: Tensor | None, key: Key
    ) -> tuple[Any, Published]:
        """The service's part of a round, after which ``played`` rounds are played: it needs reports and edges alone."""

    def coordinate(self, state: S, phase: str, aggregate: Aggregate, published: Published, key: Key) -> S:
        """The coordinator's part of a round: it needs neither reports nor edges."""

    def without_tokens(self, state: S) -> S:
        """The state of a coordinator that does not know the items' tokens, because a service is apart."""

    def centroids(self, state: S) -> Tensor | None:
        """[K, d] the last centroids, from which the service clusters on; ``None`` before the first clustering."""
