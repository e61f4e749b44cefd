"""Every hook of the federated engine has an effect: a method that overrides it plays another run."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from tests.methods.federated.toys import population
from torch import Tensor

from perfedrec.audit.audit import Tap
from perfedrec.core.aggregate import Aggregate, Sum
from perfedrec.core.algorithm import Phase
from perfedrec.core.errors import ConfigError, PerfedrecError
from perfedrec.core.keys import Key
from perfedrec.core.types import Embedding, Plan, Rows, Spec, Update
from perfedrec.methods.federated.base import Federated
from perfedrec.methods.federated.local import LocalResult, LocalTask, autograd_steps
from perfedrec.methods.federated.settings import FederatedSettings, TableSettings
from perfedrec.methods.federated.state import Broadcast, ClientState, ServerState
from perfedrec.privacy.ledger import Ledger
from perfedrec.privacy.settings import PrivacySettings
from perfedrec.runtimes.node import LocalRecommender, Store, serving_broadcast
from perfedrec.runtimes.round import play_round
from perfedrec.runtimes.simulator import PersonalRecommender

DIM, SEED, USERS, ITEMS = 4, 5, 30, 24


class Plain(Federated[ServerState, Broadcast, ClientState]):
    """``s_ui = p_u . q_i``, and nothing else."""

    def logits(self, private: Tensor, rows: Tensor, segments: Tensor, dense: Tensor | None) -> Tensor:
        scores = (private[segments, :DIM] * rows).sum(1)
        return scores if dense is None else scores + dense[segments].sum(1)

    def all_scores(self, private: Tensor, items: Tensor, dense: Tensor | None) -> Tensor:
        return private[:, :DIM] @ items.T


def settings(**privacy: Any) -> FederatedSettings:
    selection = {"n_clients_per_round": 12}
    model = TableSettings(embedding_dim=DIM)
    return FederatedSettings(model=model, selection=selection, privacy=PrivacySettings(**privacy))  # type: ignore[arg-type]


def outcome(kind: type[Federated[Any, Any, Any]], rounds: int = 4, **privacy: Any) -> dict[str, Any]:
    """The results of a run of a method, as seen by all who use a method: runtimes, recommender, audit and ledger."""
    method, people = kind(settings(**privacy)), population()
    spec = Spec(USERS, ITEMS, torch.bincount(people.items, minlength=ITEMS))
    state, tap = method.init(spec, Key(SEED).fold("init")), Tap(method, [1])
    people.init_clients(method, SEED)
    everyone, reports = people.everyone(), []
    for number in range(rounds):
        tap.number = number
        state, report = play_round(tap, state, people, SEED)  # type: ignore[arg-type]
        reports.append(report)
    served = method.serving(state)
    recommender = PersonalRecommender(method, served, people)
    placed = recommender.embedding(everyone)
    ledger = Ledger(method.releases(rounds, USERS), 1e-5)
    return {
        "scores": recommender.raw_scores(everyone),
        "explained": torch.stack(list(recommender.explain(everyone).values())),
        "embedding": torch.zeros(0) if placed is None else placed.users,
        "seen by an attacker": [each.vectors for each in tap.captured.values()],
        "sent": torch.stack([torch.tensor(float(each.deltas.sum())) for each in _updates(tap)]),
        "reports": [float(each.reports.sum()) for each in _updates(tap) if each.reports is not None],
        "items": state.items,
        "private": people.client_state.private,
        "rows": people.client_state.rows,
        "losses": [each.loss for each in reports],
        "cohorts": [each.cohort for each in reports],
        "releases": ledger.lines(),
        "asks": (method.needs_degrees, method.needs_service, method.reports_vectors),
    }


def _updates(tap: Tap) -> Iterable[Update]:
    return [each.update for each in tap.captured.values()]


@cache
def plain() -> dict[str, Any]:
    return outcome(Plain)


def differ(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape != b.shape or not torch.equal(a, b)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) != len(b) or any(differ(*pair) for pair in zip(a, b, strict=True))
    return bool(a != b)


def shifted(task: LocalTask) -> LocalResult:
    """A replacement for the local steps."""
    return replace(found := autograd_steps(task), private=found.private + 1)


class Half(Sum):
    """An aggregator that halves the sum."""

    def combine(self, phase: str, parts: Iterable[Aggregate], empty: Aggregate) -> Aggregate:
        total = super().combine(phase, parts, empty)
        return replace(total, sums=(total.sums / 2).round())


def tables(kind: type[Plain], **hooks: Any) -> type[Plain]:
    """A method with two tables beside the shared one, to which clients contribute by turns."""

    def by_turns(self: Plain, state: ServerState, users: Tensor) -> Tensor:
        return users % 2

    own = {"n_tables": lambda self: 2, "table_share": lambda self, state: 1.0, "groups": by_turns}
    rows = {"table_rows": _own_rows, "broadcast": _with_offsets}
    return type("Tables", (kind,), own | rows | hooks)


class _Offsets(SimpleNamespace):
    def download_bytes(self, together: bool = False) -> int:
        return 0


def _with_offsets(self: Plain, state: ServerState, users: Tensor) -> Any:
    groups = self.groups(state, users)
    return _Offsets(items=state.items, dense=None, groups=groups, offsets=state.offsets)


def _own_rows(self: Plain, broadcast: Any, items: Tensor, segments: Tensor) -> Tensor:
    groups: Tensor = broadcast.groups[segments]
    rows: Tensor = broadcast.items[items] + broadcast.offsets[groups * ITEMS + items]
    return rows


def second(self: Plain, broadcast: Any, rows: Rows, client_state: ClientState) -> Tensor:
    return torch.ones_like(rows.users)


def with_super(name: str, change: Callable[[Any], Any]) -> dict[str, Any]:
    """An override that changes the result of the engine's own function."""

    def function(self: Any, *given: Any) -> Any:
        return change(getattr(super(type(self), self), name)(*given))

    return {name: function}


