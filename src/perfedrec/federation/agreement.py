"""What the coordinator and the nodes of a federation agree on: the method and its options, as text."""

from __future__ import annotations

import hashlib
import tomllib
from typing import Any

import tomli_w

from perfedrec.core.algorithm import Algorithm
from perfedrec.core.errors import ConfigError
from perfedrec.evaluation.holdout import SECTION, EvaluationSettings
from perfedrec.methods.centralised.method import Method
from perfedrec.methods.registry import METHODS, method
from perfedrec.privacy.noise import check_source
from perfedrec.runs.config import Config, as_written, check, identity, without_new


def federated(config: Config) -> Algorithm[Any, Any, Any]:
    """The method that a configuration describes, for nodes. Raises :class:`ConfigError` where it is centralised, and
    where it is a file: nodes take no code from a coordinator."""
    if config.algorithm not in METHODS:
        raise ConfigError(
            f"{config.algorithm} does not come with perfedrec, and nodes take no code from a coordinator; expected one "
            f"of {', '.join(METHODS)} (perfedrec train simulates a federation of any method)"
        )
    algorithm = config.build()
    if isinstance(algorithm, Method):
        raise ConfigError(f"{config.algorithm} is centralised: it has no nodes; expected a federated method")
    evaluation_of(config)  # may be refused
    return algorithm


def evaluation_of(config: Config) -> EvaluationSettings:
    """What nodes hold out, without "auto". Raises :class:`ConfigError` where privacy does not allow what was chosen."""
    privacy = getattr(config, "privacy", None)
    return config.evaluation.resolved(privacy is not None and (privacy.noise.any or privacy.epsilon is not None))


def method_of(config: Config) -> str:
    """The method and its options as TOML, without data, evaluation and run.

    Where an epsilon is asked for, the noise that was solved for it is written down.
    """
    tree = config.model_dump(mode="json", by_alias=True, exclude={"data", SECTION, "run"}, exclude_none=True)
    if _unsolved(config):
        tree["privacy"]["noise"] = config.build().settings.privacy.noise.model_dump()
    return tomli_w.dumps(without_new(tree))


def method_for_nodes(config: Config, algorithm: Algorithm[Any, Any, Any]) -> str:
    """The configuration that nodes receive: :func:`method_of` with the noise of the ``algorithm``, and without the
    epsilon that it was solved for; and what they hold out, where they do."""
    privacy = algorithm.settings.privacy.model_copy(update={"epsilon": None})
    text, evaluation = method_of(config.model_copy(update={"privacy": privacy})), evaluation_of(config)
    if evaluation.rule is None:
        return text
    return text + "\n" + tomli_w.dumps({SECTION: evaluation.model_dump(mode="json", exclude_none=True)})


def digest_of(configuration: str, seed: int) -> str:
    """What tells one configuration of a federation from another, and is equal to that of versions before 0.3.0."""
    text = tomli_w.dumps(identity(tomllib.loads(configuration)))
    return hashlib.sha256(f"{text}{seed}".encode()).hexdigest()


def build(configuration: str) -> Algorithm[Any, Any, Any]:
    """The method in a text that :func:`method_of` wrote.

    Raises :class:`ConfigError`, also for a method in a file: a text that comes from another machine must not name code
    to run.
    """
    try:
        tree = tomllib.loads(configuration)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the configuration of the federation is not valid TOML: {error}") from None
    name = tree.get("algorithm")
    if name not in METHODS:
        raise ConfigError(f"the federation's method {name!r} does not come with perfedrec; expected one that does")
    config = check(as_written(tree) | {"run": {"rounds": 0}}, "the configuration of the federation")
    if _unsolved(config):
        raise ConfigError(
            "the configuration of the federation asks for an epsilon and names no noise; expected privacy.noise"
        )
    built: Algorithm[Any, Any, Any] = method(config.algorithm)(config.settings)
    return built


def _unsolved(config: Config) -> bool:
    """Whether an epsilon is asked for, and the noise for it has not been solved."""
    privacy = getattr(config, "privacy", None)
    return privacy is not None and privacy.epsilon is not None and not privacy.noise.any


def with_real_noise(config: Config, chosen: bool = False) -> Config:
    """The configuration with noise from OpenDP, which nodes draw; noise that follows from keys is for simulations.

    If the source of noise was ``chosen`` by a person, it stays. Raises :class:`ConfigError` where OpenDP shall draw the
    noise and is not installed.
    """
    privacy = getattr(config, "privacy", None)
    if privacy is None:
        return config
    if not chosen:
        privacy = privacy.model_copy(update={"noise_source": "opendp"})
    check_source(privacy)
    return config.model_copy(update={"privacy": privacy})
