"""The protocol of a federated algorithm: everything that runtimes, the audit and the report use of a method.

Client functions take the rows of any number of users at once (:class:`~perfedrec.core.types.Rows`). A simulator passes
a cohort, a node passes the users that it hosts, a phone passes one user: all through the same code.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import Field, dataclass
from typing import Any, ClassVar, Generic, Literal, Protocol, Self, TypeAlias, TypeVar

import torch
from torch import Tensor

from perfedrec.core.aggregate import Aggregate, Aggregator
from perfedrec.core.inference import InferenceOptions
from perfedrec.core.keys import Key
from perfedrec.core.scoring import RANKED_AT_ONCE, Scoring
from perfedrec.core.types import Embedding, Plan, Published, Rows, Spec, Update


@dataclass(frozen=True)
class Phase:
    """A kind of round, and how privacy treats what clients send in it.

    ``name`` appears in plans, messages and reports. ``bound``: "clip" limits the norm of a client's part to
    ``privacy.clip``; "unit" scales it to length 1 where noise is added, whatever its length was, so that no clip has to
    be chosen from users' data. ``noise`` is the option under ``privacy.noise`` that sets the noise of the phase's sums;
    ``None`` for a phase without sums. ``coordinates``: whether the mechanism per coordinate (``privacy.norm =
    "coordinate"``) applies; it does not apply to counts. ``opens`` is what of a sum leaves the clients where
    ``privacy.rank`` asks for low rank: "all" of it (counts), the "rows" that enough users contribute to, or its part in
    a "basis" of few columns.
    """

    name: str
    bound: Literal["clip", "unit"] = "unit"
    noise: str | None = None
    coordinates: bool = True
    opens: Literal["all", "rows", "basis"] = "all"

    @property
    def release(self) -> str:
        """The name of the phase in the privacy ledger."""
        return self.noise or self.name


TRAIN = Phase("train", "clip", "training", opens="basis")
"""A round of training. Every method has it; it comes after the method's own ``phases``."""

EVALUATE = Phase("evaluate", coordinates=False)
"""A question beside the rounds: how well a model ranks the items that users hold out. Every method has it, because a
runtime computes the answer from :meth:`Algorithm.scores`. It changes no state, and its sums have no noise."""


class Protects(Protocol):
    """The protection of data that leave clients (:class:`perfedrec.privacy.protection.Protection`)."""

    @property
    def sums(self) -> bool:
        """Whether clients contribute only to sums: no vector and no edge of a user leaves its client."""

    @property
    def secure(self) -> bool:
        """Whether sums are taken by secure aggregation: nobody but the client sees its update."""

    def multiplier(self, phase: str) -> float:
        """The noise of a phase, as a multiple of the bound on one user's part; 0 for no noise."""

    def upload(self, phase: str, update: Update, key: Key) -> Update:
        """The update of B users with each user's part clipped and noised. ``key`` is the key of the clients' work."""

    def hold_rows(self, phase: str, update: Update) -> Update:
        """The update with each user's change of each row within its bound: what a server that sees the uploads of
        clients does again, because they may not have done it."""

    def hold_sum(self, phase: str, part: Aggregate) -> Aggregate:
        """The same for a sum over several clients that the server sees."""

    def add_noise(self, phase: str, aggregate: Aggregate, asked: int, key: Key) -> Aggregate:
        """A sum over some clients of a cohort, with the noise that these clients add. The cohort has ``asked``
        clients."""

    def aborted(self, phase: str, clients: int, asked: int) -> bool:
        """Whether the round is aborted: only ``clients`` of the ``asked`` clients answered, too few for their sum to be
        opened."""

    def n_groups(self, phase: str, asked: int) -> int:
        """The number of groups of the ``asked`` clients whose sums are opened one by one; 1 where there is one sum."""

    @property
    def group_size(self) -> int:
        """The least number of clients of the groups whose sums by item are opened before training; 0 for no groups."""

    def grouped_once(self, phase: str) -> bool:
        """Whether the groups of a phase are drawn once for a run, and are those of all phases for which this holds.
        Other groups are drawn for each round."""

    def least_clients(self, phase: str, asked: int) -> int:
        """The least number of clients whose sum is opened, where ``asked`` clients are asked."""


class RoundState(Protocol):
    """What every server state has."""

    @property
    def round(self) -> int:
        """Number of rounds played, phases before training included."""

    @property
    def items(self) -> Tensor:
        """[m, d] the global item table."""