def double(values: Tensor) -> Tensor:
    return 2 * values


OVERRIDES: dict[str, dict[str, Any]] = {
    "aggregator": {"aggregator": Half()},
    "local_steps": {"local_steps": staticmethod(shifted)},
    "n_private": {"n_private": lambda self: DIM + 1},
    "init_private": with_super("init_private", double),
    "init_dense": {"init_dense": lambda self, key: torch.ones(3)},
    "table_rows": with_super("table_rows", double),
    "begins": {"begins": lambda self, client_state, positions, received: torch.ones_like(received)},
    "keeps": {"keeps": lambda self, begun, delta: 2 * delta},
    "logits": with_super("logits", double),
    "all_scores": with_super("all_scores", double),
    "local_loss": with_super("local_loss", double),
    "penalty": {
        "penalty": lambda self, received, begun, delta, segments, client_state: received.new_zeros(
            client_state.private.shape[0]
        ).index_add(0, segments, (received + delta).square().sum(1))
    },
    "n_negatives": {"n_negatives": lambda self: 1},
    "report": {"report": lambda self, broadcast, rows, client_state, key: client_state.private[:, None]},
    "select": {"select": lambda self, state, key: torch.arange(5)},
    "plan": {"plan": lambda self, state, key: Plan("train", torch.arange(7))},
    "broadcast": with_super("broadcast", lambda found: replace(found, items=found.items + 1)),
    "server": with_super("server", lambda state: replace(state, items=state.items + 1)),
    "group_weights": with_super("group_weights", double),
    "server_step": {"server_step": lambda self, state, aggregate: state.items.add_(1)},
    "serving": with_super("serving", lambda state: replace(state, items=state.items + 1)),
    "init": with_super("init", lambda state: replace(state, items=state.items + 1)),
    "init_clients": with_super("init_clients", lambda found: replace(found, private=found.private + 1)),
    "client": with_super("client", lambda pair: (pair[0], replace(pair[1], private=pair[1].private + 1))),
    "train": with_super("train", lambda pair: (replace(pair[0], deltas=2 * pair[0].deltas), pair[1])),
    "private_of": with_super("private_of", double),
    "hand_over": with_super("hand_over", lambda pair: (replace(pair[0], deltas=3 * pair[0].deltas), pair[1])),
    "scores": with_super("scores", double),
    "explain": {"explain": lambda self, *given: {"one": self.scores(*given), "two": self.scores(*given)}},
    "embedding": {"embedding": lambda self, broadcast, rows, kept: Embedding(kept.private, broadcast.items)},
    "user_vectors": {"user_vectors": lambda self, broadcast, rows, kept: kept.private},
    "releases": {"releases": lambda self, rounds, n_users: []},
    "needs_degrees": {"needs_degrees": property(lambda self: True)},
    "needs_service": {"needs_service": property(lambda self: True)},
    "reports_vectors": {"reports_vectors": property(lambda self: True)},
    "phase": {"phase": lambda self, state: "train"},
}
"""Hooks, each with an override that changes a run of the plain method."""

