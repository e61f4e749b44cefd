"""The presets and privacy profiles that come with the package, and the parts of the method that can be switched off."""

from __future__ import annotations

from importlib import resources
from typing import Any, Literal

from perfedrec.core.errors import ConfigError
from perfedrec.core.nearest import nearest

DEFAULT = "perfedrec_pp"
"""The method that is trained where none is named."""

Kind = Literal["presets", "profiles"]
"""The two kinds of files: presets, and privacy profiles."""

ABLATIONS: dict[str, dict[str, Any]] = {
    "pretraining": {"pretraining.kind": "none", "personal.pretrained": 0.0},
    "node-dropout": {"pretraining.node_dropout": 0.0},
    "edge-perturbation": {"pretraining.edge_perturbation": False},
    "view-noise": {"pretraining.noise": 0.0},
    "clusters": {"clusters.n_clusters": 0},
    "proportional-selection": {"clusters.proportional": False},
    "neighbours": {"model.neighbours": False},
    "propagation": {"model.n_layers": 0},
    "neighbourhood": {"personal.neighbourhood": 0.0},
    "choice": {"personal.chosen": False},
    "personal": {
        "personal.local": 0.0,
        "personal.cluster": 0.0,
        "personal.global": 1.0,
        "personal.pretrained": 0.0,
        "personal.neighbourhood": 0.0,
        "personal.chosen": False,
    },
    "privacy": {
        "privacy.aggregation": "sparse",
        "privacy.norm": "coordinate",
        "privacy.clip": None,
        "privacy.noise_scale": 0.0,
        "privacy.noise": {},
        "privacy.epsilon": None,
        "privacy.pseudo_items": 0.0,
        "privacy.masking": 0.0,
        "privacy.randomised_response": None,
    },
    "averaging": {"server.averaging": 0.0},
    "server-optimizer": {"server.optimizer": "fedavg", "server.learning_rate": 1.0},
}
"""The options that switch each part of the method off: ``perfedrec train --without PART``."""


def presets(kind: Kind = "presets") -> list[str]:
    """Names of the presets, or with ``kind`` "profiles" of the privacy profiles, that come with the package."""
    folder = resources.files("perfedrec.runs") / kind
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def default_preset(algorithm: str | None) -> str | None:
    """The preset that a run of a method starts from: the one with the method's name.

    ``None`` for a method without one, which starts from its plain defaults.
    """
    if algorithm is None or algorithm == DEFAULT:
        return "recommended"
    return algorithm if algorithm in presets() else None


def preset_text(name: str, kind: Kind = "presets") -> str:
    """The TOML text of a preset or profile. Raises :class:`ConfigError` for an unknown name."""
    known = presets(kind)
    if name not in known:
        what = "preset" if kind == "presets" else "privacy profile"
        raise ConfigError(f"there is no {what} {name!r}; expected one of: {', '.join(known)}{nearest(name, known)}")
    return (resources.files("perfedrec.runs") / kind / f"{name}.toml").read_text(encoding="utf-8")


def ablation(part: str) -> dict[str, Any]:
    """The options, by dotted key, that switch a part off. Raises :class:`ConfigError` for an unknown part."""
    if part not in ABLATIONS:
        raise ConfigError(
            f"there is no part {part!r} to switch off; expected one of: {', '.join(ABLATIONS)}"
            f"{nearest(part, ABLATIONS)}"
        )
    return ABLATIONS[part]
