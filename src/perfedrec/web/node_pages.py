"""The pages of a node for the people whose data it holds: ``perfedrec node app``.

Every page is rendered here, and works without a script. An address names the person it is about (``?user=ann``). What
changes something is a form with a token of its own, beside what :mod:`perfedrec.web.guard` asks for.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from functools import partial
from importlib import resources
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from perfedrec.core.errors import ConfigError, DataError, PerfedrecError
from perfedrec.runtimes.node.journal import JOIN
from perfedrec.web import views
from perfedrec.web.imports import NotImportedError, import_files
from perfedrec.web.language import LANGUAGES, chosen, texts
from perfedrec.web.views import address

if TYPE_CHECKING:
    from perfedrec.federation.owner import Node

LANGUAGE = "perfedrec-language"
"""The cookie that remembers the language somebody has chosen."""

BODY_LIMIT = 64 << 20
"""Bytes of the largest file that is imported in the browser."""

FIRST = 3
"""Things that a newcomer chooses before the first list."""

LENGTH, SHELF, ROWS, ENTRIES, PEOPLE = 20, 24, 50, 200, 60
"""Suggestions, things to choose from, rows, entries and people on a page."""

LONGEST_NAME = 64
LONGEST_LIST = 200
ASSETS = {"page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}
PROFILES = ("secure", "private", "paper", "none")

Fields = Mapping[str, str]


class NodePages:
    """The pages of an open ``node``."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._form_token = secrets.token_urlsafe(32)
        self._templates = Environment(
            loader=PackageLoader("perfedrec.web", "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._views: dict[str, Callable[[Request], Response]] = {
            "/": self.who,
            "/start": self.start,
            "/for-you": self.for_you,
            "/similar": self.similar,
            "/have": self.have,
            "/left": self.left,
            "/rules": self.rules,
            "/forget": self.forget,
        }
        self._changes: dict[str, Callable[[Request, Fields], Response]] = {
            "/begin": self.begin,
            **{f"/{change}": partial(self.change, change) for change in ("add", "remove", "dismiss", "restore")},
            "/rule": self.set_rule,
            "/pause": self.pause,
            "/leave": self.leave,
            "/return": self.come_back,
            "/forget-now": self.forget_now,
        }

    def app(self) -> Starlette:
        """The pages as an ASGI app, to stand behind a guard."""
        found = [Route(path, partial(self._view, view)) for path, view in self._views.items()]
        found += [Route(path, self._changing(change), methods=["POST"]) for path, change in self._changes.items()]
        found += [
            Route("/import", self.bring_in, methods=["POST"]),
            Route("/picture", self.picture),
            Route("/export.csv", self.export_csv),
            Route("/export.json", self.export_json),
            Route("/assets/{name}", asset),
        ]
        return Starlette(routes=found, exception_handlers={PerfedrecError: self._failed, HTTPException: self._failed})

    # --- the frame ---

    def _view(self, view: Callable[[Request], Response], request: Request) -> Response:
        wanted = request.query_params.get("lang")
        if wanted is None:
            return view(request)
        query = {name: value for name, value in request.query_params.items() if name != "lang"}
        answer = RedirectResponse(address(request.url.path, **query), 303)
        if wanted in LANGUAGES:
            answer.set_cookie(LANGUAGE, wanted, max_age=365 * 86_400, samesite="strict")
        return answer

    def _changing(self, change: Callable[[Request, Fields], Response]) -> Callable[[Request], Any]:
        async def answer(request: Request) -> Response:
            async with request.form() as form:
                self._check_form(form)
                fields = {name: value for name, value in form.items() if isinstance(value, str)}
            return await run_in_threadpool(change, request, fields)

        return answer

    def _check_form(self, form: FormData) -> None:
        """Raise an error unless the form is one of these pages."""
        token = form.get("form")
        if not isinstance(token, str) or not secrets.compare_digest(token.encode(), self._form_token.encode()):
            raise HTTPException(403, "form")

    def _page(self, request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
        t = texts(chosen(request.headers.get("accept-language", ""), request.cookies.get(LANGUAGE)))
        query = {name: value for name, value in request.query_params.items() if name not in ("done", "of", "whose")}
        here = address(request.url.path if request.method == "GET" else "/have", **query)
        shown = {
            "t": t,
            "user": None,
            "view": request.url.path,
            "here": here,
            "address": address,
            "form_token": self._form_token,
            "languages": [(code, texts(code)("frame.language")) for code in LANGUAGES],
            "people": self.node.summary()[0],
            "done": views.note(request.query_params, lambda item: views.card(self.node.item(item))["title"], t),
            "refresh": None,
        }
        return HTMLResponse(self._templates.get_template(template).render(shown | values), status)

    def _failed(self, request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            key = {404: "error.not_found", 403: "error.form"}.get(error.status_code)
            return self._page(request, "error.html.j2", error.status_code, key=key, line=error.detail)
        status = 404 if isinstance(error, DataError) else 422 if isinstance(error, ConfigError) else 409
        return self._page(request, "error.html.j2", status, key=None, line=" ".join(str(error).split()))

    def _user(self, request: Request) -> str | None:
        """The person an address is about: the one it names, or the only one; ``None`` where that is open."""
        if (named := request.query_params.get("user")) is not None:
            return named
        return self.node.users()[0] if self.node.summary()[0] == 1 else None

    def _knows(self, user: str) -> bool:
        """Whether something is stored about a person."""
        try:
            self.node.dismissed(user)
        except DataError:
            return False
        return True

    def _own(self, user: str) -> list[dict[str, Any]]:
        """What a person has; nothing for somebody who is new."""
        return self.node.items_of(user) if self._knows(user) else []

    def _back(self, fields: Fields, otherwise: str, **more: Any) -> Response:
        """The view that a form came from, with ``more`` in its address."""
        parts = urlsplit(fields.get("back", ""))
        known = not parts.scheme and not parts.netloc and parts.path in self._views
        query = dict(parse_qsl(parts.query)) if known else {"user": fields.get("user", "")}
        return RedirectResponse(address(parts.path if known else otherwise, **query | more), 303)

    # --- views ---

    def who(self, request: Request) -> Response:
        """Who are you? With one person on the node, that one's list."""
        users = self.node.users()
        if len(users) == 1 and not request.query_params:
            return RedirectResponse(address("/for-you", user=users[0]), 303)
        people = [(user, len(self.node.items_of(user))) for user in users[:PEOPLE]]
        return self._page(
            request, "who.html.j2", listed=people, more=len(users) - len(people), wrong="wrong" in request.query_params
        )

    def start(self, request: Request) -> Response:
        """The first view of somebody who has nothing yet: three things to choose."""
        user, query = self._user(request), request.query_params.get("q", "").strip()
        if user is None:
            return RedirectResponse("/", 303)
        own = {str(row["item"]) for row in self._own(user)}
        kind, rows = self._offered(query, len(own))
        cards = [views.card(row) for row in rows if str(row["item"]) not in own][:SHELF]
        chosen = {"count": min(len(own), FIRST), "first": FIRST}
        return self._page(request, "start.html.j2", user=user, query=query, kind=kind, cards=cards, **chosen)

    def _offered(self, query: str, already: int) -> tuple[str, list[dict[str, Any]]]:
        """Things to choose from, and what they are: found, popular, or, as far as nothing is known, some or none."""
        if query:
            found = self.node.search(query, k=SHELF + already)
            return "found" if found else "nothing", found
        if self.node.summary()[1] is None:
            return "search_first", []
        found = self.node.popular(k=SHELF + already)
        return "popular" if any(row["score"] for row in found) else "some", found

    def for_you(self, request: Request) -> Response:
        """A person's list, and why each thing is on it."""
        user = self._user(request)
        if user is None:
            return RedirectResponse("/", 303)
        own = self._own(user)
        if not own:
            return RedirectResponse(address("/start", user=user), 303)
        if self.node.summary()[1] is None:
            return self._page(request, "list.html.j2", user=user, model=False, rows=[], legend=[], own=len(own), k=0)
        given = request.query_params.get("k", "")
        k = min(max(int(given), 1), LONGEST_LIST) if given.isdecimal() and len(given) < 6 else LENGTH
        found = self.node.recommend(user, k=k, why=True)
        t = self._texts(request)
        shown: dict[str, Any] = {"rows": [views.suggestion(row, t) for row in found], "legend": views.legend(found, t)}
        more = k + LENGTH if len(found) == k and k < LONGEST_LIST else None
        return self._page(request, "list.html.j2", user=user, model=True, own=len(own), k=more, **shown)

    def similar(self, request: Request) -> Response:
        """Things close to one of them."""
        user, item = self._user(request), request.query_params.get("item", "")
        if user is None:
            return RedirectResponse("/", 303)
        of, taken = views.card(self.node.item(item)), {str(row["item"]) for row in self._own(user)}
        if self._knows(user):
            taken |= {str(row["item"]) for row in self.node.dismissed(user)}
        rows = [row for row in self.node.similar(item, k=LENGTH + len(taken)) if str(row["item"]) not in taken]
        return self._page(request, "similar.html.j2", user=user, of=of, cards=list(map(views.card, rows[:LENGTH])))

    def have(self, request: Request, status: int = 200, wrong: NotImportedError | None = None) -> Response:
        """All that is stored about what a person has, page by page."""
        user, query = self._user(request), request.query_params.get("q", "").strip()
        if user is None:
            return RedirectResponse("/", 303)
        own = self._own(user)
        rows = views.fitting(own, query)
        pages = max(-(-len(rows) // ROWS), 1)
        given = request.query_params.get("page", "")
        page = min(max(int(given), 1), pages) if given.isdecimal() and len(given) < 9 else 1
        taken = {str(row["item"]) for row in own}
        others = [row for row in self.node.search(query, k=SHELF) if str(row["item"]) not in taken] if query else []
        aside = self.node.dismissed(user) if self._knows(user) else []
        return self._page(
            request,
            "have.html.j2",
            status,
            view="/have",
            user=user,
            query=query,
            wrong=wrong,
            count=len(own),
            rows=[views.card(row) for row in rows[(page - 1) * ROWS : page * ROWS]],
            page=page,
            pages=pages,
            others=[views.card(row) for row in others],
            aside=[views.card(row) for row in aside],
        )

    def left(self, request: Request) -> Response:
        """The journal in plain words: of the node, or only of what a person was part of."""
        user, before = self._user(request), request.query_params.get("before", "")
        only = request.query_params.get("only") == "1" and user is not None and self._knows(user)
        of = user if only else None
        given = {"before": int(before)} if before.isdecimal() and len(before) < 16 else {}
        rows = self.node.journal(of, limit=ENTRIES + 1, **given)
        t = self._texts(request)
        return self._page(
            request,
            "left.html.j2",
            user=user,
            of=of,
            totals=views.totals(self.node.privacy(), t),
            groups=views.journal(rows[:ENTRIES], t),
            older=rows[ENTRIES - 1]["entry"] if len(rows) > ENTRIES else None,
            refresh=None if given else f"{rows[0]['entry']}-{rows[0]['times']}" if rows else "0",
        )

    def rules(self, request: Request) -> Response:
        """What this node insists on."""
        found = self.node.rules()
        current = found["chosen"] or found["require"][0]
        others = [profile for profile in found["require"] if profile not in (current, "none")]
        return self._page(
            request,
            "rules.html.j2",
            user=self._user(request),
            rules=found,
            profiles=PROFILES,
            current=current,
            others=others,
        )

    def forget(self, request: Request) -> Response:
        """What is deleted and what stays, before it is done."""
        user = self._user(request)
        if user is None or not self._knows(user):
            return RedirectResponse("/", 303)
        sent = any(row["phase"] != JOIN for row in self.node.journal(user))
        shown = {"count": len(self.node.items_of(user)), "sent": sent}
        return self._page(request, "forget.html.j2", view="/rules", user=user, **shown)

    def _texts(self, request: Request) -> Any:
        return texts(chosen(request.headers.get("accept-language", ""), request.cookies.get(LANGUAGE)))

    # --- changes ---

    def begin(self, request: Request, fields: Fields) -> Response:
        """Somebody new: nothing is stored before the first thing is chosen."""
        name = fields.get("name", "").strip()
        if not 0 < len(name) <= LONGEST_NAME or not name.isprintable():
            return RedirectResponse("/?wrong=1", 303)
        return RedirectResponse(address("/for-you", user=name), 303)

    def change(self, change: str, request: Request, fields: Fields) -> Response:
        """Add, remove, dismiss or restore one thing; the next list knows it."""
        user, item = fields.get("user", ""), fields.get("item", "")
        if not user.strip():
            raise DataError("the form names no person; expected the id of a user")
        getattr(self.node, change)(user, item)
        done = {"add": "added", "remove": "removed", "dismiss": "dismissed", "restore": "restored"}[change]
        if fields.get("back", "").startswith("/start"):
            if len(self._own(user)) >= FIRST:
                return RedirectResponse(address("/for-you", user=user), 303)
            return RedirectResponse(address("/start", user=user), 303)
        return self._back(fields, "/for-you", done=done, of=item)

    async def bring_in(self, request: Request) -> Response:
        """Import a file: whole, or not at all."""
        async with request.form(max_files=8) as form:
            self._check_form(form)
            given = [each for each in form.getlist("file") if not isinstance(each, str) and each.filename]
            files = [(str(each.filename), await each.read()) for each in given]
            fields = {name: value for name, value in form.items() if isinstance(value, str)}
        user, skip = fields.get("user", ""), fields.get("skip") == "yes"
        try:
            found = await run_in_threadpool(import_files, self.node, files, user, skip)
        except NotImportedError as error:
            request.scope["query_string"] = address("", user=user).lstrip("?").encode()
            request = Request(request.scope)
            return await run_in_threadpool(self.have, request, 422, error)
        numbers = (found.things, len(found.people), found.skipped, found.new)
        whose = "\n".join(found.people[: views.NAMED])
        return self._back(fields, "/have", done="imported", of="-".join(map(str, numbers)), whose=whose)

    def set_rule(self, request: Request, fields: Fields) -> Response:
        """The least protection from now on."""
        self.node.set_rules(require=fields.get("require", ""))
        return self._back(fields, "/rules", done="rule_kept")

    def pause(self, request: Request, fields: Fields) -> Response:
        """Answer no federation, or take part again."""
        paused = fields.get("paused") == "yes"
        self.node.set_rules(paused=paused)
        return self._back(fields, "/rules", done="paused" if paused else "resumed")

    def leave(self, request: Request, fields: Fields) -> Response:
        """Leave the federation."""
        self.node.leave()
        return self._back(fields, "/rules", done="departed")

    def come_back(self, request: Request, fields: Fields) -> Response:
        """Take part in new runs again."""
        self.node.set_rules(left=False)
        return self._back(fields, "/rules", done="back")

    def forget_now(self, request: Request, fields: Fields) -> Response:
        """Forget a person."""
        user = fields.get("user", "")
        self.node.forget(user)
        return RedirectResponse(address("/", done="gone", of=user), 303)

    # --- files ---

    def picture(self, request: Request) -> Response:
        """The picture of an item."""
        found = self.node.picture(request.query_params.get("item", ""))
        if found is None:
            raise HTTPException(404, "picture")
        content, media = found
        return Response(content, media_type=media, headers={"cache-control": "private, max-age=3600"})

    def export_csv(self, request: Request) -> Response:
        """What a person has, as a table."""
        user = request.query_params.get("user", "")
        return _download(views.as_csv(user, self.node.items_of(user)), "text/csv; charset=utf-8", "my-items.csv")

    def export_json(self, request: Request) -> Response:
        """All that is stored about a person."""
        found = self.node.export(request.query_params.get("user", ""))
        content = json.dumps(found, indent=2, ensure_ascii=False)
        return _download(content, "application/json", "everything-about-me.json")


def _download(content: str, media: str, name: str) -> Response:
    return Response(content, media_type=media, headers={"content-disposition": f'attachment; filename="{name}"'})


def asset(request: Request) -> Response:
    """A file of style or script that the pages of this room share."""
    name = request.path_params["name"]
    if name not in ASSETS:
        raise HTTPException(404, "asset")
    content = (resources.files("perfedrec.web") / "assets" / name).read_bytes()
    return Response(content, media_type=ASSETS[name])
