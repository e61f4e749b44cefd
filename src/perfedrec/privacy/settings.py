"""The privacy options: which mechanism, with which parameters, and who sees single uploads."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from perfedrec.core.errors import ConfigError
from perfedrec.core.settings import Settings

SECURE_ONLY = ("rank", "min_contributors", "min_clients")
"""Options that only secure sums have."""


class NoiseSettings(Settings):
    """Noise of each kind of release, as a multiple of the bound on one user's part: the standard deviation of Gaussian
    noise (norm l2), or the scale of Laplace noise (norm l1)."""

    degrees: float = Field(0.0, ge=0, description="noise on the item degrees")
    spectral: float = Field(0.0, ge=0, description="noise on each pass of spectral pre-training")
    join: float = Field(0.0, ge=0, description="noise on the first neighbour sums")
    training: float = Field(0.0, ge=0, description="noise on each round of training")

    @property
    def any(self) -> bool:
        """Whether any release has noise."""
        return any(getattr(self, name) > 0 for name in type(self).model_fields)


class PrivacySettings(Settings):
    """Options of the protection of what leaves a client."""

    aggregation: Literal["sparse", "dense", "secure"] = Field(
        "sparse",
        description="what the coordinator sees of a client: the rows that it touched (sparse), a row for every item "
        "(dense), or only the cohort's sum (secure aggregation). With dense and secure no user vector leaves "
        "a client",
    )
    norm: Literal["coordinate", "l1", "l2"] = Field(
        "coordinate",
        description="what clip bounds: each coordinate, or the l1 or l2 norm of all that a client sends in a round",
    )
    clip: float | None = Field(None, gt=0, description="bound on what is uploaded, in this norm; off: no bound")
    noise_scale: float = Field(
        0.0, ge=0, description="scale of the Laplace noise on each coordinate of each upload (norm coordinate)"
    )
    noise: NoiseSettings = NoiseSettings()
    rank: int = Field(
        64,
        ge=0,
        description="secure: columns of the public basis in which changes are summed; 0: a row for every item, which "
        "shows the items of many clients (docs/privacy.md)",
    )
    min_contributors: int = Field(
        5, ge=1, description="secure: least number of users of an item whose row of a pass over all users is summed"
    )
    min_clients: int = Field(2, ge=2, description="secure: a sum of fewer clients is not opened")
    noise_source: Literal["simulation", "opendp"] = Field(
        "simulation",
        description="simulation: fast keyed noise, not cryptographic; opendp: OpenDP's samplers (slow; an extra)",
    )
    dropout_tolerance: float = Field(
        0.05, ge=0, lt=1, description="share of a cohort that may drop out; with more drop-outs a noisy sum is aborted"
    )
    epsilon: float | None = Field(
        None, gt=0, description="compute the noise for this user-level epsilon against the coordinator"
    )
    delta: float = Field(1e-5, gt=0, lt=1, description="delta of every epsilon")
    pseudo_items: float = Field(
        0.0, ge=0, description="number of decoys labelled as interacted, as a share of the number of a user's items"
    )
    sticky: bool = Field(False, description="use the same decoys and the same masked items in every round")
    masking: float = Field(0.0, ge=0, lt=1, description="share of a user's items that are left out")
    randomised_response: float | None = Field(
        None,
        gt=0,
        description="epsilon per item of randomised response on the item set, instead of pseudo_items and masking",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.noise_scale and (self.clip is None or self.norm != "coordinate"):
            raise ValueError(
                "noise_scale needs clip, and norm = coordinate: noise without a bound on what it hides protects nothing"
            )
        if self.sums and (self.noise_scale or self.pseudo_items or self.masking or self.randomised_response):
            raise ValueError(
                "noise_scale, pseudo_items, masking and randomised_response protect sparse uploads; expected noise.* "
                "with aggregation dense or secure"
            )
        if self.noise.training and (self.clip is None or self.norm == "coordinate"):
            raise ValueError("noise.training needs clip, and norm l1 or l2: it is a multiple of that bound")
        if (self.noise.any or self.epsilon) and (self.aggregation == "sparse" or self.norm == "coordinate"):
            raise ValueError(
                "noise and epsilon need aggregation dense or secure, and norm l1 or l2: "
                "a sparse upload shows which items a client has, whatever the noise"
            )
        if self.epsilon and (self.aggregation, self.norm) != ("secure", "l2"):
            raise ValueError(
                "epsilon needs aggregation = secure and norm = l2; expected these, or noise.* instead of epsilon"
            )
        if self.noise.any and self.aggregation == "secure" and self.norm == "l1":
            raise ValueError("norm l1 protects only single uploads; expected norm l2 under secure aggregation")
        if self.randomised_response and (self.pseudo_items or self.masking):
            raise ValueError("randomised_response replaces pseudo_items and masking; expected one or the other")
        return self

    @model_serializer(mode="wrap")
    def _without_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Options of secure sums are left out where sums are not secure: there they mean nothing, and configurations
        stay equal to those that earlier versions wrote."""
        found: dict[str, Any] = handler(self)
        if self.aggregation != "secure":
            found = {name: value for name, value in found.items() if name not in SECURE_ONLY}
        return found

    @property
    def low_rank(self) -> bool:
        """Whether changes are summed in a basis of few columns, so that no row of the sum belongs to an item."""
        return self.aggregation == "secure" and self.rank > 0

    def check_users(self, n_users: int) -> None:
        """Raise :class:`ConfigError` for so few users that no sum over them could be opened."""
        if self.aggregation == "secure" and n_users < self.min_clients:
            raise ConfigError(
                f"there are {n_users} users, and no sum of fewer than {self.min_clients} is opened; expected more "
                "users, or a smaller privacy.min_clients (each sum then tells more about each user)"
            )

    @property
    def noisy(self) -> bool:
        """Whether any release has noise."""
        return self.noise_scale > 0 or self.noise.any or self.epsilon is not None

    @property
    def sums(self) -> bool:
        """Whether clients contribute only to sums: no user vector and no edge leaves them."""
        return self.aggregation != "sparse"
