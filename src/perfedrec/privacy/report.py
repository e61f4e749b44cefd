"""The privacy block of a run: what each party can learn, as numbers, and "none" where there is no guarantee."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from perfedrec.privacy.ledger import Ledger, Release, accountant_version
from perfedrec.privacy.settings import PrivacySettings

Block: TypeAlias = dict[str, Any]
"""Plain values by name, as JSON stores them."""

WEAK = 10.0
"""An epsilon above this value is marked as weak, because it excludes little."""

FEW = 7.0
"""Users per unit of noise, ``n / (z sqrt(m))``, below which spectral pre-training is not expected to beat popularity.
On Yelp it was 1.6 times as good as popularity at 11, and worse at 6 (docs/privacy.md)."""

BY_ITEM = "by item"
"""The block's word for sums that are opened with a row for every item."""

EACH_GROUP = "each by itself and by item (defence.group_size)"
"""The block's words for sums of small groups with a row for every item."""

NO_AUDIT = "none so far"
"""What the block says of audits where there was none."""

NOT_KEPT = "not possible, sums were not kept (--keep-sums)"
"""The same of a federation whose coordinator kept nothing that could be attacked."""

NOT_COVERED = (
    "tuning and model selection",
    "losses of training, validation and test metrics, and the labels that they are computed from",
    "how many users there are, and who takes part when",
    "colluding clients and an actively malicious coordinator",
)


def privacy_block(
    settings: PrivacySettings,
    releases: Sequence[Release],
    secure_aggregation: str,
    reporting: bool,
    sizes: Sequence[int] = (),
    audit: str = NO_AUDIT,
    groups: int = 1,
    group_size: int = 0,
) -> Block:
    """What a run with these releases guarantees, as plain values for JSON.

    ``secure_aggregation`` is how it was done if the settings ask for it: "simulated", or the name of a protocol.
    ``reporting``: whether clients send vectors of their own. ``sizes`` are the numbers of users on the nodes of a
    federation. ``audit`` is what the block says of audits. ``groups`` is the largest number of groups of a cohort that
    a defence opens a sum of each for (1: one sum), and ``group_size`` the least number of clients of a group whose sums
    by item it opens before training (0: there are none).
    """
    ledger = Ledger(releases, settings.delta)
    coordinator, recipients = ledger.epsilon("coordinator"), ledger.epsilon("recipients")
    noisy = settings.noise_scale > 0 or settings.noise.any
    source = "OpenDP" if settings.noise_source == "opendp" else "simulation (keyed, not cryptographic)"
    narrower = dict.fromkeys(text for each in releases for text in each.guarantee.narrower)
    bare = any(each.guarantee.law is None for each in ledger.releases)
    exposed = settings.aggregation == "sparse" or (settings.aggregation == "dense" and bare)
    block = {
        "unit": "user",
        "adjacency": "one user's data added or removed",
        "delta": settings.delta,
        "accountant": accountant_version(),
        "epsilon_coordinator": coordinator.value,
        "epsilon_coordinator_reason": coordinator.reason,
        "epsilon_recipients": recipients.value,
        "epsilon_recipients_reason": recipients.reason,
        "weak": coordinator.value is not None and coordinator.value > WEAK,
        "narrower": list(narrower),
        "row_sets": "exposed to the coordinator" if exposed else _hidden_rows(group_size),
        "sums": _sums(settings, groups, group_size),
        "user_vectors": _vectors(settings, exposed, reporting),
        "secure_aggregation": secure_aggregation if settings.aggregation == "secure" else "none",
        **({"other_nodes": between_nodes(settings, sizes)} if sizes else {}),
        "noise_source": source if noisy else "none",
        "releases": ledger.lines(),
        "not_covered": list(NOT_COVERED),
        "audit": audit,
    }
    return {"claim": claim(block), **block}


def centralised_block() -> Block:
    """The privacy block of a centralised method, which guarantees nothing."""
    return {"claim": "NONE: a centralised method has everybody's interactions in one place", "releases": []}


