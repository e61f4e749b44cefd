"""Methods that search for held-out interactions in everything that they receive, and find none."""

import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from perfedrec import Dataset, Interactions, Key, Method, PerFedRecPP, Training, configure, load, train
from perfedrec.core.algorithm import Algorithm
from perfedrec.core.types import Rows
from perfedrec.evaluation import Held
from perfedrec.methods.centralised.vectors import batches
from perfedrec.methods.federated.fedncf import FedNCF
from perfedrec.methods.federated.gpfedrec import GPFedRec
from perfedrec.privacy.labels import label
from perfedrec.privacy.settings import PrivacySettings
from perfedrec.runs.engine import engine
from perfedrec.runtimes.population import Population

DATA = "synthetic:users=300,items=200,clusters=4,interactions_per_user=12,seed=2"
CODE = (type, ModuleType, CodeType, FrameType, BuiltinFunctionType)


def reachable(roots: Iterable[Any]) -> Iterator[Any]:
    """All objects that the roots lead to: attributes, contents, closures, bound objects, what arrays are views of.

    Classes and modules are the program, not what it was given: from there a process leads to all that is in it.
    """
    seen: set[int] = set()
    stack = list(roots)
    while stack:
        each = stack.pop()
        if id(each) in seen or isinstance(each, CODE):
            continue
        seen.add(id(each))
        yield each
        if isinstance(each, FunctionType):
            stack += [each.__closure__, each.__defaults__, each.__kwdefaults__, each.__dict__]
            continue
        stack += gc.get_referents(each)
        stack += [value for name in ("base", "_base", "__dict__") if (value := getattr(each, name, None)) is not None]


def contents(each: Any) -> bytes:
    """The whole storage of an array or tensor as int64 words, whatever part of it is shown."""
    if isinstance(each, Tensor):
        whole = torch.empty(0, dtype=each.dtype).set_(each.detach().cpu().untyped_storage())
        array = whole.numpy()
    elif isinstance(each, np.ndarray) and each.dtype.kind in "iuf":
        array = each
    else:
        return b""
    finite = np.isfinite(array) & (np.abs(array) < 2**53)
    return np.where(finite, array, -1).astype(np.int64).tobytes()


@dataclass
class Spy:
    """What a malicious method does with everything that it receives."""

    dataset: Dataset
    calls: int = 0
    objects: int = 0

    def look(self, *given: Any) -> None:
        self.calls += 1
        secrets = [part.items.tobytes() for part in (self.dataset.valid, self.dataset.test)]
        for each in reachable(given):
            self.objects += 1
            assert not isinstance(each, (Dataset, Interactions, Held)), f"a {type(each).__name__} can be reached"
            words = contents(each)
            assert not any(secret in words for secret in secrets), "held-out items can be reached"


SPIES: list[Spy] = []


def look(*given: Any) -> None:
    SPIES[-1].look(*given)


@pytest.fixture
def spy() -> Iterator[Spy]:
    SPIES.append(Spy(load(DATA)))
    yield SPIES[-1]
    SPIES.pop()


@dataclass(frozen=True)
class Nothing:
    counts: Tensor


class Malicious(Method):
    """Centralised, trained, and searching for held-out items wherever it is called."""

    trained = True

    def init(self, data: Training, key: Key) -> Nothing:
        look(self, data, key)
        _ = data.graph, data.matrix  # computed from the interactions and cached next to them
        return Nothing(data.item_degrees.to(torch.float32))

    def epoch(self, state: Nothing, data: Training, key: Key) -> tuple[Nothing, float]:
        look(self, state, data, key)
        return state, 0.0

    def serving(self, state: Nothing, data: Training) -> Nothing:
        look(self, state, data)
        return state

    def scores(self, state: Nothing, data: Training, users: Tensor) -> Tensor:
        look(self, state, data, users)
        return state.counts.repeat(users.numel(), 1)


def watched(kind: type[Any]) -> type[Any]:
    """A federated method that searches in every function of the protocol before it does its work."""
    names = [name for name in vars(Algorithm) if not name.startswith("_") and callable(vars(Algorithm)[name])]

    def watching(name: str) -> Callable[..., Any]:
        def function(self: Any, *given: Any, **named: Any) -> Any:
            look(self, *given, *named.values())
            return getattr(kind, name)(self, *given, **named)

        return function

    return type(kind.__name__, (kind,), {name: watching(name) for name in names})


class MaliciousPP(watched(PerFedRecPP)):  # type: ignore[misc]
    """PerFedRec++ that searches."""


class MaliciousNCF(watched(FedNCF)):  # type: ignore[misc]
    """A method with a shared network that searches."""


