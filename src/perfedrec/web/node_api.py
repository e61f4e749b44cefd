"""The interface of a node for an app on the same machine: lists, items and interactions as JSON over HTTP.

Each question is one call of :class:`perfedrec.federation.owner.Node`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any
from urllib.parse import unquote

from fastapi import APIRouter, FastAPI, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic_core import to_json
from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

import perfedrec
from perfedrec.core.errors import DataError, PerfedrecError
from perfedrec.core.mistakes import wanted
from perfedrec.federation.owner import Node
from perfedrec.runtimes.node.database import StoreError
from perfedrec.web.api_page import PAGE, STYLE, page, style
from perfedrec.web.api_records import (
    Changed,
    GivenItems,
    Health,
    Item,
    Items,
    ListQuestion,
    Nothing,
    Problem,
    Question,
    RankedItems,
    Recommendations,
    Recommended,
    SearchQuestion,
    Users,
)
from perfedrec.web.guard import Access, Guard
from perfedrec.web.request_metrics import Measured

DOCUMENT = "/openapi.json"
OPEN_PATHS = ("/health", DOCUMENT, PAGE, STYLE)
"""What needs no token: nothing of it tells anything about a user or about the catalogue."""

# --- the paths ---


class _Id(Convertor[str]):
    """An id in a path, in which / stands as %2F."""

    regex = "[^/]+"

    def convert(self, value: str) -> str:
        return unquote(value)

    def to_string(self, value: str) -> str:
        raise NotImplementedError


register_url_convertor("id", _Id())

UserId = Annotated[str, Path(description="the id of a user; / is written %2F")]
ItemId = Annotated[str, Path(description="the id of an item; / is written %2F")]
NoParameters = Annotated[Nothing, Query()]


def _json(found: Any, status: int = 200) -> Response:
    return Response(to_json(found), status, media_type="application/json")


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of items with the id as text, also where the catalogue has whole numbers."""
    return {**row, "item": str(row["item"])}


_OWN = frozenset(Recommended.model_fields)


def _recommended(row: Mapping[str, Any]) -> dict[str, Any]:
    known = {name: value for name, value in _shown(row).items() if name in _OWN}
    parts = {name: value for name, value in row.items() if name not in _OWN}
    return {**known, "parts": parts, "because": [_shown(each) for each in row.get("because", ())]}


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    texts = {
        400: "The request cannot be read, or its address is longer than 64 KiB.",
        401: "The token is missing or wrong.",
        403: "A page of another origin asks.",
        404: "The user, the item or the path is not known here.",
        413: "The body is too long.",
        421: "The header Host names another machine.",
        422: "A parameter or the body is not as described.",
        503: "The node has no model yet, or its file cannot be used now.",
    }
    found: dict[int | str, dict[str, Any]] = {each: {"model": Problem, "description": texts[each]} for each in statuses}
    found[400]["content"] = {"text/plain": {"schema": {"type": "string"}}}  # where it is no HTTP, or far too long
    return found


_PROBLEMS = (400, 401, 403, 404, 413, 421, 422, 503)


def _about_lists(node: Node) -> APIRouter:
    """The questions about lists."""
    routes = APIRouter(responses=_problems(*_PROBLEMS))

    def listed(user: str, asked: ListQuestion, among: list[str] | None) -> Response:
        rows = node.recommend(user, asked.k, exclude=asked.exclude, among=among, why=asked.why)
        return _json({"user": user, "items": [_recommended(row) for row in rows]})

    @routes.get("/users/{user:id}/recommendations", response_model=Recommendations, summary="The list of a user")
    async def recommendations(user: UserId, asked: Annotated[ListQuestion, Query()]) -> Response:
        return listed(user, asked, asked.among or None)

    @routes.post(
        "/users/{user:id}/recommendations", response_model=Recommendations, summary="The same, for a long question"
    )
    async def recommendations_of_many(user: UserId, asked: ListQuestion, _: NoParameters) -> Response:
        """What stands in an address has at most 64 KiB; what stands in the body can have the ids of many items."""
        return listed(user, asked, asked.among if "among" in asked.model_fields_set else None)

    @routes.get("/popular", response_model=RankedItems, summary="What most users of the federation have")
    async def popular(asked: Annotated[Question, Query()]) -> Response:
        """For somebody of whom nothing is known. The score is the number of users."""
        return _items(node.popular(asked.k))

    @routes.get("/items/{item:id}/similar", response_model=RankedItems, summary="Items like an item")
    async def similar(item: ItemId, asked: Annotated[Question, Query()]) -> Response:
        return _items(node.similar(item, asked.k))

    return routes