def between_nodes(settings: PrivacySettings, sizes: Sequence[int]) -> str:
    """What a node, or some nodes together, can learn of the others from opened sums, for nodes with these numbers of
    users."""
    if settings.aggregation != "secure":
        return "learn from the model that all receive; the coordinator sees the sum of each node"
    noisy = ", with noise" if settings.noise.any else ""
    if len(sizes) == 1:
        return f"there are none: the coordinator sees the sum of the only node{noisy}"
    own = "the model that nodes receive shows what was opened, and a node can subtract its own part: "
    if len(sizes) > 2:
        rest = len(sizes) - 1
        return f"{own}one node learns the sum of the {rest} others, {rest} nodes together that of the last one{noisy}"
    single = "; where that node has 1 user, it is this user's own part" if 1 in sizes else ""
    return f"{own}each of the 2 nodes learns the sum of the other{noisy}{single} (3 nodes or more avoid that)"


def _hidden_rows(group_size: int) -> str:
    """What the coordinator learns of the items of a client that no upload shows."""
    if not group_size:
        return "hidden"
    return f"shown to the coordinator without names, in groups of {group_size} clients or more before training"


def _sums(settings: PrivacySettings, groups: int = 1, group_size: int = 0) -> str:
    """What is opened of sums over clients, in up to ``groups`` groups of a cohort, and before training in groups of
    ``group_size`` clients or more."""
    if not settings.low_rank:
        return BY_ITEM if settings.sums else "none"
    rows = (
        "" if settings.noise.spectral else f"; passes by item, for items of {settings.min_contributors} users or more"
    )
    rows = f"; degrees and cluster sizes as counts; weights of networks in full{rows}"
    split = f"; of up to {groups} groups of a cohort, each by itself (defence.groups)" if groups > 1 else ""
    if group_size:
        split = f"; degrees and passes of groups of {group_size} clients or more, {EACH_GROUP}{split}"
    fewest = f"over {settings.min_clients} clients or more"
    return f"changes in a basis of at most {settings.rank} columns{rows}{split}; {fewest}"


def _vectors(settings: PrivacySettings, exposed: bool, reporting: bool) -> str:
    if settings.aggregation == "dense":
        return f"inside dense uploads, {'not everywhere' if exposed else 'everywhere'} under noise"
    if not reporting:
        return "stay on the clients"
    return f"leave the clients, {'with noise' if settings.noise_scale else 'as they are'}"


def claim(block: Block) -> str:
    """The block's guarantee in one sentence that may be quoted."""
    if block["epsilon_coordinator"] is not None:
        weak = " (weak: above 10)" if block["weak"] else ""
        how = "; secure aggregation was simulated" if block["secure_aggregation"] == "simulated" else ""
        how += "; so was the noise" if block["noise_source"].startswith("simulation") else ""
        return (
            f"user-level DP against the coordinator: epsilon {block['epsilon_coordinator']:.3g}{weak} "
            f"at delta {block['delta']:g}, {block['adjacency']}, {block['accountant']}{how}"
        )
    if block["secure_aggregation"] != "none":
        how = " (simulated in this run)" if block["secure_aggregation"] == "simulated" else ""
        sums = block.get("sums", BY_ITEM)
        seen = ", but sums by item show the items of many users" if sums == BY_ITEM or EACH_GROUP in sums else ""
        return f"no individual upload is visible{how}{seen}; no DP guarantee"
    if block["narrower"]:
        return "; ".join(block["narrower"]) + "; the whole upload: NONE"
    return "NONE"