class ClientRecord(Protocol):
    """What every client state has. It is a record whose fields have one row per user, except fields with
    ``field(metadata={"per": "row"})``, which have one row per interaction."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def loss(self) -> Tensor:
        """[B] the mean loss of each user in its last round of training."""

    @property
    def participations(self) -> Tensor:
        """[B] the number of training rounds that each user took part in."""


class Received(Protocol):
    """What every broadcast has. Fields with ``field(metadata={"per": "user"})`` have one row per user, those with
    ``{"per": "group"}`` one block of rows per group."""

    @property
    def items(self) -> Tensor:
        """[m, d] the global item table."""

    def download_bytes(self, together: bool = False) -> int:
        """Bytes that one client receives; with ``together`` the bytes that a node receives for all its users."""


S = TypeVar("S", bound=RoundState)
B = TypeVar("B", bound=Received)
C = TypeVar("C", bound=ClientRecord)


class Algorithm(Protocol[S, B, C]):
    """A federated algorithm: pure functions over an explicit server state S, a broadcast B and a client state C.

    ``server`` may reuse the storage of the state that it receives.
    """

    broadcast_type: ClassVar[type[Any]]
    """The class of B."""

    settings: Any
    """The method's options, with at least the sections ``privacy`` and ``selection``."""

    @property
    def protection(self) -> Protects:
        """Clips, adds noise and states guarantees."""

    @property
    def aggregator(self) -> Aggregator:
        """How the parts of a round become one aggregate."""

    @property
    def phases(self) -> Sequence[Phase]:
        """The phases played before training, one round each."""

    @property
    def reports_vectors(self) -> bool:
        """Whether clients send vectors of their users."""

    @property
    def needs_degrees(self) -> bool:
        """Whether the method starts from the item degrees of ``spec``, because no phase of its own releases them."""

    @property
    def needs_service(self) -> bool:
        """Whether the method needs a neighbourhood service; it is then a :class:`ServedAlgorithm`."""

    @property
    def finetune_rounds(self) -> int:
        """How many rounds of local training suit a new user, who was not in training."""

    def remarks(self, n_users: int) -> list[str]:
        """What is different in a run with this number of users, as sentences; empty where nothing is."""

    # --- the server ---

    def init(self, spec: Spec, key: Key) -> S:
        """The server's state before the first round."""

    def plan(self, state: S, key: Key) -> Plan:
        """Phase and cohort of the next round."""

    def n_groups(self, state: S) -> int:
        """The number of groups (tables) by which the next round's updates are summed."""

    def n_rows(self, state: S) -> int:
        """The number of rows of each of these tables: m, or fewer where :meth:`compress` makes them so."""

    def groups(self, state: S, users: Tensor) -> Tensor:
        """[B] the group of each of ``users``."""

    def broadcast(self, state: S, users: Tensor) -> B:
        """What users [B] receive in this round. Large tables are shared, not copied.

        :data:`~perfedrec.core.types.NEWCOMER` in place of a user stands for any user whom the state does not know.
        """

    def server(self, state: S, phase: str, aggregate: Aggregate, key: Key) -> S:
        """The next state, after a round of ``phase`` with this ``aggregate``."""

    def lift(self, state: S, phase: str, aggregate: Aggregate) -> Aggregate:
        """An aggregate with a row for every item again, from what :meth:`compress` left of it. The server works with
        it, and so does an attacker who sees what the server sees."""

    def serving(self, state: S) -> S:
        """The part of a state that recommending needs. :meth:`scores` takes a broadcast of it."""

    def releases(self, rounds: int, n_users: int) -> list[Any]:
        """Everything that a run with ``rounds`` rounds of training releases, for the ledger (a list of
        :class:`perfedrec.privacy.ledger.Release`)."""

    # --- the clients ---

    def init_clients(self, rows: Rows, key: Key) -> C:
        """The client states of a block of users before their first round."""

    def client(self, phase: str, broadcast: B, rows: Rows, client_state: C, key: Key) -> tuple[Update, C]:
        """The users' work in a round: the update that they send, before protection, and their new client states."""

    def unread(self, phase: str) -> frozenset[str]:
        """The fields with a row per interaction that :meth:`client` does not read in a phase. It may be given
        :class:`~perfedrec.core.lookup.Unread` in their place, and returns :class:`~perfedrec.core.lookup.Changed` for
        them then, or the same again where nothing changed. So they need not be copied twice."""

    def compress(self, broadcast: B, phase: str, aggregate: Aggregate) -> Aggregate:
        """The part of a sum over clients that may leave them. It is exactly linear: compressed sums add up to the
        compressed sum."""

    def init_new_user(self, broadcast: B, rows: Rows, client_state: C) -> C:
        """The client states of new users, who were not in training, when they receive a ``broadcast`` of the trained
        state."""

    def without_privacy(self) -> Self:
        """The same method without decoys, masking and noise, for local work whose result stays on the client."""

    # --- what held-out items decide ---

    @property
    def n_choices(self) -> int:
        """How many settings of the served model users compare on their held-out items; 1: nothing is chosen so."""

    def choose(self, state: S, number: int) -> S:
        """The state with setting ``number``."""

    def chosen_options(self, state: S) -> dict[str, float]:
        """What held-out items have chosen in a served state, by name of the option; empty where they chose nothing."""

    # --- recommending ---

    def ranked_alike(self, state: S, users: Tensor) -> Tensor:
        """[B] numbers of ``users``: those with equal numbers are ranked faster together."""

    @property
    def ranked_at_once(self) -> int:
        """For how many users one call of :meth:`scoring` is made: where it computes all scores, they need memory."""

    def scoring(self, broadcast: B, rows: Rows, client_state: C, compared: bool = False) -> Scoring:
        """The same as :meth:`scores`, computed where it is needed. If settings are ``compared``, the scores by each of
        them, where setting 0 is that of the served state; by this one alone where nothing can be chosen yet."""

    def scores(self, broadcast: B, rows: Rows, client_state: C) -> Tensor:
        """[B, m] scores of all items for the users of a block."""

    def explain(self, broadcast: B, rows: Rows, client_state: C) -> dict[str, Tensor]:
        """Named parts [B, m] that sum to :meth:`scores`."""

    @property
    def inference(self) -> InferenceOptions | None:
        """The options by which a node scores without torch; ``None`` for a method that needs torch."""

    def embedding(self, broadcast: B, rows: Rows, client_state: C) -> Embedding | None:
        """The vectors of users and items in the shared model; ``None`` for a method without vectors."""

    def user_vectors(self, broadcast: B, rows: Rows, client_state: C) -> Tensor | None:
        """[B, d] the vectors that score items in training, which an attacker would want to know; ``None`` for a method
        that scores in another way."""