ELSEWHERE = {
    "n_tables": "test_additional_tables_receive_the_changes_of_their_groups",
    "table_share": "test_additional_tables_receive_the_changes_of_their_groups",
    "groups": "test_additional_tables_receive_the_changes_of_their_groups",
    "contributes_to": "test_additional_tables_receive_the_changes_of_their_groups",
    "n_models": "test_additional_tables_receive_the_changes_of_their_groups",
    "n_groups": "test_an_unknown_group_is_refused_in_one_line",
    "chooses_table": "test_several_tables_under_sums_need_clients_that_choose",
    "phases": "test_a_custom_phase_is_played_before_training",
    "trained": "test_a_custom_phase_is_played_before_training",
    "questions": "test_phases_before_the_first_round_are_known_to_privacy",
    "loss_name": "test_local_steps_of_ones_own_are_checked",
    "star": "tests/methods/federated/test_family.py: FastPFRec",
    "finetune_rounds": "test_a_node_trains_new_users_as_the_method_defines",
    "init_new_user": "test_a_node_trains_new_users_as_the_method_defines",
    "without_privacy": "test_a_node_trains_new_users_as_the_method_defines",
    "sums": "a fact that follows from the settings",
    "subspace": "tests/methods/federated/test_subspace.py",
    "n_rows": "tests/methods/federated/test_subspace.py",
    "lift": "tests/methods/federated/test_subspace.py",
    "compress": "tests/methods/federated/test_subspace.py",
    "Options": "tests/runs/test_config.py",
    "broadcast_type": "tests/runtimes/node/test_serving.py",
    "remarks": "tests/methods/federated/test_defence.py",
}
"""Hooks whose effect shows elsewhere."""


@pytest.mark.parametrize("name", [name for name in OVERRIDES if name != "phase"])
def test_overriding_a_hook_changes_the_run(name: str) -> None:
    other = outcome(type("Other", (Plain,), OVERRIDES[name]))
    assert any(differ(plain()[key], other[key]) for key in other), f"{name} changes nothing"


def test_every_hook_is_tested() -> None:
    public = {name for name in vars(Federated) if not name.startswith("_")}
    assert public == OVERRIDES.keys() | ELSEWHERE.keys()


def test_the_same_method_plays_the_same_run() -> None:
    again = outcome(type("Same", (Plain,), {}))
    assert not any(differ(plain()[key], again[key]) for key in again)


def test_additional_tables_receive_the_changes_of_their_groups() -> None:
    base = outcome(tables(Plain))
    for hooks in (
        {"table_share": lambda self, state: 0.0},
        {"groups": lambda self, state, users: torch.zeros_like(users)},
        {"contributes_to": second},
        {"n_tables": lambda self: 3, "groups": lambda self, state, users: users % 3},
        {"n_models": lambda self, state: 2, "contributes_to": second},
    ):
        other = outcome(tables(Plain, **hooks))
        assert differ(base["private"], other["private"]), hooks


@pytest.mark.parametrize("hook", ["groups", "contributes_to"])
def test_an_unknown_group_is_refused_in_one_line(hook: str) -> None:
    def beyond(group: int) -> type[Plain]:
        hooks = {
            "groups": lambda self, state, users: torch.full_like(users, group),
            "contributes_to": lambda self, broadcast, rows, client_state: group * (rows.users % 2),
        }
        return type("Beyond", (Plain,), {hook: hooks[hook]})

    kind = beyond(2)
    with pytest.raises(PerfedrecError, match="for group 2, and there are 1 groups in this phase"):
        outcome(kind)
    if hook == "contributes_to":  # which is checked at the server alone
        with pytest.raises(PerfedrecError, match="for group -1, and there are 1 groups in this phase"):
            outcome(beyond(-1))
    more = type("More", (kind,), {"n_groups": lambda self, state: 3})
    assert outcome(more)["cohorts"] == [12] * 4


def test_several_tables_under_sums_need_clients_that_choose() -> None:
    secure = settings(aggregation="secure")
    with pytest.raises(ConfigError, match="expected sparse aggregation"):
        tables(Plain)(secure)
    assert tables(Plain, chooses_table=True)(secure).protection.secure


class Warm(Plain):
    """A method with a phase before training, in which clients add up how many items they have."""

    noise: str | None = None

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (Phase("warm", noise=self.noise, coordinates=False),)

    def client(
        self, phase: str, broadcast: Broadcast, rows: Rows, client_state: ClientState, key: Key
    ) -> tuple[Update, ClientState]:
        if phase != "warm":
            return super().client(phase, broadcast, rows, client_state, key)
        ones = torch.ones(rows.n_users)
        return Update(rows.users, broadcast.groups, ones, dense=rows.counts[:, None].float()), client_state

    def server(self, state: ServerState, phase: str, aggregate: Aggregate, key: Key) -> ServerState:
        if phase == "warm":
            assert aggregate.dense is not None
            state = replace(state, items=state.items + float(aggregate.dense) / 2**36)
        return super().server(state, phase, aggregate, key)


def test_a_custom_phase_is_played_before_training() -> None:
    """All 30 users take part in it; the sum of their counts reaches the server, and training begins after it."""
    played = outcome(Warm, 5)
    assert played["cohorts"] == [30, 12, 12, 12, 12]
    assert played["losses"][0] is None
    assert float(played["items"].mean()) == pytest.approx(population().items.numel(), rel=0.05)
    method = Warm(settings())
    state = method.init(Spec(USERS, ITEMS, torch.ones(ITEMS)), Key(0))
    assert (method.phase(state), method.trained(state)) == ("warm", -1)
    assert [each["release"] for each in played["releases"]] == ["warm", "training"]


