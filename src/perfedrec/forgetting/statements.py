"""What a certificate states in sentences: only what is so for the method of the run that it is about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from perfedrec.core.algorithm import AnyAlgorithm
from perfedrec.core.counted import counted
from perfedrec.forgetting.measures import Change, Membership
from perfedrec.methods.centralised.method import Method
from perfedrec.methods.federated.phases import JOIN

LOSS = 0.01
"""A relative loss of NDCG for the others above which a certificate has an alert, where the interval of the change is
below 0 too: a request may be an attack."""

MARGIN = 0.05
"""A difference of the membership AUC above which a certificate has an alert, where its interval is above 0 too."""

SUMS = "each sum of a round of training: it is that of the other clients' uploads, bit for bit"
ROWS = "the rows of the users' items, in all tables"
OTHERS_KEEP = "all other rows, and what the other clients keep, which are as they were"
CLUSTERS = "clusters and their models, which are as they were"
TRAINED = "what training made: the other clients' uploads are those that they sent while the users were there"
BY_CLIENTS = "what clients' uploads made before training, for the same reason"
"""Parts of a model, as certificates name them."""

NOT_COVERED = [
    "the folder of the run before, with its model, checkpoints and uploads: delete it when it is no longer needed, but "
    "keep its forgetting.jsonl",
    "the file of the data, in which the users' lines still are: delete them there",
    "copies of the model before, and lists that it made, wherever they are: who has both models can compare them",
    "options and preprocessing that were chosen while the users' data were there",
]
"""What no method covers."""


def not_exact(mixes: bool) -> list[str]:
    """What methods other than exact retraining do not cover besides, for a model that ``mixes`` others or does not."""
    chosen = "the best round and the mix of models, which were" if mixes else "the best round, which was"
    return [
        "what other clients learned from the users through the model stays in their own parts, except as measured",
        f"{chosen} chosen while the users' held-out items counted",
    ]


def trained_again(algorithm: AnyAlgorithm | Method, seed: int, attributes: bool) -> list[str]:
    """The steps of exact retraining, of data whose users have ``attributes`` or not."""
    data = "interactions and attributes" if attributes else "interactions"
    how = "without them"
    if not isinstance(algorithm, Method):
        how = "with the users struck out of every cohort; all random numbers of the others are those of the run"
    return [
        f"the users' {data} were taken out of all parts of the data",
        f"the model was trained again from seed {seed}, {how}",
    ]


def whole(mixes: bool) -> str:
    """What is exact after exact retraining."""
    return "the whole model, with the choice of the best round" + (" and of the mix" if mixes else "")


def at_service(algorithm: AnyAlgorithm) -> list[str]:
    """What the neighbourhood service of a method makes of edges alone; nothing where the method has no service."""
    if JOIN not in algorithm.phases:
        return []
    found = ["edges at the neighbourhood service"]
    found += ["lists and factor of the neighbourhood model"] if getattr(algorithm, "diffuses", False) else []
    found += ["pre-trained tables"] if getattr(algorithm, "service_pretrains", False) else []
    return [f"what was made of edges before training: {', '.join(found)}"]


def phases_again(algorithm: AnyAlgorithm) -> list[str]:
    """The step before the rows of items are trained; none for a method without phases before training."""
    names = list(dict.fromkeys(each.name for each in algorithm.phases))
    if not names:
        return []
    asked = [name for name in names if name != JOIN.name]
    cost = f" (the cost leaves out what clients send in {', '.join(asked)})" if asked else ""
    return [f"the phases before training ({', '.join(names)}) were played again without the users{cost}"]


def kept_rows(state: Any) -> list[str]:
    """What is approximate after the rows of items were changed in a ``state``."""
    return [ROWS, OTHERS_KEEP, *([CLUSTERS] if getattr(state, "clusters", None) is not None else [])]


def summed(algorithm: AnyAlgorithm) -> list[str]:
    """What is approximate after kept uploads were summed again."""
    return [TRAINED, *([BY_CLIENTS] if set(algorithm.phases) - {JOIN} else [])]


def interrupted(folder: Path, output: Path) -> str:
    """What is there after an interruption of forgetting from the run in ``folder``, and how to go on."""
    there = f"nothing was written to {output}:"
    if output.exists() and any(output.iterdir()):
        there = f"{output} holds a run without a certificate: remove it, and"
    return (
        f"interrupted: nobody has been forgotten, and the run in {folder} is as it was; {there} give the command again"
    )


def fallen(change: Change) -> tuple[list[str], list[str]]:
    """An alert where NDCG@20 of the others fell by more than :data:`LOSS`, and what was not measured: whether it fell,
    where the users who are tested are too few to tell this from chance."""
    before, after = change.before, change.after
    if not before or after >= before * (1 - LOSS):
        return [], []
    fell = f"NDCG@20 of the others fell from {before:.4f} to {after:.4f}"
    by = f"the change is {after - before:+.4f} ± {change.half:.4f} over {counted(change.users, 'tested user')}"
    if before - after > change.half:
        return [
            f"{fell}, by more than {LOSS:.0%}, and by more than chance explains ({by}): the requests to forget may be "
            "an attack on the model; look at who asked before it is used"
        ], []
    few = by if change.users > 1 else "there is 1 tested user"
    return [], [f"whether the forgetting harmed the others: {fell}, but this can be chance ({few})"]


def told(after: Membership, other: Membership, whose: str) -> list[str]:
    """An alert where the membership AUC ``after`` is clearly above that of an ``other`` model: :data:`MARGIN` or more,
    and with an interval above 0 where there is one. ``whose`` says which model the other one is."""
    apart, half = after.above(other)
    if not apart > MARGIN or apart <= half:
        return []
    few = "; for one user the AUC is about few items, and this can be chance" if after.cases == 1 else ""
    return [
        f"the membership AUC is {after.mean:.4f} after forgetting, above the {other.mean:.4f} of {whose}: the model "
        f"may still tell what the users had{few}; --method exact forgets wholly"
    ]