def _about_users(node: Node, slow: Node) -> APIRouter:
    """The questions about users, and about what they have and have dismissed."""
    routes = APIRouter(responses=_problems(*_PROBLEMS))

    @routes.get("/users", response_model=Users, summary="The users of this node")
    def users(_: NoParameters) -> Response:
        return _json({"users": slow.users()})

    @routes.get("/users/{user:id}", response_model=dict[str, Any], summary="Everything that is stored about a user")
    def export(user: UserId, _: NoParameters) -> Response:
        found = slow.export(user)
        return _json(found | {name: [_shown(each) for each in found[name]] for name in ("items", "dismissed")})

    @routes.delete("/users/{user:id}", response_model=Users, summary="Forget a user")
    def forget(user: UserId, _: NoParameters) -> Response:
        """Everything that is stored about the user is deleted and overwritten. The answer names the user. What the user
        has added to sums of a federation before stays in them."""
        slow.forget(user)
        return _json({"users": [user]})

    @routes.get("/users/{user:id}/interactions", response_model=Items, summary="What a user has interacted with")
    async def interactions(user: UserId, _: NoParameters) -> Response:
        return _items(node.items_of(user))

    @routes.post("/users/{user:id}/interactions", response_model=Changed, summary="Add interactions of a user")
    def add(user: UserId, given: GivenItems, _: NoParameters) -> Response:
        """The user may be new. All items are added, or none."""
        return _json({"changed": slow.add(user, *given.items)})

    @routes.delete("/users/{user:id}/interactions/{item:id}", response_model=Changed, summary="Delete an interaction")
    def remove(user: UserId, item: ItemId, _: NoParameters) -> Response:
        return _json({"changed": slow.remove(user, item)})

    @routes.get("/users/{user:id}/dismissed", response_model=Items, summary="What a user has dismissed")
    async def dismissed(user: UserId, _: NoParameters) -> Response:
        return _items(node.dismissed(user))

    @routes.post("/users/{user:id}/dismissed", response_model=Changed, summary="Never recommend items to a user again")
    def dismiss(user: UserId, given: GivenItems, _: NoParameters) -> Response:
        return _json({"changed": slow.dismiss(user, *given.items)})

    @routes.delete("/users/{user:id}/dismissed/{item:id}", response_model=Changed, summary="Recommend an item again")
    def restore(user: UserId, item: ItemId, _: NoParameters) -> Response:
        return _json({"changed": slow.restore(user, item)})

    return routes


def _about_items(node: Node, slow: Node) -> APIRouter:
    """The questions about items."""
    routes = APIRouter(responses=_problems(*_PROBLEMS))

    @routes.get("/items", response_model=Items, summary="Search in ids and titles")
    def search(asked: Annotated[SearchQuestion, Query()]) -> Response:
        return _items(slow.search(asked.search, asked.k))

    @routes.get("/items/{item:id}", response_model=Item, summary="An item")
    async def item(item: ItemId, _: NoParameters) -> Response:
        return _json(_shown(node.item(item)))

    pictures: dict[int | str, dict[str, Any]] = {
        200: {"description": "", "content": {"image/*": {"schema": {"type": "string"}}}}
    }

    @routes.get(
        "/items/{item:id}/picture", summary="The picture of an item", responses=pictures, response_class=Response
    )
    async def picture(item: ItemId, _: NoParameters) -> Response:
        found = node.picture(item)
        if found is None:
            raise HTTPException(404, f"the catalogue has no picture of the item {item!r}")
        return Response(found[0], media_type=found[1])

    return routes


def _items(rows: Sequence[Mapping[str, Any]]) -> Response:
    return _json({"items": [_shown(row) for row in rows]})


# --- the app ---


