"""The methods: a plain dict of those that come with the package, and how to name one's own."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from difflib import get_close_matches
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Protocol

from perfedrec.algorithms.fastpfrec import FastPFRec
from perfedrec.algorithms.fedgnn import FedGNN
from perfedrec.algorithms.fedmf import FedMF
from perfedrec.algorithms.fedncf import FedNCF
from perfedrec.algorithms.fedrap import FedRAP
from perfedrec.algorithms.gpfedrec import GPFedRec
from perfedrec.algorithms.perfedrec import PerFedRec
from perfedrec.algorithms.perfedrec_pp import PerFedRecPP
from perfedrec.algorithms.pfedrec import PFedRec
from perfedrec.centralised.direct_au import DirectAU
from perfedrec.centralised.item_knn import ItemKNN
from perfedrec.centralised.lightgcn import LightGCN
from perfedrec.centralised.method import Central, Method
from perfedrec.centralised.mf import MF
from perfedrec.centralised.popularity import Popularity
from perfedrec.centralised.rp3beta import RP3Beta
from perfedrec.centralised.sgl import SGL
from perfedrec.centralised.simgcl import SimGCL
from perfedrec.centralised.spectral_filter import SpectralFilter
from perfedrec.centralised.user_knn import UserKNN
from perfedrec.centralised.xsimgcl import XSimGCL
from perfedrec.core.errors import ConfigError
from perfedrec.core.types import RoundReport
from perfedrec.data import Dataset
from perfedrec.evaluation import Recommender, Stored
from perfedrec.runtimes.simulator import Simulator

METHODS: dict[str, type[Any]] = {
    "popularity": Popularity,
    "item_knn": ItemKNN,
    "user_knn": UserKNN,
    "rp3beta": RP3Beta,
    "spectral_filter": SpectralFilter,
    "mf": MF,
    "lightgcn": LightGCN,
    "sgl": SGL,
    "simgcl": SimGCL,
    "xsimgcl": XSimGCL,
    "direct_au": DirectAU,
    "fedmf": FedMF,
    "fedncf": FedNCF,
    "fedgnn": FedGNN,
    "pfedrec": PFedRec,
    "gpfedrec": GPFedRec,
    "fedrap": FedRAP,
    "fastpfrec": FastPFRec,
    "perfedrec": PerFedRec,
    "perfedrec_pp": PerFedRecPP,
}
"""Names of methods as a configuration writes them."""

GROUP = "perfedrec.methods"
"""The group of entry points under which other packages offer methods."""


_OWN = "perfedrec_method_"
"""What the names of modules begin with that are somebody's own file."""


class Engine(Protocol):
    """What a run needs of a method at work: :class:`Simulator` for federated ones, :class:`Central` for others."""

    @property
    def prelude(self) -> int:
        """Rounds before training."""

    def play(self) -> RoundReport: ...

    def recommender(self) -> Recommender: ...

    def records(self) -> dict[str, Any]: ...

    def restore(self, stored: Stored, rounds: int) -> None: ...


def method(name: str) -> type[Any]:
    """The class that a name stands for: one of :data:`METHODS`, an entry point of the group ``perfedrec.methods``, or
    ``module:Class`` or ``path/to/file.py:Class``.

    Raises :class:`ConfigError` with what was expected.
    """
    if name in METHODS:
        return METHODS[name]
    entries, (module, colon, attribute) = metadata.entry_points(group=GROUP, name=name), name.rpartition(":")
    if not colon and not entries:
        near = get_close_matches(name, METHODS, 1, 0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"there is no method {name!r}{hint}; expected one of {', '.join(METHODS)}, or file.py:Class for your own"
        )
    try:
        for entry in entries:
            return _checked(name, entry.load())
        path = Path(module).resolve()
        if path.suffix == ".py" and not path.is_file():
            raise ConfigError(f"{module}: no such file; expected that of a method, as in file.py:Class")
        own = _from_file(path, path.stat().st_mtime_ns) if path.suffix == ".py" else importlib.import_module(module)
        if not hasattr(own, attribute):
            near = get_close_matches(attribute, vars(own), 1, 0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{module} has no class {attribute!r}{hint}; expected a method's, as in file.py:Class")
        return _checked(name, getattr(own, attribute))
    except ConfigError:
        raise
    except Exception as error:  # it is somebody else's code that runs here, and may go wrong in any way
        said = in_own_file(error) or f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"the method {name} cannot be loaded: {said}; expected file.py:Class or module:Class"
        ) from error


@cache
def _from_file(path: Path, changed: int) -> Any:
    """The module of a file, which is run once: its classes stay the same ones until the file has ``changed``."""
    name = _OWN + path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def in_own_file(error: BaseException) -> str | None:
    """What went wrong in the file of somebody's own method, with its name and line; ``None`` for other errors."""
    frames = [
        (frame.f_code, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if str(frame.f_globals.get("__name__")).startswith(_OWN)
    ]
    if not frames:
        return None
    code, line = frames[-1]
    inside = "" if code.co_name == "<module>" else f", in {code.co_name}"
    return f"{code.co_filename}, line {line}{inside}: {type(error).__name__}: {error}"


def _checked(name: str, found: Any) -> type[Any]:
    if not isinstance(found, type) or not (issubclass(found, Method) or hasattr(found, "client")):
        raise ConfigError(
            f"{name} is no method; expected a subclass of perfedrec.Method (centralised) or perfedrec.Federated"
        )
    kind: type[Any] = found
    lacking = sorted(getattr(kind, "__abstractmethods__", ()))
    if issubclass(kind, Method) and kind.trained and kind.epoch is Method.epoch:
        lacking.append("epoch")
    if lacking:
        raise ConfigError(f"{name} lacks {' and '.join(lacking)}; expected a method of that name (see docs/methods.md)")
    return kind


def name_of(algorithm: Any) -> str:
    """The name under which a configuration finds the class of an algorithm."""
    kind = type(algorithm)
    for name, known in METHODS.items():
        if known is kind:
            return name
    return f"{kind.__module__}:{kind.__qualname__}"


def centralised(kind: type[Any]) -> bool:
    """Whether a method sees everybody's interactions in one place."""
    return issubclass(kind, Method)


def engine(
    algorithm: Any,
    dataset: Dataset,
    *,
    seed: int,
    device: Literal["auto", "cpu", "cuda"],
    block_size: int = 1024,
    dropout_rate: float = 0.0,
    users_per_node: int = 1,
) -> Engine:
    """The engine of a method on a data set."""
    if isinstance(algorithm, Method):
        return Central(algorithm, dataset, seed=seed, device=device)
    return Simulator(
        algorithm,
        dataset,
        seed=seed,
        device=device,
        block_size=block_size,
        dropout_rate=dropout_rate,
        users_per_node=users_per_node,
    )
