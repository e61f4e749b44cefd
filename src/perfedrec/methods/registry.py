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
from typing import Any

from perfedrec.core.errors import ConfigError
from perfedrec.methods.centralised.direct_au import DirectAU
from perfedrec.methods.centralised.item_knn import ItemKNN
from perfedrec.methods.centralised.lightgcn import LightGCN
from perfedrec.methods.centralised.method import Method
from perfedrec.methods.centralised.mf import MF
from perfedrec.methods.centralised.popularity import Popularity
from perfedrec.methods.centralised.rp3beta import RP3Beta
from perfedrec.methods.centralised.sgl import SGL
from perfedrec.methods.centralised.simgcl import SimGCL
from perfedrec.methods.centralised.spectral_filter import SpectralFilter
from perfedrec.methods.centralised.user_knn import UserKNN
from perfedrec.methods.centralised.xsimgcl import XSimGCL
from perfedrec.methods.federated.fastpfrec import FastPFRec
from perfedrec.methods.federated.fedgnn import FedGNN
from perfedrec.methods.federated.fedmf import FedMF
from perfedrec.methods.federated.fedncf import FedNCF
from perfedrec.methods.federated.fedrap import FedRAP
from perfedrec.methods.federated.gpfedrec import GPFedRec
from perfedrec.methods.federated.perfedrec import PerFedRec
from perfedrec.methods.federated.perfedrec_pp import PerFedRecPP
from perfedrec.methods.federated.pfedrec import PFedRec

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
