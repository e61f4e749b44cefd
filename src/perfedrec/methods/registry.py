"""The methods: a dict of those that come with the package, and how other methods are named and loaded."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeAlias

from perfedrec.core.algorithm import Algorithm
from perfedrec.core.errors import ConfigError
from perfedrec.core.nearest import nearest
from perfedrec.methods.centralised.bert4rec import BERT4Rec
from perfedrec.methods.centralised.buir import BUIR
from perfedrec.methods.centralised.cl4srec import CL4SRec
from perfedrec.methods.centralised.direct_au import DirectAU
from perfedrec.methods.centralised.ease import EASE
from perfedrec.methods.centralised.gf_cf import GFCF
from perfedrec.methods.centralised.ials import IALS
from perfedrec.methods.centralised.item_knn import ItemKNN
from perfedrec.methods.centralised.lightgcn import LightGCN
from perfedrec.methods.centralised.lightgcn_pp import LightGCNPP
from perfedrec.methods.centralised.method import Method
from perfedrec.methods.centralised.mf import MF
from perfedrec.methods.centralised.mhcn import MHCN
from perfedrec.methods.centralised.mixgcf import MixGCF
from perfedrec.methods.centralised.mult_vae import MultVAE
from perfedrec.methods.centralised.ncl import NCL
from perfedrec.methods.centralised.popularity import Popularity
from perfedrec.methods.centralised.rp3beta import RP3Beta
from perfedrec.methods.centralised.sasrec import SASRec
from perfedrec.methods.centralised.selfcf import SelfCF
from perfedrec.methods.centralised.sept import SEPT
from perfedrec.methods.centralised.sgl import SGL
from perfedrec.methods.centralised.simgcl import SimGCL
from perfedrec.methods.centralised.simplex import SimpleX
from perfedrec.methods.centralised.slim import SLIM
from perfedrec.methods.centralised.spectral_filter import SpectralFilter
from perfedrec.methods.centralised.ssl4rec import SSL4Rec
from perfedrec.methods.centralised.ultragcn import UltraGCN
from perfedrec.methods.centralised.user_knn import UserKNN
from perfedrec.methods.centralised.xsimgcl import XSimGCL
from perfedrec.methods.federated.cofedrec import CoFedRec
from perfedrec.methods.federated.colr import CoLR
from perfedrec.methods.federated.fastpfrec import FastPFRec
from perfedrec.methods.federated.fedca import FedCA
from perfedrec.methods.federated.fedcia import FedCIA
from perfedrec.methods.federated.fedgnn import FedGNN
from perfedrec.methods.federated.fedmf import FedMF
from perfedrec.methods.federated.fedncf import FedNCF
from perfedrec.methods.federated.fedrap import FedRAP
from perfedrec.methods.federated.gpfedrec import GPFedRec
from perfedrec.methods.federated.perfedrec import PerFedRec
from perfedrec.methods.federated.perfedrec_pp import PerFedRecPP
from perfedrec.methods.federated.pfedclr import PFedCLR
from perfedrec.methods.federated.pfedrec import PFedRec
from perfedrec.methods.federated.ptf_fedrec import PTFFedRec

METHODS: dict[str, type[Any]] = {
    "popularity": Popularity,
    "item_knn": ItemKNN,
    "user_knn": UserKNN,
    "rp3beta": RP3Beta,
    "spectral_filter": SpectralFilter,
    "gf_cf": GFCF,
    "ease": EASE,
    "slim": SLIM,
    "ials": IALS,
    "mf": MF,
    "lightgcn": LightGCN,
    "sgl": SGL,
    "simgcl": SimGCL,
    "xsimgcl": XSimGCL,
    "direct_au": DirectAU,
    "ncl": NCL,
    "buir": BUIR,
    "selfcf": SelfCF,
    "mixgcf": MixGCF,
    "ssl4rec": SSL4Rec,
    "sept": SEPT,
    "mhcn": MHCN,
    "lightgcn_pp": LightGCNPP,
    "ultragcn": UltraGCN,
    "simplex": SimpleX,
    "mult_vae": MultVAE,
    "sasrec": SASRec,
    "bert4rec": BERT4Rec,
    "cl4srec": CL4SRec,
    "fedmf": FedMF,
    "fedncf": FedNCF,
    "fedgnn": FedGNN,
    "pfedrec": PFedRec,
    "gpfedrec": GPFedRec,
    "fedrap": FedRAP,
    "fastpfrec": FastPFRec,
    "fedca": FedCA,
    "cofedrec": CoFedRec,
    "fedcia": FedCIA,
    "colr": CoLR,
    "pfedclr": PFedCLR,
    "ptf_fedrec": PTFFedRec,
    "perfedrec": PerFedRec,
    "perfedrec_pp": PerFedRecPP,
}
"""Names of methods as a configuration writes them."""

TITLES = {
    "popularity": "Popularity",
    "item_knn": "ItemKNN",
    "user_knn": "UserKNN",
    "rp3beta": "RP3beta",
    "spectral_filter": "Spectral filter",
    "gf_cf": "GF-CF",
    "ease": "EASE",
    "slim": "SLIM",
    "ials": "iALS",
    "mf": "MF",
    "lightgcn": "LightGCN",
    "sgl": "SGL",
    "simgcl": "SimGCL",
    "xsimgcl": "XSimGCL",
    "direct_au": "DirectAU",
    "ncl": "NCL",
    "buir": "BUIR",
    "selfcf": "SelfCF",
    "mixgcf": "MixGCF",
    "ssl4rec": "SSL4Rec",
    "sept": "SEPT",
    "mhcn": "MHCN",
    "lightgcn_pp": "LightGCN++",
    "ultragcn": "UltraGCN",
    "simplex": "SimpleX",
    "mult_vae": "Mult-VAE",
    "sasrec": "SASRec",
    "bert4rec": "BERT4Rec",
    "cl4srec": "CL4SRec",
    "fedmf": "FedMF",
    "fedncf": "FedNCF",
    "fedgnn": "FedGNN",
    "pfedrec": "PFedRec",
    "gpfedrec": "GPFedRec",
    "fedrap": "FedRAP",
    "fastpfrec": "FastPFRec",
    "fedca": "FedCA",
    "cofedrec": "CoFedRec",
    "fedcia": "FedCIA",
    "colr": "CoLR",
    "pfedclr": "PFedCLR",
    "ptf_fedrec": "PTF-FedRec",
    "perfedrec": "PerFedRec",
    "perfedrec_pp": "PerFedRec++",
}
"""Names of methods as papers write them."""

AnyMethod: TypeAlias = Method | Algorithm[Any, Any, Any]
"""A method of either kind: centralised, or federated."""

GROUP = "perfedrec.methods"
"""The group of entry points under which other packages offer methods."""

_OWN = "perfedrec_method_"
"""The beginning of the module names under which users' own files are loaded."""