class MaliciousGP(watched(GPFedRec)):  # type: ignore[misc]
    """A method with a graph of users that searches."""


SHORT = ["run.rounds=3", "run.evaluate_every=1"]
COHORT = ["selection.n_clients_per_round=64"]
OWN: dict[str, Any] = {
    "Malicious": (None, SHORT),
    "MaliciousPP": ("paper", [*SHORT, *COHORT, "clusters.start=1", "clusters.every=1", "personal.learned=true"]),
    "MaliciousNCF": (None, [*SHORT, *COHORT, "run.sampled_negatives=99"]),
    "MaliciousGP": (None, [*SHORT, *COHORT, "graph.every=1"]),
}


@pytest.mark.parametrize("name", OWN)
def test_a_method_that_looks_for_held_out_items_finds_none(name: str, spy: Spy, tmp_path: Path) -> None:
    """Training, validation, checkpoints, the test and recommending, with a search at every call."""
    preset, overrides = OWN[name]
    base = configure(preset, overrides=overrides, algorithm=None if preset else f"{__name__}:{name}")
    algorithm = globals()[name](base.settings)
    result = train(algorithm, spy.dataset, base.run, config=base, output=tmp_path / "run")
    result.recommend(None, 5)
    assert spy.calls > 10
    assert spy.objects > 20 * spy.calls


@pytest.mark.parametrize("hidden", ["dataset", "held", "closure", "view", "float", "attribute"])
def test_the_spy_finds_what_can_be_found(hidden: str, spy: Spy) -> None:
    """Where held-out items can be reached, in whatever container, the spy finds them."""
    dataset, items = spy.dataset, torch.tensor(spy.dataset.test.items)

    def closure() -> Tensor:
        return items

    class Plain:
        pass

    plain = Plain()
    plain.inner = {"a": [(1, dataset.valid.items)]}  # type: ignore[attr-defined]
    given = {
        "dataset": dataset,
        "held": [Held.of(dataset.test.offsets, dataset.test.items, torch.device("cpu"))],
        "closure": closure,
        "view": torch.cat([torch.zeros(3, dtype=torch.int64), items])[:2],
        "float": {"scores": items.to(torch.float32)},
        "attribute": plain,
    }[hidden]
    with pytest.raises(AssertionError, match="can be reached"):
        spy.look(given)


@pytest.mark.parametrize("name", ["lightgcn", "perfedrec_pp"])
def test_an_engine_keeps_no_held_out_items(name: str, spy: Spy) -> None:
    config = configure("paper" if name == "perfedrec_pp" else name, overrides=["run.rounds=1"])
    here = engine(config.build(), spy.dataset, seed=0, device="cpu")
    here.play()
    spy.look(here, here.recommender())


def test_held_out_items_are_drawn_as_negatives_as_often_as_others() -> None:
    """A sampler that avoided held-out items would know them. Each user has ``200 - |I_u|`` items to draw from, of which
    two are held out; over 200 draws their share is that of chance within four standard errors."""
    dataset = load(DATA)
    population = Population(torch.tensor(dataset.train.offsets), torch.tensor(dataset.train.items), dataset.n_items)
    rows, _ = population.rows(population.everyone())
    wanted = torch.zeros(dataset.n_users, dataset.n_items, dtype=torch.bool)
    for part in (dataset.valid, dataset.test):
        owners = np.repeat(np.arange(dataset.n_users), np.diff(part.offsets))
        wanted[torch.tensor(owners), torch.tensor(part.items)] = True
    chances = wanted.sum(1) / (dataset.n_items - rows.counts)

    def check(users: Tensor, negatives: Tensor) -> None:
        expected, spread = chances[users].sum(), (chances[users] * (1 - chances[users])).sum().sqrt()
        assert float(wanted[users, negatives].sum()) == pytest.approx(float(expected), abs=4 * float(spread))

    data = Training.of(dataset, torch.device("cpu"))
    drawn = [each for epoch in range(40) for each in batches(data, 1 << 20, Key(epoch))]
    check(torch.cat([each.users for each in drawn]), torch.cat([each.negatives for each in drawn]))
    check(*federated(rows, dataset.n_items, PrivacySettings()))
    check(*federated(rows, dataset.n_items, PrivacySettings(pseudo_items=0.5, masking=0.3)))


def federated(rows: Rows, n_items: int, privacy: PrivacySettings) -> tuple[Tensor, Tensor]:
    labels = [label(rows, n_items, privacy, None, Key(number), torch.zeros_like(rows.users)) for number in range(40)]
    return torch.cat([each.owners for each in labels]), torch.cat([each.negatives for each in labels])
