"""The page that shows an OpenAPI document to people. It is made here and loads nothing from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment

PAGE, STYLE = "/docs", "/docs/style.css"
"""Where the page and its style are served."""


def style() -> str:
    """The style of the page."""
    return _asset("api.css")


def page(document: Mapping[str, Any]) -> str:
    """The page of an OpenAPI document."""
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_asset("api.html"))
    return template.render(
        info=document["info"],
        operations=list(_operations(document)),
        schemas={name: list(_fields(each)) for name, each in document["components"]["schemas"].items()},
        notes={name: each.get("description", "") for name, each in document["components"]["schemas"].items()},
        style=STYLE,
    )


def _asset(name: str) -> str:
    return files("perfedrec.web").joinpath("assets", name).read_text(encoding="utf-8")


def _operations(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for path, methods in document["paths"].items():
        for method, each in methods.items():
            body = each.get("requestBody", {}).get("content", {})
            yield {
                "method": method.upper(),
                "path": path,
                "summary": each["summary"],
                "description": each.get("description", ""),
                "parameters": [
                    {
                        "name": given["name"],
                        "where": given["in"],
                        "kind": _kind(given["schema"]),
                        "description": given.get("description", ""),
                    }
                    for given in each.get("parameters", ())
                ],
                "body": [_kind(content["schema"]) for content in body.values()],
                "answers": [
                    {
                        "status": status,
                        "kinds": [_kind(content["schema"]) for content in answer.get("content", {}).values()],
                        "description": answer["description"],
                    }
                    for status, answer in each["responses"].items()
                ],
                "open": each.get("security") == [],
            }


def _fields(schema: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    for name, each in schema.get("properties", {}).items():
        yield {"name": name, "kind": _kind(each), "description": each.get("description", "")}


def _kind(schema: Mapping[str, Any]) -> str:
    """A schema in a few words."""
    if "$ref" in schema:
        return str(schema["$ref"].rpartition("/")[2])
    if "anyOf" in schema:
        return " or ".join(_kind(each) for each in schema["anyOf"])
    kind = str(schema.get("type", "any"))
    if kind == "array":
        kind = f"list of {_kind(schema['items'])}"
    elif kind == "object" and isinstance(more := schema.get("additionalProperties"), Mapping):
        kind = f"object of {_kind(more)}"
    limits = [f"{word} {schema[key]}" for key, word in _LIMITS.items() if key in schema]
    if "default" in schema and schema["default"] not in ([], None):
        limits.append(f"by default {json.dumps(schema['default'])}")
    return ", ".join([kind, *limits])


_LIMITS = {"minimum": "at least", "maximum": "at most", "maxLength": "at most (characters)", "maxItems": "at most"}