def title(label: str) -> str:
    """A label of a comparison with the method's name as papers write it, where the label begins with the name:
    ``PerFedRec++ paper`` for ``perfedrec_pp paper``."""
    name, space, rest = label.partition(" ")
    return TITLES.get(name, name) + space + rest


def list_methods(kind: Literal["centralised", "federated"] | None = None) -> list[str]:
    """The names of all methods, also those that other packages offer; with ``kind`` those of one kind."""
    names = [*METHODS, *sorted({entry.name for entry in metadata.entry_points(group=GROUP)} - METHODS.keys())]
    if kind is None:
        return names
    if kind not in (kinds := ("centralised", "federated")):
        raise ConfigError(
            f"there is no kind {kind!r} of methods; expected centralised or federated{nearest(kind, kinds)}"
        )
    return [name for name in names if centralised(method(name)) == (kind == "centralised")]


def method(name: str) -> type[Any]:
    """The class of a method. A ``name`` is one of :data:`METHODS`, an entry point of the group ``perfedrec.methods``,
    ``module:Class``, or ``path/to/file.py:Class``.

    Raises :class:`ConfigError` that says what was expected.
    """
    if name in METHODS:
        return METHODS[name]
    entries, (module, colon, attribute) = metadata.entry_points(group=GROUP, name=name), name.rpartition(":")
    if not colon and not entries:
        raise ConfigError(
            f"there is no method {name!r}; expected one of {', '.join(METHODS)}, or file.py:Class for your own"
            f"{nearest(name, METHODS)}"
        )
    try:
        for entry in entries:
            return _checked(name, entry.load())
        return _checked(name, _attribute(module, attribute))
    except ConfigError:
        raise
    except Exception as error:  # the code of somebody else runs here, and may fail in any way
        cause = in_own_file(error) or f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"the method {name} cannot be loaded: {cause}; expected file.py:Class or module:Class"
        ) from error


def _attribute(module: str, name: str) -> Any:
    """What has a ``name`` in a module, or in a file that ends in ``.py``."""
    path = Path(module).resolve()
    if path.suffix == ".py" and not path.is_file():
        raise ConfigError(f"{module}: no such file; expected the file of a method, as in file.py:Class")
    own = _from_file(path, path.stat().st_mtime_ns) if path.suffix == ".py" else importlib.import_module(module)
    if not hasattr(own, name):
        raise ConfigError(
            f"{module} has no class {name!r}; expected a method's, as in file.py:Class{nearest(name, vars(own))}"
        )
    return getattr(own, name)


@cache
def _from_file(path: Path, changed: int) -> ModuleType:
    """The module in a file. It runs once, so that its classes stay the same, and again after the file has ``changed``
    (time of the last change in nanoseconds)."""
    name = _OWN + path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def in_own_file(error: BaseException) -> str | None:
    """The error with file and line where it came from a user's own method; ``None`` for other errors."""
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
    """The class, if it is one of a whole method."""
    if not isinstance(found, type) or not (issubclass(found, Method) or hasattr(found, "client")):
        raise ConfigError(
            f"{name} is not a method; expected a subclass of perfedrec.Method (centralised) or perfedrec.Federated"
        )
    kind: type[Any] = found
    missing = sorted(getattr(kind, "__abstractmethods__", ()))
    if issubclass(kind, Method) and kind.trained and kind.epoch is Method.epoch:
        missing.append("epoch")
    if missing:
        raise ConfigError(f"{name} lacks {' and '.join(missing)}; expected a definition of each (see docs/methods.md)")
    return kind


def name_of(algorithm: AnyMethod) -> str:
    """The name under which a configuration finds the class of a method."""
    kind = type(algorithm)
    for name, known in METHODS.items():
        if known is kind:
            return name
    return f"{kind.__module__}:{kind.__qualname__}"


def seedless(kind: type[Any]) -> bool:
    """Whether a method draws no random numbers, so that its seed changes nothing."""
    return bool(vars(kind).get("seedless", False))


def centralised(kind: type[Any]) -> bool:
    """Whether a method has the interactions of all users in one place."""
    return issubclass(kind, Method)