def lines(block: Block) -> list[tuple[str, str]]:
    """The block as pairs of label and text, for display. Where nothing has an epsilon, there is no delta and no
    accountant; where nothing is guaranteed at all, no unit."""
    if not block["releases"]:
        return [("claim", block["claim"])]

    def epsilon(party: str) -> str:
        value, reason = block[f"epsilon_{party}"], block[f"epsilon_{party}_reason"]
        if value is None:
            first = block["epsilon_coordinator"] is None and reason == block["epsilon_coordinator_reason"]
            return f"none ({'for the same reason' if first and party == 'recipients' else reason})"
        return f"{value:.3g}" + (" (weak: above 10)" if value > WEAK else "")

    released = ", ".join(
        f"{each['release']} {each['times']}x"
        + (f" ({each['noise']} noise {each['noise_multiplier']:.3g})" if each["noise"] != "none" else " (no guarantee)")
        for each in block["releases"]
    )
    counted = any(block[f"epsilon_{party}"] is not None for party in ("coordinator", "recipients"))
    unit = [("unit, adjacency", f"{block['unit']}; {block['adjacency']}")]
    pairs = [
        ("claim", block["claim"]),
        *(unit if counted or block["narrower"] else []),
        ("epsilon, coordinator", epsilon("coordinator")),
        ("epsilon, model recipients", epsilon("recipients")),
        *([("delta, accountant", f"{block['delta']:g}; {block['accountant']}")] if counted else []),
        ("narrower statements", "; ".join(block["narrower"]) or "none"),
        ("row sets", block["row_sets"]),
        ("opened sums", block.get("sums", BY_ITEM)),
        ("user vectors", block["user_vectors"]),
        ("secure aggregation", block["secure_aggregation"]),
        *([("other nodes", block["other_nodes"])] if "other_nodes" in block else []),
        ("noise source", block["noise_source"]),
        *([("defence", block["defence"])] if "defence" in block else []),
        ("released", released),
        ("not covered", "; ".join(block["not_covered"])),
        ("audit", block["audit"]),
    ]
    return pairs + [("warning", text) for text in block.get("warnings", ())]


SUM_METRICS = ("users exposed", "item precision", "share of list", "users named", "groups of rows")
"""The figures of attacks that look for groups of rows in opened sums."""


def without_result(findings: Sequence[Block]) -> list[str]:
    """The attacks on opened sums that found no group of rows at all, in any round."""
    found: dict[str, bool] = {}
    for each in findings:
        if each["metric"] in SUM_METRICS:
            found[each["attack"]] = found.get(each["attack"], False) or each["value"] > 0
    return [name for name, something in found.items() if not something]


def audited(found: Block) -> str:
    """The result of an audit in one line: the largest value that each kind of attack reached, and the lower bounds on
    epsilon."""
    best: dict[str, float] = {}
    quiet = without_result(found["findings"])
    for each in found["findings"]:
        name = f"{each['attack']} {each['metric']}"
        if each["attack"] not in quiet:
            best[name] = max(each["value"], best.get(name, 0.0))
    shown = [f"{len(quiet)} attacks on opened sums exposed and named nobody"] if quiet else []
    shown += [f"{name} {value:.2f}" for name, value in best.items()]
    shown += [
        f"epsilon {max(each['lower'], each['lower_gaussian'] or 0):.2f} or more of {each['claim']:.2f}, {each['what']}"
        for each in found["bounds"]
    ]
    verdict = "FAILED: " if found["failed"] else ""
    return verdict + "; ".join(shown)


def warnings(
    settings: PrivacySettings, n_users: int, n_items: int, private: dict[str, float], popularity: dict[str, float]
) -> list[str]:
    """Warnings about a private result: a delta that is too large, and an accuracy that is not clearly above
    popularity's, with both values."""
    if not settings.noise.any:
        return []
    found = []
    if settings.delta * n_users > 1:
        found.append(
            f"delta {settings.delta:g} is above 1 / {n_users} users; it permits disclosing one user completely"
        )
    found_ndcg = [name for name in private if name.startswith("ndcg@")]
    metric = max(found_ndcg, key=lambda name: int(name.removeprefix("ndcg@")), default="ndcg")
    signal = n_users / (settings.noise.spectral * n_items**0.5) if settings.noise.spectral else float("inf")
    if metric not in private or (signal >= FEW and private[metric] >= 1.25 * popularity[metric]):
        return found
    asked = "the noise that was set" if settings.epsilon is None else f"epsilon {settings.epsilon:g}"
    few = f"{n_users} users are few for {asked}"
    return [*found, f"{few}: test {metric} {private[metric]:.4f}, popularity {popularity[metric]:.4f}"]
