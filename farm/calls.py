"""Calls: what each passes on its way in and out, and what the handlers share.

In: `enter` asks who calls, and refuses a query that says more than its handler understands; `Call` reads the body as
the struct that the handler declares. Out: `reply` for what was done, and a problem for what was refused.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, cast
from urllib.parse import parse_qsl

import msgspec
from litestar import Request, Response
from litestar.datastructures import State
from litestar.exceptions import ClientException, HTTPException, ValidationException
from litestar.handlers import HTTPRouteHandler
from litestar.params import QueryParameter
from litestar.types import Message, Scope
from litestar.typing import FieldDefinition
from msgspec import Struct

from farm import problems
from farm.addresses import RIGHTS
from farm.bodies import MISSING, UNKNOWN, check_json, decode_body, media_of, told
from farm.clients import CALLER, Caller, Gate, caller_of, cause_of
from farm.database import DATABASE_FAULTS, SCHEMA_FAULTS, SQL, Connections
from farm.imports import Imports
from farm.locks import Locks
from farm.overview import Glances
from farm.passwords import KeyFault, Passwords
from farm.problems import Problem
from farm.settings import Settings, log
from farm.telemetry import Cause, Events, Exporter, Snapshot
from farm.words import JSON, Body, forbidden

# ---- What the handlers share -------------------------------------------------------------------------------


@dataclass(eq=False)
class Farm:
    """Everything that a worker has. Locks have connections of their own (`hot`), so that no list stands before them."""

    settings: Settings
    hot: Connections
    pool: Connections
    passwords: Passwords
    events: Events
    gate: Gate | None

    def __post_init__(self) -> None:
        self.locks = Locks(self.settings, self.hot, self.pool, self.passwords, self.events, self.gate)
        self.desk = self.locks.desk
        self.glances = Glances(self.pool, self.desk)
        self.exporter = Exporter(self.events, self.pool, self.snapshot)
        self.imports = Imports(self.hot, self.pool)

    def snapshot(self) -> Snapshot:
        """What this worker has at this moment, for the metrics."""
        return Snapshot(self.desk.crowd(), {"locks": self.hot.gauges(), "other": self.pool.gauges()})


class NoBody(Body, frozen=True):
    """A call without a body: what somebody meant as a filter there must not widen it."""


class Call(Request[Any, Any, State]):
    """A request, with what handlers ask of it."""

    PAUSE = 30  # seconds that a body may take, and that it may pause
    SLOWEST = 16 * 1024  # bytes a second that it has to bring after them
    _read: bytes | None = None

    @cached_property
    def farm(self) -> Farm:
        return self.app.state.farm

    @property
    def caller(self) -> Caller:
        return caller_of(self.scope)

    @property
    def cause(self) -> Cause:
        return cause_of(self.scope)

    @cached_property
    def _first(self) -> dict[bytes, bytes]:
        """The first header of each name. (Litestar's own mapping decodes them all.)"""
        return dict([*self.scope["headers"]][::-1])

    def header(self, name: bytes) -> str | None:
        value = self._first.get(name)
        return None if value is None else value.decode("latin-1")

    def has_body(self) -> bool:
        """Whether a body is announced."""
        return self.header(b"content-length") not in (None, "0") or self.header(b"transfer-encoding") is not None

    async def body(self) -> bytes:
        """The whole body: one event for nearly every call. (Litestar's own way takes 8 of the 80 us of a call.)"""
        if self._read is None:
            handler = self.route_handler
            self._read = await self._read_body(handler, handler.resolve_request_max_body_size() or 0)
            if not self._read and (data := data_of(handler)) and not data.has_default:
                raise problems.MalformedBody("There is no body, but this call takes JSON.")
        return self._read

    async def _read_body(self, handler: HTTPRouteHandler, limit: int) -> bytes:
        named = handler.opt.get("limit", "BOTFARM_MAX_BODY")
        self.check_length(limit, named)
        if data_of(handler) and self.has_body():
            self.check_media()
        event = await self._part()
        body = event["body"]
        if event.get("more_body", False):
            gathered = bytearray(body)
            async for part in self.parts():
                gathered += part
                if len(gathered) > limit:
                    break
            body = bytes(gathered)
        if len(body) > limit:
            raise problems.BodyTooLarge.over(limit, named)
        return body

    def check_length(self, limit: int, named: str) -> None:
        """Refuse a body that is announced as too long before any of it is sent."""
        if int(self.header(b"content-length") or 0) > limit:
            raise problems.BodyTooLarge.over(limit, named)

    async def parts(self) -> AsyncIterator[bytes]:
        """The body as it arrives. One that pauses or drips holds a call, maybe a transaction, and is given up."""
        waited, size, more = 0.0, 0, True
        while more:
            began = time.monotonic()
            try:
                async with asyncio.timeout(min(self.PAUSE, self.PAUSE + size / self.SLOWEST - waited)):
                    event = await self._part()
            except TimeoutError:
                text = (
                    f"The body did not come to its end within {self.PAUSE} seconds: it paused for as long, or brought "
                    f"under {self.SLOWEST} bytes a second; nothing was stored."
                )
                raise problems.MalformedBody(text, headers={"Connection": "close"}) from None
            waited += time.monotonic() - began
            size += len(event["body"])
            more = event.get("more_body", False)
            yield event["body"]

    async def _part(self) -> dict[str, Any]:
        try:
            event = cast("dict[str, Any]", await self.receive())
        except asyncio.CancelledError:  # the server stops, and has waited for it as long as it may
            if not self.farm.desk.stopping.is_set():
                raise
            raise problems.ShuttingDown(headers={"Connection": "close"}) from None
        if event["type"] == "http.disconnect":
            raise ClientException("the client went away before the end of the body")
        return event

    async def json(self) -> Any:
        """The body as the struct that the handler declares as its `data`.

        Litestar would take "60" for 60 and "null" for null, which widens a filter: so bodies are read here.
        """
        return self.decode(await self.body(), cast("FieldDefinition", data_of(self.route_handler)).annotation)

    async def any_json(self) -> bytes:
        """The body as it was sent, which is JSON of any form."""
        self.check_media()
        self.check_encoding()
        body = await self.body()
        check_json(body)
        return body

    def check_media(self) -> None:
        """Refuse what is announced as no JSON before any of it is sent."""
        media = self.header(b"content-type")
        if media is None:  # as JSON, but not from a page in a browser, which could send that to any address unasked
            media = JSON if self.header(b"origin") is None else "none"
        if media != JSON and (media := media_of(media)) != JSON:
            raise problems.UnsupportedMediaType(
                f"The content type is {media!r}, but this call takes {JSON} (curl: --json)."
            )

    def check_encoding(self) -> None:
        if (encoding := self.header(b"content-encoding") or "identity") != "identity":
            raise problems.UnsupportedMediaType.encoded(encoding)

    def decode(self, body: bytes, kind: type[Struct]) -> Any:
        try:
            value = decode_body(body, kind, self.farm.settings)
        except problems.MalformedBody:
            if encoding := self.header(b"content-encoding"):
                raise problems.UnsupportedMediaType.encoded(encoding) from None
            raise
        self.check(value)
        return value

    def check(self, value: Any) -> None:
        """What settings and the caller's projects forbid in a body or a filter."""
        if faults := list(forbidden(self.farm.settings, value)):
            raise problems.Invalid(faults)
        for part in getattr(value, "users", (value,)):
            self.caller.check_project(getattr(part, "project_id", None))


@lru_cache
def data_of(handler: HTTPRouteHandler) -> FieldDefinition | None:
    """What it declares as its `data`; None where it takes no JSON."""
    return handler.parsed_fn_signature.parameters.get("data")


@lru_cache
def query_of(handler: HTTPRouteHandler) -> dict[str, tuple[Any, bool]]:
    """Its query parameters and those of its dependencies: the type, with all limits, and whether it may be repeated."""
    found: dict[str, tuple[Any, bool]] = {}
    for declared in (handler, *handler.resolve_dependencies().values()):
        for field in declared.parsed_fn_signature.parameters.values():
            if isinstance(kind := field.kwarg_definition, QueryParameter):
                is_list = any(part.is_non_string_sequence for part in (field, *field.inner_types))
                found[kind.name or field.name] = declared.signature_model.__annotations__[field.name], is_list
    return found


# What Litestar hands on is an id for Python's uuid.UUID, and so are {ID}, urn:uuid:ID and +ID.
_HEX = "[0-9a-fA-F]"  # re.IGNORECASE would take twice as long, half a microsecond a call
UUID_IN_PATH = re.compile(rf"/(?:{_HEX}{{8}}(?:-{_HEX}{{4}}){{3}}-{_HEX}{{12}}|{_HEX}{{32}})(?:/|$)")


def methods_of(request: Call) -> Response[None]:
    """The answer to OPTIONS. (Litestar's own knows one handler of a path that has several.)"""
    path = request.scope["path_template"]
    methods = next(route.methods for route in request.app.routes if route.path_format == path)
    return Response(None, status_code=204, headers={"Allow": ", ".join(sorted(methods))})


async def enter(request: Call) -> Response[None] | None:
    """What every call passes: who calls, and whether it says only what its handler understands.

    As Litestar's `before_request`: a middleware, with the layer for its exceptions, took 2 of 38 us more.
    """
    scope, handler = request.scope, request.route_handler
    if "id" in scope["path_params"] and not UUID_IN_PATH.search(scope["path"]):
        raise problems.NotFound.at(scope["path"])
    if scope["method"] == "OPTIONS":  # its query is that of another method, whose parameters are not known here
        return methods_of(request)
    if (gate := request.farm.gate) and (needed := handler.opt.get("scope")):
        scope["state"][CALLER] = caller = await gate.admit(request.header(b"authorization"), needed)
        if caller.projects is not None:
            await keep_inside(request.farm, caller, scope)
    query = b"" if scope["path"] == "/" else scope["query_string"]  # what the dashboard shows, for its script
    if query and query_faults(query, query_of(handler), are_all=False):
        raise problems.Invalid(query_faults(query, query_of(handler)))
    # What was meant as a filter there must not widen it, and a code that is not what was asked for must not be spent.
    if (scope["method"] == "DELETE" or handler.opt.get("bodiless")) and request.has_body():
        request.check_media()
        request.decode(await request.body() or b"{}", NoBody)
    return None


async def keep_inside(farm: Farm, caller: Caller, scope: Any) -> None:
    """For a client that is limited to projects, users of others do not exist.

    A lock of its own is in them anyway; one of another client is only an admin's to touch.
    """
    id, is_user = scope["path_params"].get("id"), scope["path"].startswith("/users/")
    if id is None or not (is_user or caller.owner is None):
        return
    ids = (id, None) if is_user else (None, id)
    if await farm.pool.fetchval(SQL["get_project"], *ids) not in (caller.projects or ()):
        raise problems.UserNotFound.of(id) if is_user else problems.LockNotHeld.of(id)


def query_faults(
    query: bytes, known: Mapping[str, tuple[Any, bool]], are_all: bool = True
) -> list[problems.FieldError]:
    """What is wrong with a query's parameters: a mistyped filter widens no call.

    Unless all faults are asked for, those are left out that Litestar finds itself, in a fifth of the time.
    """
    try:
        pairs = parse_qsl(query.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=100)
    except ValueError as error:
        why = f"{error} (it may have 100 parameters, in UTF-8)"
        return [problems.FieldError(None, f"the query string is not readable: {why}")]
    given: dict[str, list[str]] = {}
    for name, value in pairs:
        given.setdefault(name, []).append(value)
    faults = [(name, query_fault(name, values, known.get(name), are_all)) for name, values in given.items()]
    return [problems.FieldError(name, fault) for name, fault in faults if fault]


def query_fault(name: str, values: list[str], declared: tuple[Any, bool] | None, are_all: bool) -> str | None:
    """Of several values, as of labels, the first that breaks a rule is told."""
    if declared is None:
        return UNKNOWN
    kind, is_list = declared
    if len(values) > 1 and not is_list:
        return "is given twice"
    if not are_all and "null" not in map(str.lower, values):
        return None
    for value in values:
        try:
            if msgspec.convert([value] if is_list else value, kind, strict=False) is None:
                return f"{problems.shown(value)} is not allowed; leave it out"
        except msgspec.ValidationError as error:
            return told(str(error).partition(" - at ")[0], name, value, kind)
    return None


def idempotency_key(request: Call) -> uuid.UUID | None:
    """The key that was sent. As it is stored it is derived from the client, so that two clients never share one."""
    sent = [value.decode("latin-1") for name, value in request.scope["headers"] if name == b"idempotency-key"]
    if not sent:
        return None
    if len(sent) > 1:
        raise problems.Invalid.field("Idempotency-Key", "is given twice")
    try:
        return msgspec.convert(sent[0], uuid.UUID)
    except msgspec.ValidationError:
        raise problems.Invalid.field("Idempotency-Key", f"{problems.shown(sent[0])} is not a UUID") from None


async def echo(message: Message, scope: Scope) -> None:
    """Every reply has the id and the trace that its caller sent."""
    if message["type"] == "http.response.start" and (headers := cause_of(scope).echo):
        message["headers"] = [*message["headers"], *headers]


# ---- The way out ------------------------------------------------------------------------------------------


def reply(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response[Any]:
    return Response(msgspec.json.encode(value), status_code=status, media_type=JSON, headers=dict(headers or {}))


def refusal(request: Request, problem: Problem) -> Response[Any]:
    """The reply of a problem; all refusals are counted here."""
    request.app.state.farm.events.refused(problem.slug)
    return problem.response()


def refuse(request: Call, error: HTTPException) -> Response[Any]:
    """A problem, or what Litestar itself refuses, in our form."""
    if isinstance(error, Problem):
        return refusal(request, error)
    return fail(request, error) if error.status_code >= 500 else refusal(request, problem_of(request, error))


def problem_of(request: Request, error: HTTPException) -> Problem:
    path = request.url.path
    if isinstance(error, ValidationException):
        if error.extra:
            return problems.Invalid(query_faults(request.scope["query_string"], query_of(request.route_handler)))
        return problems.Invalid.field(error.detail.split("'")[1], MISSING)  # Missing required query parameter 'holder'
    if error.status_code == 404:
        return problems.NotFound.at(path)
    if error.status_code == 405:
        allowed = ", ".join(sorted((error.headers or {})["allow"].split(", ")))
        detail = f"{request.method} is not allowed at {problems.shown(path)}; allowed: {allowed}."
        return problems.MethodNotAllowed(detail, headers={"Allow": allowed})
    return problems.MalformedBody(f"The request is not readable: {error.detail}.")


def fail(request: Call, error: Exception) -> Response[Any]:
    """What is no problem yet: an outage, a key that is lacking, or a 500, with its traceback in the log."""
    cause = request.cause
    match error:
        case KeyFault():
            log.error("%s", error, extra={"cause": cause})
            return refusal(
                request, problems.DatabaseUnavailable("What is needed is sealed with a key that this replica lacks.")
            )
        case _ if isinstance(error, SCHEMA_FAULTS):
            request.farm.events.database_failed("The database lacks something", error, cause)
            detail = f"The database lacks something: {error.args[0]}. {RIGHTS}"
            return refusal(request, problems.DatabaseUnavailable(detail))
        case _ if isinstance(error, DATABASE_FAULTS):
            request.farm.events.database_failed("The database does not answer", error, cause)
            return refusal(request, problems.DatabaseUnavailable())
    known = cast("str", cause.request_id)
    path = request.scope.get("path_template")  # not the path: a lock's id in it is the proof of holding
    log.error("request %s: %s %s failed", known, request.method, path, exc_info=error, extra={"cause": cause})
    detail = f"An unforeseen error; the service's log has it as request {known}."
    return refusal(request, problems.InternalError(detail, request_id=known))
