"""What an app asks a node over HTTP, and what it is answered: records that check questions, and of which the OpenAPI
document is made."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

LONGEST_LIST = 1000
MOST_ITEMS = 10_000
"""The most items in one question."""


class Record(BaseModel):
    """Anything in JSON. What it does not know is refused."""

    model_config = ConfigDict(extra="forbid")


class Problem(Record):
    """Why there is no other answer, in one line."""

    detail: str


class Item(Record):
    """An item of the catalogue."""

    item: str = Field(description="the id of the item")
    title: str | None = Field(description="null where the catalogue has none")
    picture: bool = Field(description="whether GET /items/{item}/picture has one")
    attributes: dict[str, str] = Field(description="what else the catalogue says, such as genres")


class Ranked(Item):
    """An item in a list."""

    rank: int = Field(ge=1)
    score: float


class Reason(Record):
    """One of the user's own items that speaks for a recommended one."""

    item: str
    title: str | None
    share: float = Field(description="its share of what all items of the user add")


class Recommended(Ranked):
    """A recommended item."""

    parts: dict[str, float] = Field(description="the part of each model in the score; they add up to it")
    moved: int = Field(description="places gained over the list of the global model alone")
    because: list[Reason] = Field(description="with why=true, up to two items; otherwise empty")


class Recommendations(Record):
    """A user's list, best first."""

    user: str
    items: list[Recommended]


class RankedItems(Record):
    """Items, best first."""

    items: list[Ranked]


class Items(Record):
    """Items."""

    items: list[Item]


class Users(Record):
    """Ids of users."""

    users: list[str]


class GivenItems(Record):
    """Ids of items."""

    items: list[str] = Field(min_length=1, max_length=MOST_ITEMS)


class Changed(Record):
    """What a question has changed. It is on the disk."""

    changed: int = Field(ge=0, description="how many of the items were not in this state before")


class Health(Record):
    """The node's file can be read."""

    status: str = Field(pattern="^ok$")


Length = Annotated[int, Field(ge=1, le=LONGEST_LIST, description="the length of the list")]
Ids = Annotated[list[str], Field(max_length=MOST_ITEMS)]


class Question(Record):
    """The parameters of a list."""

    k: Length = 20


class ListQuestion(Question):
    """The parameters of a user's list."""

    exclude: Ids = Field(default=[], description="items to leave out; repeat the parameter for several")
    among: Ids = Field(default=[], description="recommend only these (default: all); repeat the parameter for several")
    why: bool = Field(default=False, description="name the user's items that speak for each item")


class SearchQuestion(Question):
    """The parameters of a search."""

    search: str = Field(max_length=1000, description="a part of an id or of a title")


class Nothing(Record):
    """No parameters."""
