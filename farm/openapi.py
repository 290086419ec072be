"""The OpenAPI document: Litestar's own, with what it can't know.

Litestar knows paths, parameters and replies from the handlers. Added here are the problems of a call with their slugs,
its scope, its idempotency key, the limits of types as msgspec tells them, and those that settings decide.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, cast

import msgspec
from litestar import Litestar
from litestar.handlers import HTTPRouteHandler
from litestar.openapi import OpenAPIConfig

from farm import VERSION, problems, words
from farm.calls import Call, data_of
from farm.clients import FORM, SCOPES
from farm.problems import Problem
from farm.settings import Settings
from farm.words import CSV, JSON, NDJSON

REF = "#/components/schemas/{name}"


@lru_cache(8)
def openapi_document(settings: Settings, calls: tuple[HTTPRouteHandler, ...]) -> dict[str, Any]:
    """The OpenAPI 3.1 document of these calls."""
    config = OpenAPIConfig(
        "BotFarm", VERSION, description="A pool of test users that tests lock.",
        operation_id_creator=lambda handler, method, _: handler.handler_name + ("_head" if method == "HEAD" else ""),
    )  # fmt: skip
    handlers = {handler.handler_name: handler for handler in calls}
    document = Litestar(
        [*handlers.values()], openapi_config=config, logging_config=None, request_class=Call
    ).openapi_schema.to_schema()
    schemas = exact_schemas(document["components"]["schemas"], settings)
    document["components"]["schemas"] = schemas
    for path, item in document["paths"].items():
        item.pop("head", None)
        for operation in item.values():
            handler = handlers[operation["operationId"]]
            describe(operation, handler, settings)
            secured = settings.auth == "on" and "scope" in handler.opt
            refused = [] if path == "/token" else problems_of(handler, path, secured)
            operation["responses"] = success_of(operation, handler.opt.get("media")) | problem_responses(refused)
    if settings.auth == "on":
        describe_token(document)
    return document


def exact_schemas(named: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """The schemas of these structs by msgspec, which knows all limits of types, and with those of the settings."""
    kinds = [kind for kind in vars(words).values() if isinstance(kind, type) and kind.__name__ in named]
    kinds += [words.ImportedUser, problems.ProblemDetails, problems.FieldError, problems.LineError]
    _, schemas = msgspec.json.schema_components(kinds, ref_template=REF)
    schemas["ProblemDetails"]["additionalProperties"] = True
    for schema in schemas.values():
        if schema.get("additionalProperties") is False:  # what callers send
            for name, limit in words.limits(settings).items():
                restrict(schema["properties"].get(name, {}), limit)
    return schemas


def restrict(schema: dict[str, Any], limit: Mapping[str, Any]) -> None:
    for kind in schema.get("anyOf", [schema]):
        if kind.get("type") != "null":
            kind |= limit


def describe(operation: dict[str, Any], handler: HTTPRouteHandler, settings: Settings) -> None:
    """What Litestar can't know of a call: its scope, its idempotency key, and a body that it does not read itself."""
    summary, _, text = (handler.fn.__doc__ or "").strip().partition("\n")
    operation |= {"summary": summary.rstrip("."), "description": " ".join(text.split()) or summary}
    if settings.auth == "on":
        needed = handler.opt.get("scope")
        operation["security"] = [{"oauth2": [needed]}] if needed else []
    if data := data_of(handler):
        operation["requestBody"]["required"] = not data.has_default
    elif handler.opt.get("upload"):
        lines = {"schema": {"type": "string", "description": "lines like ImportedUser, or of an export"}}
        operation["requestBody"] = {"required": True, "content": {NDJSON: lines, CSV: lines}}
    elif handler.opt.get("json"):
        operation["requestBody"] = {"required": True, "content": {JSON: {"schema": {}}}}
    parameters = operation.setdefault("parameters", [])
    for parameter in parameters:
        parameter["schema"] = parameter_schema(parameter, settings)
    if keyed := handler.opt.get("keyed"):
        schema = {"type": "string", "format": "uuid"}
        parameters.append({"name": "Idempotency-Key", "in": "header", "description": keyed, "schema": schema})