class OneSetting(ABC, Generic[S, B, C]):
    """Fulfils the parts of :class:`Algorithm` about choices, ranking and inference, for a model with nothing to choose
    that computes all scores at once and needs torch."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own, inherited = vars(cls), cls.scoring
        if "scores" in own and "scoring" not in own and inherited is not OneSetting.scoring:  # its scores count
            cls.scoring = OneSetting.scoring  # type: ignore[method-assign]

    def remarks(self, n_users: int) -> list[str]:
        return []

    def unread(self, phase: str) -> frozenset[str]:
        return frozenset()

    @property
    def n_choices(self) -> int:
        return 1

    @abstractmethod
    def groups(self, state: S, users: Tensor) -> Tensor: ...

    def ranked_alike(self, state: S, users: Tensor) -> Tensor:
        return self.groups(state, users)

    @property
    def ranked_at_once(self) -> int:
        return RANKED_AT_ONCE

    def scoring(self, broadcast: B, rows: Rows, client_state: C, compared: bool = False) -> Scoring:
        return Scoring.of(self.scores(broadcast, rows, client_state))

    @abstractmethod
    def scores(self, broadcast: B, rows: Rows, client_state: C) -> Tensor: ...

    def choose(self, state: S, number: int) -> S:
        return state

    def chosen_options(self, state: S) -> dict[str, float]:
        return {}

    @property
    def inference(self) -> InferenceOptions | None:
        return None


AnyAlgorithm: TypeAlias = Algorithm[Any, Any, Any]
"""An algorithm, for code that only passes its records on."""


class ServedAlgorithm(Algorithm[S, B, C], Protocol):
    """An algorithm whose ``server`` consists of two roles, which may run on two machines: a neighbourhood service and a
    coordinator."""

    def open_service(self, n_users: int, device: torch.device | None = None) -> Any:
        """The service's state before the first round, with ``reports`` [n, L, d] and ``start`` [n, d] or ``None``."""

    def serve(
        self, service: Any, phase: str, played: int, aggregate: Aggregate, centroids: Tensor | None, key: Key
    ) -> tuple[Any, Published]:
        """The service's part of a round; ``played`` is the number of rounds played after it. It needs only reports and
        edges."""

    def coordinate(self, state: S, phase: str, aggregate: Aggregate, published: Published, key: Key) -> S:
        """The coordinator's part of a round: it needs neither reports nor edges."""

    def without_tokens(self, state: S) -> S:
        """The state without the items' tokens, for a coordinator that must not know them because a service runs apart
        from it."""

    def centroids(self, state: S) -> Tensor | None:
        """[K, d] the last centroids, from which the service starts its next clustering; ``None`` before the first
        one."""
