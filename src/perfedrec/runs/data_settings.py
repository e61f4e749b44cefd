"""The section ``[data]`` of a configuration: where interactions come from, and how they are prepared and split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from datetime import date
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from perfedrec.core.errors import DataError
from perfedrec.core.settings import Settings
from perfedrec.data import DataLike, Dataset, SplitRule, implied, load, parse_columns, parse_ratio

NODES = "nodes:"
"""``data.path`` of a federation's run: its users' data are on their nodes."""

MEMORY = "memory:"
"""``data.path`` of a run whose data were given in Python, and did not come from a file."""

ELSEWHERE = {
    NODES: "the data of this run are with the nodes of a federation",
    MEMORY: "the data of this run were given in Python and are stored nowhere",
}
"""Values of ``data.path`` that name no file, and what they say in a message."""


class DataSettings(Settings):
    """Where the interactions come from, how they are prepared, and how they are split."""

    path: str = Field("synthetic:users=2000,items=1500", description="file, folder, or synthetic:users=..,items=..")
    format: str = Field("auto", description="format of the files; auto: detected from their content")
    columns: str = Field("", description="where columns are: user=customer,item=2 (names, or positions from 1)")
    header: Literal["auto", "yes", "no"] = Field("auto", description="whether the first line names the columns")
    train: str | None = Field(None, description="training file of a given split")
    valid: str | None = Field(None, description="validation file of a given split (default: taken from training)")
    test: str | None = Field(None, description="test file of a given split")
    relations: str | None = Field(None, description="file of relations between users, such as trust.txt")
    min_rating: float | None = Field(None, description="ratings below this do not count as interactions")
    k_core: int = Field(0, ge=0, description="drop users and items with fewer interactions, repeatedly")
    split: Literal["leave-one-out", "ratio", "global-time", "folds", "users"] = Field(
        "leave-one-out", description="how a single file is split (default: what the options below belong to)"
    )
    ratio: tuple[float, float, float] | None = Field(
        None, description="shares of train, valid and test, for ratio and global-time (default: [0.8, 0.1, 0.1])"
    )
    valid_from: str | None = Field(None, description="date or time where validation starts, for global-time")
    test_from: str | None = Field(None, description="date or time where test starts, for global-time")
    folds: int | None = Field(None, description="number of folds, for folds")
    fold: int = Field(0, description="the fold that is tested, from 0")
    test_users: float | None = Field(
        None, description="share of users who are held out from training as a whole, for users (default: 0.1)"
    )
    order: Literal["auto", "time", "file", "random"] = Field(
        "auto", description="what is held out: the last by time or by the order of the file, or at random"
    )
    ties: Literal["random", "together"] = Field(
        "random", description="a user's interactions at the same time: in random order, or never split"
    )
    seed: int = Field(0, ge=0, description="seed of what is random in a split")
    train_on_valid: bool = Field(
        False, description="train on training and validation together, as some papers do; nothing is then validated"
    )

    forgotten: tuple[str, ...] | None = Field(
        None, description="ids of users whose data are taken out, as if they had never been there (perfedrec forget)"
    )

    @model_validator(mode="before")
    @classmethod
    def _implied(cls, tree: Any) -> Any:
        """A split that is not named is the one that the other options belong to."""
        if not isinstance(tree, Mapping) or tree.get("split") is not None:
            return tree
        how = implied(option for option, value in tree.items() if value is not None)
        return {**{key: value for key, value in tree.items() if key != "split"}, "split": how}

    @field_validator("forgotten", mode="before")
    @classmethod
    def _ids(cls, value: Any) -> Any:
        """Ids of users, as text; a number stands for its digits."""
        if value is None:
            return None
        several = isinstance(value, list | tuple) and all(isinstance(each, str | int) for each in value)
        if not several or not value:
            raise ValueError('expected ids of users, such as ["17", "ann"]')
        return tuple(map(str, value))

    @field_validator("ratio", mode="before")
    @classmethod
    def _three(cls, value: Any) -> Any:
        """Three numbers, also as text: 0.8,0.1,0.1."""
        try:
            return (
                value if value is None else parse_ratio(value if isinstance(value, str) else ",".join(map(str, value)))
            )
        except (DataError, TypeError):
            raise ValueError("expected three shares, such as [0.8, 0.1, 0.1]") from None

    @field_validator("valid_from", "test_from", mode="before")
    @classmethod
    def _moment(cls, value: Any) -> Any:
        """TOML has dates and whole numbers; they are kept as text."""
        return str(value) if isinstance(value, date | int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _whole(self) -> Self:
        given = {part for part in ("train", "valid", "test") if getattr(self, part) is not None}
        if given and not {"train", "test"} <= given:
            missing = " and ".join(part for part in ("train", "test") if part not in given)
            raise ValueError(
                f"a given split needs train and test, and valid if there is one; expected {missing} too, or path alone "
                "for data that are split here (--data)"
            )
        try:
            SplitRule(**self.rule)
        except DataError as error:
            raise ValueError(str(error)) from None
        return self

    @property
    def rule(self) -> dict[str, Any]:
        """The options of :class:`perfedrec.data.SplitRule`."""
        names = {each.name for each in fields(SplitRule)} - {"how"}
        return {"how": self.split, **{name: getattr(self, name) for name in names}}


def open_data(settings: DataSettings, attributes: bool = False, *, given: DataLike | None = None) -> Dataset:
    """The data set that a configuration names, or the ``given`` data, read, prepared and split as it says.

    ``attributes`` says whether they are used: only then is a mistake in them an error. Raises
    :class:`perfedrec.core.errors.DataError`, also where the data are in no file (:data:`ELSEWHERE`).
    """
    if given is None and settings.train is None and settings.path in ELSEWHERE:
        raise DataError(
            f"{ELSEWHERE[settings.path]}; expected --data with a file, a folder or synthetic:... "
            "(in Python: open_run(folder, data=...))"
        )
    files = {part: getattr(settings, part) if given is None else None for part in ("train", "valid", "test")}
    rule = settings.rule
    dataset = load(
        given if given is not None else None if settings.train else settings.path,
        format=settings.format,
        columns=parse_columns(settings.columns),
        header={"auto": None, "yes": True, "no": False}[settings.header],
        train=files["train"],
        valid=files["valid"],
        test=files["test"],
        min_rating=settings.min_rating,
        k_core=settings.k_core,
        split_how=rule.pop("how"),
        attributes=True if attributes else None,
        relations=settings.relations,
        **rule,
    )
    dataset = dataset if given is not None else replace(dataset, origin=settings.model_dump(exclude={"forgotten"}))
    return dataset.without_users(settings.forgotten) if settings.forgotten else dataset


def moved_to(settings: DataSettings, path: str) -> DataSettings:
    """The settings of data that lie at ``path`` now, in one file or folder. Relations whose file is no longer there are
    taken from the file of this name beside the data. Raises :class:`perfedrec.core.errors.DataError` where there is
    none either."""
    changed: dict[str, str | None] = {"path": path, "train": None, "valid": None, "test": None}
    at, relations = Path(path), settings.relations
    if relations is not None and at.exists() and not Path(relations).exists():
        beside = (at if at.is_dir() else at.parent) / Path(relations).name
        if not beside.is_file():
            raise DataError(f"{relations}: no such file, and no {beside} either; expected the relations at one of them")
        changed["relations"] = str(beside)
    return settings.model_copy(update=changed)


def settings_of(dataset: Dataset) -> DataSettings:
    """The settings that give a data set again. Where it was made in Python, they say that (:data:`MEMORY`)."""
    if dataset.origin is None:
        names = tuple(str(dataset.train.user_ids[each]) for each in dataset.forgotten)
        return DataSettings(path=MEMORY, forgotten=names or None)
    return DataSettings(**{name: value for name, value in dataset.origin.items() if value is not None})