def parameter_schema(parameter: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Without null, which leaves a parameter out; with the limits of settings, and of a list's items."""
    schema = dict(parameter["schema"])
    for kind in schema.pop("oneOf", ()):
        schema |= kind if kind != {"type": "null"} else {}
    if "enum" in schema:
        schema |= {"type": "string", "enum": [value for value in schema["enum"] if value is not None]}
    if parameter["name"] == "label":
        schema["items"] = msgspec.json.schema(words.LabelPair)
    schema = {key: int(value) if isinstance(value, float) else value for key, value in schema.items()}
    return words.limits(settings).get(parameter["name"], {}) | schema


def success_of(operation: dict[str, Any], media: Iterable[str] | None) -> dict[str, Any]:
    """The good replies; one that is not JSON is text, whatever Litestar made of its type, or of one of these."""
    done = {status: answer for status, answer in operation["responses"].items() if status < "4"}
    for status, answer in done.items():
        if status < "3":
            answer["description"] = "Done"
        if (content := answer.get("content")) and (media or JSON not in content):
            answer["content"] = {kind.partition(";")[0]: {"schema": {"type": "string"}} for kind in media or content}
    return done


def problems_of(handler: HTTPRouteHandler, path: str, secured: bool) -> list[type[Problem]]:
    """What a call can refuse: what it declares, and what its form brings along."""
    kinds = [*cast("list[type[Problem]]", handler.raises or [])]
    kinds += [problems.Invalid, problems.HeadTooLarge, problems.InternalError]
    kinds += [problems.DatabaseUnavailable, problems.Overloaded] if "scope" in handler.opt else []
    kinds += [problems.NotFound] if "{" in path else []
    kinds += [problems.Unauthenticated, problems.Forbidden] if secured else []
    if data_of(handler) or handler.opt.keys() & {"json", "bodiless"} or "DELETE" in handler.http_methods:
        kinds += [problems.MalformedBody, problems.UnsupportedMediaType, problems.BodyTooLarge]
    return list(dict.fromkeys(kinds))


def problem_responses(kinds: list[type[Problem]]) -> dict[str, Any]:
    told: dict[str, list[str]] = {}
    for kind in sorted(kinds, key=lambda kind: kind.status_code):
        told.setdefault(str(kind.status_code), []).append(f"`{kind.slug}`: {(kind.__doc__ or '').strip()}")
    content = {problems.PROBLEM_JSON: {"schema": {"$ref": REF.format(name="ProblemDetails")}}}
    return {status: {"description": " / ".join(texts), "content": content} for status, texts in told.items()}


def describe_token(document: dict[str, Any]) -> None:
    """How to get a token: the Authorize button of the API page works by it."""
    flow = {"tokenUrl": "/token", "scopes": SCOPES}
    document["components"]["securitySchemes"] = {"oauth2": {"type": "oauth2", "flows": {"clientCredentials": flow}}}
    _, schemas = msgspec.json.schema_components([words.TokenError], ref_template=REF)
    document["components"]["schemas"] |= schemas
    fields: dict[str, Any] = {name: {"type": "string"} for name in ("scope", "client_id", "client_secret")}
    fields["grant_type"] = {"type": "string", "const": "client_credentials"}
    form = {"type": "object", "required": ["grant_type"], "properties": fields}
    operation = document["paths"]["/token"]["post"]
    operation["requestBody"] = {"required": True, "content": {FORM: {"schema": form}}}
    content = {JSON: {"schema": {"$ref": REF.format(name="TokenError")}}}
    told = {
        "400": "RFC 6749 section 5.2",
        "401": "`invalid_client`",
        "415": "a charset that is not UTF-8",
        "429": "too often",
        "503": "no database, or a crowd",
    }
    operation["responses"] |= {status: {"description": text, "content": content} for status, text in told.items()}