def node_api(node: Node, slow: Node, access: Access | None) -> ASGIApp:
    """The interface of a node behind the guard: for those whom ``access`` lets in, or, where that is ``None``, for
    everybody who can reach it.

    ``node`` gives lists on the loop itself: on a busy machine, to wait for a thread takes longer than the list.
    Changes, which wait for the disk, and searches run in threads. They use ``slow``, another :class:`Node` on the same
    file, so that no list waits for them.
    """
    app = FastAPI(
        title="perfedrec node",
        version=perfedrec.__version__,
        summary="Recommendations of one node, for an app on the same machine.",
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    for kind in (PerfedrecError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _refused)
    measured = Measured(Guard(_Encoded(app), access, open_paths=OPEN_PATHS), lambda: _gauges(node))
    for routes in (
        _about_lists(node),
        _about_users(node, slow),
        _about_items(node, slow),
        _about_server(node, measured),
    ):
        app.include_router(routes)
    described = _described(app, access is not None)
    html = page(described).encode()
    app.add_route(DOCUMENT, lambda _: _json(described))
    app.add_route(PAGE, lambda _: Response(html, media_type="text/html"))
    app.add_route(STYLE, lambda _: Response(style(), media_type="text/css"))
    return measured


def _about_server(node: Node, measured: Measured) -> APIRouter:
    """The questions about the server itself."""
    routes = APIRouter(responses=_problems(400, 403, 413, 421, 422, 503))

    @routes.get("/health", response_model=Health, summary="Whether the node's file can be read")
    async def health(_: NoParameters) -> Response:
        node.rules()
        return _json({"status": "ok"})

    text: dict[int | str, dict[str, Any]] = {
        200: {"description": "", "content": {"text/plain": {"schema": {"type": "string"}}}}
    }

    @routes.get(
        "/metrics", summary="Figures for Prometheus", response_class=Response, responses={**text, **_problems(400, 401)}
    )
    async def metrics(request: Request, _: NoParameters) -> Response:
        content, kind = measured.exposition(request.headers.get("accept", ""))
        return Response(content, headers={"content-type": kind})

    return routes


def _gauges(node: Node) -> dict[str, float | None]:
    """What the metrics say of the node; empty where its file cannot be read."""
    try:
        users, received = node.summary()
    except PerfedrecError:
        return {}
    return {"perfedrec_node_users": users, "perfedrec_node_model_timestamp_seconds": received}


class _Encoded:
    """Passes the path on as it was sent, so that a / in an id is none between two parts of the path."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["path"] = scope["raw_path"].decode("latin-1")
        await self.app(scope, receive, send)


def _described(app: FastAPI, with_token: bool) -> dict[str, Any]:
    """The OpenAPI document."""
    found = app.openapi()
    for methods in found["paths"].values():
        for each in methods.values():
            each["responses"]["200"]["description"] = "The answer."
    if with_token:
        found["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        for path, methods in found["paths"].items():
            for each in methods.values():
                each["security"] = [] if path in OPEN_PATHS else [{"token": []}]
    return found


def _refused(_: Request, error: Exception) -> Response:
    """The answer to a question that cannot be answered."""
    if isinstance(error, HTTPException):
        return _problem(error.status_code, error.detail, error.headers)
    if isinstance(error, RequestValidationError):
        return _problem(422, "; ".join(_fault(each) for each in error.errors()[:3]))
    if isinstance(error, StoreError):
        return _problem(503, str(error), {"Retry-After": "5"})
    if isinstance(error, PerfedrecError):
        return _problem(404 if isinstance(error, DataError) else 422, str(error))
    return _problem(500, "this is an error in perfedrec; the log of the server has it")


def _problem(status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    body = to_json({"detail": " ".join(detail.split())})
    return Response(body, status, dict(headers or {}), media_type="application/json")


def _fault(found: Any) -> str:
    """What is wrong with one value: where it is, and what was expected. The value itself is not repeated."""
    place = ".".join(str(each) for each in found["loc"])
    return f"{place}: {_WORDS.get(found['type']) or wanted(found)[0]}"


_WORDS = {"extra_forbidden": "is not known here; see /docs", "missing": "is missing"}