NOISE = {"aggregation": "secure", "rank": 0, "norm": "l2", "clip": 1.0, "noise": {"training": 0.1, "degrees": 0.1}}


@pytest.mark.parametrize(
    ("noise", "privacy", "said"),
    [
        (None, NOISE, r"phase warm has no noise, .* declare it as Phase\('warm', noise=...\)"),
        ("warmth", {}, "takes its noise from privacy.noise.warmth, but this option does not exist"),
    ],
)
def test_a_phase_that_privacy_cannot_account_for_is_refused(noise: str | None, privacy: Any, said: str) -> None:
    kind = type("Own", (Warm,), {"noise": noise})
    with pytest.raises(ConfigError, match=said) as caught:
        kind(settings(**privacy))
    assert "\n" not in str(caught.value)
    named = type("Named", (Warm,), {"phases": property(lambda self: ["warm"])})
    with pytest.raises(ConfigError, match=r"phases has 'warm'; expected Phase\(name"):
        named(settings())


def test_a_phase_with_noise_is_accounted_for() -> None:
    kind = type("Own", (Warm,), {"noise": "degrees"})
    assert outcome(kind, 2, aggregation="secure", rank=0)["cohorts"] == [30, 12]
    noisy = outcome(kind, 2, **NOISE)
    assert [each["noise_multiplier"] for each in noisy["releases"]] == [0.1, 0.1]
    quiet = outcome(kind, 2, aggregation="secure", rank=0, norm="l2", clip=1.0)
    assert differ(noisy["items"], quiet["items"])


def test_phases_before_the_first_round_are_known_to_privacy() -> None:
    question = Phase("degrees", noise="degrees", coordinates=False)
    asking = type("Asking", (Plain,), {"questions": (question,)})
    assert asking(settings()).protection.guarantee("degrees").law is None
    with pytest.raises(KeyError):
        Plain(settings()).protection.guarantee("degrees")


def test_a_node_trains_new_users_as_the_method_defines(tmp_path: Path) -> None:
    def scores(name: str, **hooks: Any) -> Tensor:
        method = type("Own", (Plain,), hooks)(settings(clip=0.5, noise_scale=0.1))
        spec = Spec(USERS, ITEMS, torch.ones(ITEMS))
        state = method.init(spec, Key(0))
        path = tmp_path / f"{name}.node"
        with Store.create(path, np.arange(ITEMS), bytes(32)) as store:
            frame = pl.DataFrame({"user": ["ann"] * 3, "item": [0, 5, 7]})
            store.import_interactions(frame, identities={"ann": 3})
            nobody = torch.zeros(0, dtype=torch.int64)
            store.receive(serving_broadcast(method, state, nobody), nobody, "run", 1, "")
            return LocalRecommender(store, method).scores(torch.tensor([3]))[0]

    def one(self: Any, broadcast: Any, rows: Rows, client_state: ClientState) -> ClientState:
        return replace(client_state, private=client_state.private + 1)

    base = scores("plain")
    assert torch.equal(base, scores("again"))
    assert differ(base, scores("longer", finetune_rounds=property(lambda self: 30)))
    assert differ(base, scores("placed", init_new_user=one))
    assert differ(base, scores("other", without_privacy=lambda self: Other(settings())))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda found: None, "returned NoneType; expected a LocalResult"),
        (
            lambda found: replace(found, delta=found.delta[1:]),
            r"returned delta as float32 \[\d+, 4\]; expected float32",
        ),
        (lambda found: replace(found, private=found.private.double()), "returned private as float64"),
        (lambda found: replace(found, dense=torch.zeros(2)), "returned dense as .*; expected NoneType"),
    ],
)
def test_local_steps_of_ones_own_are_checked(change: Callable[[LocalResult], Any], said: str) -> None:
    """Their type and shape, in one line; a plain function of the task will do, and sees which loss it is."""
    seen = []

    def steps(task: LocalTask) -> Any:
        seen.append((task.loss, task.penalised))
        return change(autograd_steps(task))

    with pytest.raises(ConfigError, match=f"Own.local_steps {said}"):
        outcome(type("Own", (Plain,), {"local_steps": steps}), 1)
    with pytest.raises(ConfigError, match=r"Own.local_steps"):
        outcome(type("Own", (Plain,), {"local_steps": steps, **OVERRIDES["local_loss"], **OVERRIDES["penalty"]}), 1)
    assert seen == [("logistic", False), (None, True)]


class Other(Plain):
    """A method that a node trains with instead of the original one."""

    def n_negatives(self) -> int:
        return 9
