"""The content of ``results.json``, the file that all tables and reports of a comparison are made from.

docs/bench.md describes the keys.
"""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict


class Spread(TypedDict):
    """The mean of a figure over seeds and its standard deviation (of a sample; ``None`` for a single seed)."""

    mean: float
    sd: float | None


class DataEntry(TypedDict):
    """A data set: its sizes, and the test metrics of ranking by popularity; ``splits`` is the number of different
    splits that the seeds gave, ``chance`` what chance decided in the first, and ``notes`` say how the first was read,
    prepared and split (none of the three before version 0.4)."""

    users: int
    items: int
    interactions: int
    fingerprint: str
    popularity: dict[str, float]
    splits: NotRequired[int]
    chance: NotRequired[str | None]
    notes: NotRequired[list[str]]


class TargetEntry(TypedDict):
    """The validation figure that ``[target]`` of the file names."""

    metric: str
    value: float


class ReachedEntry(TypedDict):
    """What a run had spent when it reached the target: rounds, bytes, uploads, and seconds of computation."""

    rounds: float
    bytes_up: float
    bytes_down: float
    uploads: float
    seconds: float


class ParametersEntry(TypedDict):
    """Floating-point numbers of a stored model: of the server (or the centralised method), and of all clients."""

    server: int
    clients: int


class CellEntry(TypedDict):
    """One run of a comparison. The keys that are not required exist for a finished run only."""

    label: str
    data: str
    seed: int
    folder: str
    algorithm: str
    finished: bool
    error: str | None
    protocol: NotRequired[str]
    test: NotRequired[dict[str, float]]
    protocol_sampled: NotRequired[str | None]
    test_sampled: NotRequired[dict[str, float] | None]
    valid: NotRequired[dict[str, float]]
    best_round: NotRequired[int]
    prelude: NotRequired[int]
    rounds: NotRequired[int]
    communication: NotRequired[dict[str, float]]
    target: NotRequired[ReachedEntry | None]
    parameters: NotRequired[ParametersEntry]
    privacy: NotRequired[dict[str, Any]]
    seconds: NotRequired[float | None]
    cpu_seconds: NotRequired[float | None]


class ComparisonEntry(TypedDict):
    """A method against the reference: the mean difference over users, its 95 % interval, and its p-values."""

    metric: str
    reference: str
    difference: float
    low: float
    high: float
    p: float
    users: int
    p_adjusted: NotRequired[float]


class TargetSummary(TypedDict):
    """The number of seeds that reached the target, and what they had spent by then (only where one did)."""

    reached: int
    of: int
    rounds: NotRequired[Spread]
    bytes_up: NotRequired[Spread]
    bytes_down: NotRequired[Spread]
    uploads: NotRequired[Spread]
    seconds: NotRequired[Spread]


class PrivacySummary(TypedDict):
    """What may be claimed about a method's privacy."""

    profile: str | None
    claim: str
    epsilon_coordinator: float | None
    delta: float | None


class SummaryEntry(TypedDict):
    """A method on a data set. The keys that are not required exist where at least one seed has finished."""

    label: str
    data: str
    n: NotRequired[int]
    missing: NotRequired[int]
    algorithm: str
    seedless: NotRequired[bool]
    test: NotRequired[dict[str, Spread]]
    test_sampled: NotRequired[dict[str, Spread]]
    valid: NotRequired[dict[str, Spread]]
    protocol: NotRequired[str]
    protocol_sampled: NotRequired[str | None]
    parameters: NotRequired[ParametersEntry]
    uploads_per_client: NotRequired[Spread]
    bytes: NotRequired[Spread]
    seconds: NotRequired[Spread | None]
    cpu_seconds: NotRequired[Spread | None]
    target: NotRequired[TargetSummary]
    privacy: NotRequired[PrivacySummary]
    comparison: NotRequired[ComparisonEntry | None]


class Results(TypedDict):
    """The whole file."""

    format: int
    seeds: list[int]
    vary: NotRequired[str | None]
    metric: str
    reference: str | None
    protocol: str
    target: TargetEntry | None
    data: dict[str, DataEntry]
    cells: list[CellEntry]
    summary: list[SummaryEntry]
