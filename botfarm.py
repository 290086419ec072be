"""BotFarm: a pool of test users that end-to-end tests lock, use and give back.

A test user ("bot") is an account on the system under test. Two tests must never use one at the same time,
so a test acquires a lock on a free user that fits, works, and releases it. A lock ends by itself when its
ttl has passed, so a killed test frees its user.

    POST /locks          {"project_id": ..., "env": "stage"}   -> 201 with the lock and the password
    PATCH /locks/{id}    heartbeat: the lock now ends ttl seconds from now
    DELETE /locks/{id}   give the user back

Sections, in reading order:

    Settings     what can be configured, and how bad values are told
    Words        the structs that callers send and get
    Problems     everything that can be refused, as application/problem+json
    Database     the SQL files, the connection pools, migrations
    Passwords    sealed or hashed; opened only for the reply that grants a lock
    Clients      who may call, and whose a lock is, with BOTFARM_AUTH=on
    Coalescing   calls that arrive while a statement runs share the next one
    Log          one JSON line per event on standard error, written by a thread
    Events       what happens to users and locks: counted for GET /metrics, and logged, which is the audit trail
    Waiting      who gets whom when calls wait, alone or for a set
    Farm         what the handlers share
    Calls        how a handler declares its path, query, body and refusals
    Tokens       POST /token
    Users        create, list, change, verify, quarantine, history, pools
    Import       NDJSON and CSV, all or nothing; export
    Locks        acquire, extend, release
    Operations   health, the sweep, pruning
    App          the routes and their OpenAPI document
    Commands     python botfarm.py --help
"""

from __future__ import annotations

if __name__ == "__main__":  # first of all: a command imports only what it needs, and this module under its own name
    import sys

    from farm.commands import main

    sys.exit(main())

import asyncio
import base64
import contextlib
import gc
import importlib.resources
import logging
import os
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, Literal, cast
from urllib.parse import parse_qsl, unquote_plus

import asyncpg
import msgspec
from litestar import HttpMethod, Litestar, Request, Response, delete, patch, post, put, route
from litestar.config.cors import CORSConfig
from litestar.datastructures import State
from litestar.exceptions import ClientException, HTTPException
from litestar.response import Stream
from litestar.static_files import create_static_files_router
from msgspec import UNSET, Struct
from prometheus_client import CollectorRegistry, generate_latest

from farm import VERSION
from farm.clients import Gate, signing_keys
from farm.database import DATABASE_FAULTS, SQL, STATEMENT, UNBATCHED, T, new_id, open_pool
from farm.imports import PAUSE, CsvFile, Import, NdjsonFile, chunks, exported, turn
from farm.locks import (
    Farm,
    Release,
    Renewal,
    Scrape,
    acquire,
    granted,
    granted_set,
    not_held,
    pool_of,
    prune,
    publish,
    repeat,
    snapshot,
    sweep,
    wish_of,
)
from farm.migrations import MIGRATIONS, prepared
from farm.passwords import KeyFault, Passwords, check_keys, keyring_of, load_keys
from farm.problems import (
    BodyTooLarge,
    DatabaseUnavailable,
    FieldError,
    Forbidden,
    HeadTooLarge,
    InternalError,
    Invalid,
    LineError,
    LockEnded,
    LockNotHeld,
    LoginTaken,
    MalformedBody,
    MethodNotAllowed,
    NoMatchingUser,
    NotFound,
    PoolExhausted,
    Problem,
    ProblemDetails,
    Refused,
    ShuttingDown,
    TokenRefusal,
    Unauthenticated,
    UnsupportedMediaType,
    UserLocked,
    UserNotFound,
    UserUnavailable,
    login_taken,
    no_lock,
    no_user,
    shown,
    user_locked,
)
from farm.server import on_stop
from farm.settings import Settings, log, parse_keys
from farm.telemetry import (
    JOURNAL,
    NO_STORE,
    SHARED,
    Events,
    Tally,
    cause_of,
    echoed,
    header,
    log_as_lines,
    no_content,
    reply,
)
from farm.waiting import Ask, listen
from farm.words import (
    CALLER,
    CSV,
    FIRST_CURSOR,
    JSON,
    NDJSON,
    PROMETHEUS,
    SCOPES,
    AcquireLock,
    AcquireSet,
    AcquireUser,
    Caller,
    DeleteQuery,
    Ended,
    ExtendLock,
    Fence,
    Health,
    HistoryPage,
    HistoryQuery,
    HolderQuery,
    Imported,
    ImportedUser,
    Lock,
    LockSet,
    NewUser,
    NoBody,
    NoQuery,
    PasswordCheck,
    Pool,
    PoolList,
    PoolQuery,
    QuarantineReason,
    Released,
    ReleaseQuery,
    Token,
    TokenError,
    User,
    UserChanges,
    UserFilter,
    UserPage,
    UserQuery,
    Valid,
    Wish,
    caller_of,
    check_words,
    decode_body,
    field_errors,
    lock_of,
    read_cursor,
    user_of,
    with_implied,
    write_cursor,
)

ROUTES: list[Any] = []


Verb = Callable[..., Callable[[Callable[..., Any]], Any]]


def get(path: str, **options: Any) -> Any:
    """GET, and with it HEAD: the same without the body."""
    return route(path, http_method=[HttpMethod.GET, HttpMethod.HEAD], **options)


class Call(Struct):
    """What a handler declares of itself."""

    tag: str
    scope: Literal["open", "users:read", "users:write", "locks", "admin"]  # what a token needs for it
    status: int
    body: type[Struct] | None = None
    body_optional: bool = False
    query: type[Struct] | None = None
    no_query: Struct | None = None  # what a call without a query string gets, where nothing is required
    answer: type[Struct] | None = None
    media: str = JSON
    keyed: bool = False
    upload: bool = False
    problems: tuple[type[Problem], ...] = ()


NO_BODY = Call("", "open", 204, body=NoBody, body_optional=True)


def call(verb: Verb, path: str, **declared: Any) -> Callable[[Callable[..., Awaitable[Response]]], None]:
    """Register a handler; it gets the farm and the request, and id, query and body where it declares them."""
    declaration = Call(**declared)
    if declaration.query and not any(field.required for field in msgspec.structs.fields(declaration.query)):
        declaration.no_query = declaration.query()

    def register(handler: Callable[..., Awaitable[Response]]) -> None:
        async def attempt(request: Request, read: dict[str, Any]) -> Response:
            try:
                farm: Farm = request.app.state.farm
                if not read:  # a body can be read only once
                    read["arguments"] = await _admitted(farm, request, path, declaration)
                return await handler(farm, request, **read["arguments"])
            except Problem as problem:
                return problem.response()
            except DATABASE_FAULTS as fault:
                told = "The database does not answer"
                request.app.state.farm.events.database_failed(told, fault, cause_of(request))
                return DatabaseUnavailable().response()
            except KeyFault as fault:
                log.error("%s", fault, extra={"cause": cause_of(request)})
                return DatabaseUnavailable("A password is sealed with a key that this replica lacks.").response()
            except asyncio.CancelledError:  # the server has waited for it as long as it may
                if not request.app.state.farm.stopping:
                    raise
                return ShuttingDown(headers={"Connection": "close"}).response()

        async def persist(request: Request) -> Response:
            read: dict[str, Any] = {}
            for _ in range(1 if declaration.upload else 5):
                with contextlib.suppress(asyncpg.DeadlockDetectedError):  # rolled back whole, so safe to repeat
                    return await attempt(request, read)
            return DatabaseUnavailable("Too many calls change the same users; try again.").response()

        async def endpoint(request: Request) -> Response:
            return echoed(request, _counted(request, await persist(request)))

        endpoint.__doc__ = handler.__doc__
        limits = {"request_max_body_size": None} if declaration.upload else {}
        options = {"call": declaration, "name": handler.__name__}
        ROUTES.append(verb(path, status_code=200, opt=options, include_in_schema=False, **limits)(endpoint))

    return register


def _counted(request: Request, answer: Response) -> Response:
    if isinstance(answer, Refused):
        request.app.state.farm.events.refused(answer.slug)
    return answer


async def _admitted(farm: Farm, request: Request, path: str, declared: Call) -> dict[str, Any]:
    """What the handler gets, read after a look at who calls."""
    if farm.gate is None or declared.scope == "open":
        return await _arguments(farm, request, declared)
    caller = await farm.gate.admit(header(request, b"authorization"), declared.scope)
    request.scope["state"][CALLER] = caller
    arguments = await _arguments(farm, request, declared)
    if caller.projects is not None:
        await _keep_inside(farm, caller, caller.projects, path, arguments)
    return arguments


async def _keep_inside(
    farm: Farm, caller: Caller, projects: Sequence[uuid.UUID], path: str, arguments: dict[str, Any]
) -> None:
    """A client that is limited to projects names no others, and users of others do not exist for it.

    A lock of its own is in them anyway; one of another client is only an admin's to touch.
    """
    for value in (arguments.get("query"), arguments.get("body")):
        for named in (value, *getattr(value, "users", ())):
            if (project_id := getattr(named, "project_id", None)) and project_id not in projects:
                raise Forbidden.project(project_id)
    id = arguments.get("id")
    is_user = path.startswith("/users/")
    if id is None or not (is_user or caller.owner is None):
        return
    if await farm.pool.fetchval(SQL["get_project"], *((id, None) if is_user else (None, id))) not in projects:
        raise no_user(id) if is_user else no_lock(id)


async def _arguments(farm: Farm, request: Request, declared: Call) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    if text := request.path_params.get("id"):
        arguments["id"] = _path_id(text)
    if request.scope["query_string"]:
        arguments["query"] = _read_query(farm, request.scope["query_string"], declared.query or NoQuery)
    elif declared.query:
        arguments["query"] = declared.no_query or _read_query(farm, b"", declared.query)
    if declared.body:
        arguments["body"] = await _read_body(farm, request, declared)
    elif request.scope["method"] == "DELETE" and _has_body(request):
        await _read_body(farm, request, NO_BODY)
    return arguments


def _has_body(request: Request) -> bool:
    """Whether a body is announced."""
    headers = request.scope["headers"]
    return any(name in (b"content-length", b"transfer-encoding") and value != b"0" for name, value in headers)


def _path_id(text: str) -> uuid.UUID:
    try:
        return msgspec.convert(text, uuid.UUID)
    except msgspec.ValidationError:
        raise NotFound(f"{shown(text)} in the path is not a UUID.") from None


async def _read_all(request: Request, limit: int, named: str = "BOTFARM_MAX_BODY") -> bytes:
    """The whole body. (request.body() took 8 of the 80 us that a call of a cycle costs.)"""
    _check_length(request, limit, named)
    event = await _body_part(request)
    if not event.get("more_body", False) and len(event["body"]) <= limit:
        return event["body"]
    try:
        async with asyncio.timeout(PAUSE):
            return await _read_rest(request, event, limit, named)
    except TimeoutError:
        close = {"Connection": "close"}
        raise MalformedBody(f"The body did not come to its end within {PAUSE} seconds.", headers=close) from None


def _check_length(request: Request, limit: int, named: str) -> None:
    """Refuse a body that is announced as too long before any of it is sent."""
    if int(header(request, b"content-length") or 0) > limit:
        raise _too_large(limit, named)


def _too_large(limit: int, named: str) -> BodyTooLarge:
    """Without an end of the connection, which would reset it under a caller that still sends, and lose the reply."""
    return BodyTooLarge(f"The body is over {named}, {limit} bytes.")


async def _read_rest(request: Request, event: dict[str, Any], limit: int, named: str) -> bytes:
    body = bytearray()
    while True:
        body += event["body"]
        if len(body) > limit:
            raise _too_large(limit, named)
        if not event.get("more_body", False):
            return bytes(body)
        event = await _body_part(request)


async def _body_part(request: Request) -> dict[str, Any]:
    event = cast("dict[str, Any]", await request.receive())
    if event["type"] == "http.disconnect":
        raise ClientException("the client went away before the end of the body")
    return event


async def _read_body(farm: Farm, request: Request, declared: Call) -> Struct:
    body = await _read_all(request, farm.settings.max_body)
    kind = cast("type[Struct]", declared.body)
    if not body and declared.body_optional:
        return kind()
    media = header(request, b"content-type")
    if media is None:  # as JSON, but not from a page in a browser, which could send that to any address unasked
        media = JSON if header(request, b"origin") is None else "none"
    if media != JSON and (media := media.partition(";")[0].strip().lower()) != JSON:
        raise UnsupportedMediaType(f"The content type is {media!r}, but this call takes {JSON} (curl: --json).")
    try:
        return decode_body(farm.settings, body, kind)
    except MalformedBody:
        if encoding := header(request, b"content-encoding"):
            raise _encoded(encoding) from None
        raise


def _encoded(encoding: str) -> UnsupportedMediaType:
    return UnsupportedMediaType(f"The content encoding {encoding!r} is not supported: send it as it is.")


def _read_query(farm: Farm, query: bytes, kind: type[T]) -> T:
    values: dict[str, Any] = {}
    try:
        pairs = parse_qsl(query.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=100)
    except ValueError as error:
        raise Invalid([FieldError(None, f"the query string is not readable: {error}")]) from None
    for name, value in pairs:
        if name == "label" and "label" in cast("Any", kind).__struct_fields__:
            values.setdefault("label", []).append(value)
        elif name in values:
            raise Invalid([FieldError(name, "is given twice")])
        else:
            values[name] = value
    try:
        parsed = msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        raise Invalid(field_errors(error, values, kind, strict=False)) from None
    nulls = [name for name in values if getattr(parsed, name) is None]  # "null" would drop a filter
    faults = [FieldError(name, f"{shown(values[name])} is not allowed; leave it out") for name in nulls]
    if faults := faults + check_words(farm.settings, parsed):
        raise Invalid(faults)
    return parsed


FORM = "application/x-www-form-urlencoded"


LONGEST_FORM = 16 * 1024


NOT_STORED = NO_STORE | {"Pragma": "no-cache"}


@post("/token", status_code=200, include_in_schema=False)
async def issue_token(request: Request) -> Response:
    """Get a token.

    The client by HTTP Basic, or by `client_id` and `client_secret` in the form.
    """
    try:
        return await _issue(request, request.app.state.farm.gate)
    except TokenRefusal as refusal:
        refused = refusal
    except Problem as problem:
        refused = TokenRefusal("invalid_request", problem.detail)
    except DATABASE_FAULTS as fault:
        request.app.state.farm.events.database_failed("The database does not answer", fault, cause_of(request))
        text = "The database does not answer; try again in a moment."
        refused = TokenRefusal("temporarily_unavailable", text, 503, Retry_After="1")
    request.app.state.farm.events.refused(refused.error)
    return reply(TokenError(refused.error, str(refused)), refused.status, NOT_STORED | refused.headers)


async def _issue(request: Request, gate: Gate) -> Response:
    form = await _token_form(request)
    client_id, secret = _credentials(header(request, b"authorization"), form)
    grant = form.get("grant_type")
    if grant is None:
        raise TokenRefusal("invalid_request", "grant_type is missing: it is client_credentials.")
    if grant != "client_credentials":
        raise TokenRefusal("unsupported_grant_type", f"{shown(grant)} is not the one grant here, client_credentials.")
    client = await gate.authenticate(client_id, secret, request.client.host if request.client else "")
    scope = _granted_scope(form.get("scope", ""), client["scopes"])
    return reply(Token(gate.issue(client["id"], scope), "Bearer", gate.LIFE, scope), 200, NOT_STORED)


async def _token_form(request: Request) -> dict[str, str]:
    """The parameters that have a value; those without count as left out, unknown ones are passed over."""
    if request.scope["query_string"]:
        raise TokenRefusal("invalid_request", "Parameters belong into the body, not into the query string.")
    if (header(request, b"content-type") or "").partition(";")[0].strip().lower() != FORM:
        raise TokenRefusal("invalid_request", f"The content type has to be {FORM}.")
    body = await _read_all(request, LONGEST_FORM, "what a form may have")
    try:
        pairs = parse_qsl(body.decode("ascii"), errors="strict", max_num_fields=100)
    except ValueError:
        raise TokenRefusal("invalid_request", f"The body is not {FORM} in UTF-8.") from None
    if len(dict(pairs)) < len(pairs):
        raise TokenRefusal("invalid_request", "A parameter is there twice.")
    return dict(pairs)


def _credentials(authorization: str | None, form: dict[str, str]) -> tuple[str, str]:
    """Id and secret of the client; RFC 6749 section 2.3.1 allows one way at a time."""
    if authorization is None:
        if "client_id" in form and "client_secret" in form:
            return form["client_id"], form["client_secret"]
        text = "Send the client's id and secret by HTTP Basic, or as client_id and client_secret."
        raise TokenRefusal("invalid_client", text, 401, WWW_Authenticate='Basic realm="botfarm"')
    kind, _, encoded = authorization.partition(" ")
    try:
        client_id, colon, secret = base64.b64decode(encoded.strip(), validate=True).decode().partition(":")
    except ValueError:
        kind = client_id = colon = secret = ""
    if kind.lower() != "basic" or not colon:
        text = "The Authorization header is not HTTP Basic with the client's id and secret."
        raise TokenRefusal("invalid_client", text, 401, WWW_Authenticate='Basic realm="botfarm"')
    client_id, secret = unquote_plus(client_id), unquote_plus(secret)
    if "client_secret" in form or form.get("client_id", client_id) != client_id:
        raise TokenRefusal("invalid_request", "The client is there twice: by HTTP Basic and in the form.")
    return client_id, secret


def _granted_scope(asked: str, scopes: Sequence[str]) -> str:
    """The scopes that were asked for, or all of the client."""
    if excess := sorted(set(asked.split()) - with_implied(scopes)):
        raise TokenRefusal("invalid_scope", f"{shown(excess[0])} is none of the client's scopes, {' '.join(scopes)}.")
    return " ".join(dict.fromkeys(asked.split())) or " ".join(scopes)


async def _get_user(farm: Farm, id: uuid.UUID) -> User:
    row = await farm.pool.fetchrow(SQL["get_user"], id)
    if row is None:
        raise no_user(id)
    return user_of(row)


@call(post, "/users", tag="users", scope="users:write", status=201, body=NewUser, answer=User, problems=(LoginTaken,))
async def create_user(farm: Farm, request: Request, body: NewUser) -> Response:
    """Create a user.

    The login is unique within project and env. The password is stored sealed or hashed.
    """
    id = new_id()
    secret = await farm.passwords.store(id, body.password)
    labels = msgspec.json.encode(body.labels).decode()
    row = await farm.pool.fetchrow(
        SQL["create_user"], id, body.login, secret, body.project_id, body.env, body.domain, labels
    )
    if row is None:
        raise login_taken(body.login)
    farm.events.user("created", id, cause_of(request))
    farm.desk.freed()
    return reply(await _get_user(farm, id), 201, {"Location": f"/users/{id}"})


@call(get, "/users", tag="users", scope="users:read", status=200, query=UserQuery, answer=UserPage)
async def list_users(farm: Farm, request: Request, query: UserQuery) -> Response:
    """List users, oldest first.

    Pass `next` as `cursor` for the next page. All filters must fit; `label=key:value` may be repeated.
    """
    after = read_cursor(query.cursor, tuple[datetime, uuid.UUID]) if query.cursor is not None else FIRST_CURSOR
    rows = await farm.pool.fetch(SQL["list_users"], *query.columns((*after, query.limit + 1), caller_of(request)))
    page = rows[: query.limit]
    more = write_cursor(page[-1]["created_at"], page[-1]["id"]) if len(rows) > query.limit else None
    return reply(UserPage([user_of(row) for row in page], more))


@call(get, "/users/{id:str}", tag="users", scope="users:read", status=200, answer=User, problems=(UserNotFound,))
async def get_user(farm: Farm, request: Request, id: uuid.UUID) -> Response:
    """One user with its state."""
    return reply(await _get_user(farm, id))


@call(
    patch, "/users/{id:str}", tag="users", scope="users:write", status=200, body=UserChanges, answer=User,
    problems=(UserNotFound, LoginTaken),
)  # fmt: skip
async def update_user(farm: Farm, request: Request, id: uuid.UUID, body: UserChanges) -> Response:
    """Change a user.

    What is left out stays; labels are replaced whole; a current lock runs on.
    """
    values = [None if value is UNSET else value for value in (body.login, body.password, body.domain)]
    login, password, domain = values
    secret = await farm.passwords.store(id, password) if password is not None else None
    labels = None if body.labels is UNSET else msgspec.json.encode(body.labels).decode()
    try:
        changed = await farm.pool.fetchval(SQL["update_user"], id, login, secret, domain, labels)
    except asyncpg.UniqueViolationError:
        raise login_taken(login) from None
    if changed:
        farm.events.user("changed", id, cause_of(request), changed=changed)
    farm.desk.freed()  # it may fit somebody now
    return reply(await _get_user(farm, id))


@call(
    delete, "/users/{id:str}", tag="users", scope="users:write", status=204, query=DeleteQuery,
    problems=(UserNotFound, UserLocked),
)  # fmt: skip
async def delete_user(farm: Farm, request: Request, id: uuid.UUID, query: DeleteQuery) -> Response:
    """Delete a user.

    One that is locked is deleted only with `force=true`; its lock then ends as `forced` (another client's: by an
    admin alone).
    """
    row = await farm.pool.fetchrow(SQL["delete_user"], id, query.force, caller_of(request).owner)
    if row is None:
        raise no_user(id)
    if not row["deleted"] and query.force:
        raise Forbidden.scope("admin")  # the lock is another client's
    if not row["deleted"]:
        raise user_locked(id, row)
    if row["lock_id"]:
        farm.events.ended("forced" if row["held"] else "expired", row, cause_of(request))
    farm.events.user("deleted", id, cause_of(request))
    return no_content()


@call(
    post, "/users/{id:str}/verify", tag="users", scope="users:write", status=200, body=PasswordCheck, answer=Valid,
    problems=(UserNotFound,),
)  # fmt: skip
async def verify_password(farm: Farm, request: Request, id: uuid.UUID, body: PasswordCheck) -> Response:
    """Tell whether a password is the user's."""
    secret = await farm.pool.fetchval(SQL["get_secret"], id)
    if secret is None:
        raise no_user(id)
    valid = await farm.passwords.verify(id, secret, body.password)
    farm.events.log("password-checked", cause_of(request), user_id=id, valid=valid)
    return reply(Valid(valid))


@call(
    post, "/users/{id:str}/quarantine", tag="users", scope="users:write", status=200, body=QuarantineReason,
    answer=User, problems=(UserNotFound,),
)  # fmt: skip
async def quarantine_user(farm: Farm, request: Request, id: uuid.UUID, body: QuarantineReason) -> Response:
    """Take a user out.

    A current lock runs on; after it the user is not handed out until it is put back.
    """
    if await farm.pool.fetchval(SQL["set_quarantine"], id, body.reason):
        farm.events.quarantined(id, body.reason, cause_of(request))
    return reply(await _get_user(farm, id))


@call(
    delete,
    "/users/{id:str}/quarantine",
    tag="users",
    scope="users:write",
    status=200,
    answer=User,
    problems=(UserNotFound,),
)
async def end_quarantine(farm: Farm, request: Request, id: uuid.UUID) -> Response:
    """Put a user back. Also when it is not quarantined."""
    if await farm.pool.fetchval(SQL["set_quarantine"], id, None):
        farm.events.user("freed", id, cause_of(request))
    farm.desk.freed()
    return reply(await _get_user(farm, id))


@call(
    get, "/users/{id:str}/history", tag="users", scope="users:read", status=200, query=HistoryQuery, answer=HistoryPage,
    problems=(UserNotFound,),
)  # fmt: skip
async def list_history(farm: Farm, request: Request, id: uuid.UUID, query: HistoryQuery) -> Response:
    """The locks of a user, newest first.

    A live one has neither `ended_at` nor `ended_by`.
    """
    await _get_user(farm, id)
    (before,) = read_cursor(query.cursor, tuple[Fence]) if query.cursor is not None else (1 << 62,)
    rows = await farm.pool.fetch(SQL["list_history"], id, before, query.limit + 1)
    page = [Ended(**row) for row in rows[: query.limit]]
    return reply(HistoryPage(page, write_cursor(page[-1].fence) if len(rows) > query.limit else None))


@call(get, "/pools", tag="users", scope="users:read", status=200, query=PoolQuery, answer=PoolList)
async def list_pools(farm: Farm, request: Request, query: PoolQuery) -> Response:
    """The pools and how many of their users are in which state."""
    rows = await farm.pool.fetch(SQL["list_pools"], query.project_id, caller_of(request).projects)
    return reply(PoolList([Pool(**row, waiting=farm.desk.waiting(pool_of(row))) for row in rows]))


@call(
    post, "/users/import", tag="users", scope="users:write", status=200, answer=Imported, upload=True,
    problems=(UnsupportedMediaType, BodyTooLarge, MalformedBody, LoginTaken),
)  # fmt: skip
async def import_users(farm: Farm, request: Request) -> Response:
    """Create or replace many users by project, env and login.

    NDJSON (`application/x-ndjson`) or CSV (`text/csv`, labels as `label.<key>` columns), all or nothing. A known
    user keeps its lock, and its password when its line has none.
    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media not in (NDJSON, CSV):
        raise UnsupportedMediaType(f"The content type is {media!r}, but an import is {NDJSON} or {CSV}.")
    if (encoding := request.headers.get("content-encoding", "identity")) != "identity":
        raise _encoded(encoding)
    _check_length(request, farm.settings.max_import, "BOTFARM_MAX_IMPORT")
    file = (NdjsonFile if media == NDJSON else CsvFile)(farm.settings, caller_of(request).projects)
    async with turn(farm.imports), farm.pool.acquire() as connection:
        async with connection.transaction():
            await connection.execute(SQL["import_stage"])
            job = Import(farm, cast("asyncpg.Connection", connection), file)
            async for users in chunks(request, file, farm.settings.max_import):
                await job.stage(users)
            imported = await job.apply()
        if imported.created + imported.updated > 1000:
            with contextlib.suppress(asyncpg.PostgresError, *DATABASE_FAULTS):  # all is stored already
                await connection.execute(SQL["import_analyze"], timeout=600)
    farm.desk.freed()
    await job.changed.tell(farm.events, cause_of(request))
    farm.events.imported(imported, cause_of(request))
    return reply(imported)


@call(get, "/users/export", tag="users", scope="users:read", status=200, query=UserFilter, answer=User, media=NDJSON)
async def export_users(farm: Farm, request: Request, query: UserFilter) -> Response:
    """All users that fit, one a line, without secrets."""
    caller = caller_of(request)
    rows = await farm.pool.fetch(SQL["list_users"], *query.columns((*FIRST_CURSOR, 500), caller))
    farm.events.log("users-exported", cause_of(request))
    return Stream(exported(farm, query, caller, [] if request.method == HttpMethod.HEAD else rows), media_type=NDJSON)


@call(
    post, "/locks", tag="locks", scope="locks", status=201, body=AcquireLock, answer=Lock, keyed=True,
    problems=(NoMatchingUser, PoolExhausted, LockEnded, ShuttingDown),
)  # fmt: skip
async def acquire_lock(farm: Farm, request: Request, body: AcquireLock) -> Response:
    """Acquire a lock on any free user that matches.

    The reply carries the user's password, and the lock's id, which is the proof of holding. With an
    `Idempotency-Key` a repeat answers with the same lock, so no user is lost to a lost reply.
    """
    ask = Ask(wishes=[wish_of(body)], holder=body.holder, ttl=body.ttl, wait=body.wait)
    return await acquire(farm, request, ask, granted)


@call(
    put, "/users/{id:str}/lock", tag="locks", scope="locks", status=201, body=AcquireUser, body_optional=True,
    answer=Lock, keyed=True, problems=(UserNotFound, UserLocked, UserUnavailable, LockEnded, ShuttingDown),
)  # fmt: skip
async def acquire_user(farm: Farm, request: Request, id: uuid.UUID, body: AcquireUser) -> Response:
    """Acquire a lock on this very user."""
    ask = Ask(wishes=[Wish(id)], holder=body.holder, ttl=body.ttl, wait=body.wait)
    if ask.wait:
        user = await _get_user(farm, id)
        ask.home = Wish(None, user.project_id, user.env, user.domain)
    return await acquire(farm, request, ask, granted)


@call(
    post, "/locks/sets", tag="locks", scope="locks", status=201, body=AcquireSet, answer=LockSet, keyed=True,
    problems=(NoMatchingUser, PoolExhausted, LockEnded, ShuttingDown),
)  # fmt: skip
async def acquire_set(farm: Farm, request: Request, body: AcquireSet) -> Response:
    """Acquire several users together, all or none.

    Filters may overlap: whoever fits only one of them is kept for that one. The locks come in the order asked.
    """
    wishes = [wish for part in body.users for wish in [wish_of(part)] * part.count]
    return await acquire(
        farm, request, Ask(wishes=wishes, holder=body.holder, ttl=body.ttl, wait=body.wait), granted_set
    )


@call(get, "/locks/{id:str}", tag="locks", scope="locks", status=200, answer=Lock, problems=(LockNotHeld,))
async def get_lock(farm: Farm, request: Request, id: uuid.UUID) -> Response:
    """A lock that is held, without the password."""
    owner = caller_of(request).owner
    row = await farm.pool.fetchrow(SQL["get_lock"], id, owner)
    return reply(lock_of(row)) if row else (await not_held(farm, id, owner)).response()


@call(
    patch, "/locks/{id:str}", tag="locks", scope="locks", status=200, body=ExtendLock, body_optional=True, answer=Lock,
    problems=(LockNotHeld,),
)  # fmt: skip
async def extend_lock(farm: Farm, request: Request, id: uuid.UUID, body: ExtendLock) -> Response:
    """Heartbeat: the lock now ends `ttl` seconds from now.

    Without a ttl the last one is used again.
    """
    owner = caller_of(request).owner
    row = await farm.extend(Renewal(id, body.ttl, owner, cause_of(request)))
    return reply(lock_of(row)) if row else (await not_held(farm, id, owner)).response()


@call(delete, "/locks/{id:str}", tag="locks", scope="locks", status=204, query=ReleaseQuery, problems=(LockNotHeld,))
async def release_lock(farm: Farm, request: Request, id: uuid.UUID, query: ReleaseQuery) -> Response:
    """Give the user back.

    `cooldown` lets it rest first; `quarantine` takes it out, with the reason, when the test found it broken.
    """
    owner = caller_of(request).owner
    held = await farm.release(Release(id, query.cooldown, query.quarantine, owner, cause_of(request)))
    return no_content() if held else (await not_held(farm, id, owner)).response()


@call(delete, "/locks", tag="locks", scope="locks", status=200, query=HolderQuery, answer=Released)
async def release_holder(farm: Farm, request: Request, query: HolderQuery) -> Response:
    """Give back everything that a holder holds: a CI job's last step."""
    caller = caller_of(request)
    rows = await farm.pool.fetch(SQL["release_holder"], query.holder, query.project_id, caller.owner, caller.projects)
    for row in rows:
        farm.events.ended("released", row, cause_of(request))
    farm.desk.freed()
    return reply(Released(len(rows)))


@call(delete, "/users/{id:str}/lock", tag="locks", scope="admin", status=204, problems=(UserNotFound,))
async def force_release(farm: Farm, request: Request, id: uuid.UUID) -> Response:
    """End the lock of a user by force, whoever holds it. Also when nobody does."""
    row = await farm.hot.fetchrow(SQL["force_release"], id)
    if row is None:
        raise no_user(id)
    if row["lock_id"]:
        farm.events.ended("forced", row, cause_of(request))
    farm.desk.freed()
    return no_content()


@call(get, "/livez", tag="service", scope="open", status=200, answer=Health)
async def livez(farm: Farm, request: Request) -> Response:
    """The process serves. Touches no database."""
    return Response(content=b'{"status":"ok"}', media_type=JSON)


@call(get, "/readyz", tag="service", scope="open", status=200, answer=Health, problems=(DatabaseUnavailable,))
async def readyz(farm: Farm, request: Request) -> Response:
    """The database answers, and its schema is there."""
    try:
        applied = {row["migration_id"] for row in await farm.pool.fetch(SQL["list_migrations"], timeout=3)}
    except asyncpg.UndefinedTableError:
        applied = set()
    missing = [migration.id for migration in MIGRATIONS if migration.id not in applied]
    if missing:
        raise DatabaseUnavailable(f"The migration {missing[0]!r} is missing: run `python botfarm.py migrate`.")
    return reply(Health("ok"))


@call(get, "/metrics", tag="service", scope="open", status=200, media=PROMETHEUS)
async def metrics(farm: Farm, request: Request) -> Response:
    """Numbers for Prometheus, over all workers of this start.

    Without the counts of users and of waiting calls where the database does not answer.
    """
    farm.events.count_losses()
    pools = await farm.census.rows()
    scrape = Scrape(farm.events.tally, pools, [snapshot(farm), *farm.events.tally.others()])
    # In a thread, because ten thousand pools take their time.
    text = await asyncio.to_thread(generate_latest, cast("CollectorRegistry", scrape))
    return Response(content=text, media_type=PROMETHEUS)


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>BotFarm</title>
<h1>BotFarm</h1><p>A pool of test users. <a href="/docs">API documentation</a></p></html>"""


DOCS = """<!doctype html><html lang="en"><meta charset="utf-8"><title>BotFarm API</title>
<link rel="stylesheet" href="/docs/assets/swagger-ui.css"><div id="ui"></div>
<script src="/docs/assets/swagger-ui-bundle.js"></script><script src="/docs/start.js"></script></html>"""


START = 'SwaggerUIBundle({url: "/docs/openapi.json", dom_id: "#ui", validatorUrl: null})'


# What the pages may load and where they may stand: their own files, and in no frame. Swagger UI styles by attributes.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}


@route(sorted({path for made in ROUTES for path in made.paths}), http_method=HttpMethod.OPTIONS, status_code=204)
async def options(request: Request) -> Response[None]:
    """What can be called here. (Litestar's own answer knows one method of a path that has several handlers.)"""
    path = request.scope["path_template"].replace("{id}", "{id:str}")
    methods = request.app.route_handler_method_map[path]
    return Response(content=None, status_code=204, headers={"Allow": ", ".join(sorted(methods))})


@get("/", media_type="text/html", response_headers=PAGE_HEADERS, include_in_schema=False)
async def index() -> str:
    return PAGE


@get("/docs", media_type="text/html", response_headers=PAGE_HEADERS, include_in_schema=False)
async def docs() -> str:
    return DOCS


@get("/docs/start.js", media_type="text/javascript", include_in_schema=False)
async def docs_start() -> str:
    """A file of its own, because the pages' policy lets no script stand in them."""
    return START


@get("/docs/openapi.json", include_in_schema=False)
async def openapi_json(request: Request) -> Response:
    return reply(openapi_document(request.app.state.settings))


def openapi_document(settings: Settings) -> dict[str, Any]:
    """The OpenAPI 3.1 document of all calls."""
    calls = [(handler, handler.opt["call"]) for handler in ROUTES]
    structs = {kind for _, declared in calls for kind in (declared.body, declared.answer) if kind}
    _, schemas = msgspec.json.schema_components(
        [*sorted(structs, key=lambda kind: kind.__name__), ImportedUser, ProblemDetails, FieldError, LineError],
        ref_template="#/components/schemas/{name}",
    )
    paths: dict[str, Any] = {}
    secured = settings.auth == "on"
    for handler, declared in calls:
        for path in sorted(handler.paths):
            method = min(handler.http_methods).lower()  # HEAD comes along with GET
            paths.setdefault(path.replace(":str", ""), {})[method] = _operation(handler, declared, path, secured)
    document = {
        "openapi": "3.1.0",
        "info": {"title": "BotFarm", "version": VERSION, "description": "A pool of test users that tests lock."},
        "paths": paths,
        "components": {"schemas": {**schemas, "Problem": _problem_schema()}},
    }
    if secured:
        _secure(document)
    return cast("dict[str, Any]", _with_limits(document, settings))


def _secure(document: dict[str, Any]) -> None:
    """How to get a token, and that calls need one: the Authorize button of the API page works by it."""
    flow = {"tokenUrl": "/token", "scopes": SCOPES}
    document["components"]["securitySchemes"] = {"oauth2": {"type": "oauth2", "flows": {"clientCredentials": flow}}}
    _, schemas = msgspec.json.schema_components([Token, TokenError], ref_template="#/components/schemas/{name}")
    document["components"]["schemas"] |= schemas
    document["paths"]["/token"] = {"post": _token_operation()}


def _token_operation() -> dict[str, Any]:
    summary, _, text = cast("str", issue_token.fn.__doc__).strip().partition("\n")
    names = ("grant_type", "scope", "client_id", "client_secret")
    fields: dict[str, Any] = {name: {"type": "string"} for name in names}
    fields["grant_type"]["const"] = "client_credentials"
    form = {"type": "object", "required": ["grant_type"], "properties": fields}
    answers = [(200, Token, "Done"), (400, TokenError, "RFC 6749 section 5.2"), (401, TokenError, "`invalid_client`")]
    answers += [(429, TokenError, "too often"), (503, TokenError, "the database does not answer, or too many ask")]
    return {
        "operationId": "issue_token",
        "tags": ["service"],
        "summary": summary.rstrip("."),
        "description": " ".join(text.split()),
        "security": [],
        "requestBody": {"required": True, "content": {FORM: {"schema": form}}},
        "responses": {
            str(status): {
                "description": what,
                "content": {JSON: {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}},
            }
            for status, kind, what in answers
        },
    }


def _with_limits(node: Any, settings: Settings) -> Any:
    """Fill in the limits that settings decide."""
    if isinstance(node, list):
        return [_with_limits(item, settings) for item in node]
    if not isinstance(node, dict):
        return node
    node = {key: _with_limits(value, settings) for key, value in node.items()}
    return node | _LIMITS.get(node.get("description", ""), lambda _: {})(settings)


_LIMITS: dict[str, Callable[[Settings], dict[str, Any]]] = {
    "one of BOTFARM_ENVS": lambda settings: {"enum": list(settings.envs)},
    "one of BOTFARM_DOMAINS": lambda settings: {"enum": list(settings.domains)},
    "seconds until the lock ends by itself": lambda settings: {"maximum": settings.max_ttl},
    "seconds to wait for a user that comes free": lambda settings: {"maximum": settings.max_wait},
}


def _problem_schema() -> dict[str, Any]:
    (_, schemas) = msgspec.json.schema_components([ProblemDetails], ref_template="#/components/schemas/{name}")
    return schemas["ProblemDetails"] | {"title": "Problem", "additionalProperties": True}


def _operation(handler: Any, declared: Call, path: str, secured: bool) -> dict[str, Any]:
    summary, _, text = (handler.fn.__doc__ or "").strip().partition("\n")
    operation: dict[str, Any] = {
        "operationId": handler.opt["name"],
        "tags": [declared.tag],
        "summary": summary.rstrip("."),
        "description": " ".join(text.split()) or summary,
        "parameters": [*_path_parameters(path), *_query_parameters(declared), *_header_parameters(declared)],
        "responses": _responses(handler, declared, path, secured),
    }
    if secured:
        operation["security"] = [] if declared.scope == "open" else [{"oauth2": [declared.scope]}]
    if declared.body:
        schema = {"$ref": f"#/components/schemas/{declared.body.__name__}"}
        operation["requestBody"] = {"required": not declared.body_optional, "content": {JSON: {"schema": schema}}}
    if declared.upload:
        lines = {"schema": {"type": "string", "description": "a line for each user: ImportedUser"}}
        operation["requestBody"] = {"required": True, "content": {NDJSON: lines, CSV: lines}}
    return operation


def _path_parameters(path: str) -> list[dict[str, Any]]:
    schema = {"type": "string", "format": "uuid"}
    return [{"name": "id", "in": "path", "required": True, "schema": schema}] if "{id" in path else []


def _query_parameters(declared: Call) -> list[dict[str, Any]]:
    if not declared.query:
        return []
    (_,), schemas = msgspec.json.schema_components([declared.query], ref_template="#/{name}")
    schema = schemas[declared.query.__name__]
    return [
        {"name": name, "in": "query", "required": name in schema.get("required", []), "schema": _not_null(field)}
        for name, field in schema["properties"].items()
    ]


def _not_null(field: dict[str, Any]) -> dict[str, Any]:
    """A query parameter is left out rather than null."""
    kinds = [kind for kind in field.get("anyOf", []) if kind != {"type": "null"}]
    if not kinds:
        return field
    return {k: v for k, v in field.items() if k not in ("anyOf", "default")} | kinds[0]


def _header_parameters(declared: Call) -> list[dict[str, Any]]:
    text = "A repeat with the same key answers with the same lock."
    schema = {"type": "string", "format": "uuid"}
    return (
        [{"name": "Idempotency-Key", "in": "header", "description": text, "schema": schema}] if declared.keyed else []
    )


def _responses(handler: Any, declared: Call, path: str, secured: bool) -> dict[str, Any]:
    answer: dict[str, Any] = {"description": "Done"}
    if declared.answer:
        schema = {"$ref": f"#/components/schemas/{declared.answer.__name__}"}
        answer["content"] = {declared.media: {"schema": schema if declared.media == JSON else {"type": "string"}}}
    elif declared.media != JSON:
        answer["content"] = {declared.media.partition(";")[0]: {"schema": {"type": "string"}}}
    problems: dict[str, list[type[Problem]]] = {}
    for problem in _problems(handler, declared, path, secured):
        problems.setdefault(str(problem.status), []).append(problem)
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    described = {
        status: {
            "description": " / ".join(f"`{p.slug}`: {(p.__doc__ or '').strip()}" for p in kinds),
            "content": content,
        }
        for status, kinds in sorted(problems.items())
    }
    return {str(declared.status): answer, **described}


def _problems(handler: Any, declared: Call, path: str, secured: bool) -> list[type[Problem]]:
    """What a call can refuse: what it declares, and what its form brings along."""
    problems = [*declared.problems, Invalid, HeadTooLarge, InternalError]
    problems += [DatabaseUnavailable] if declared.tag != "service" else []
    problems += [NotFound] if "{id" in path else []
    problems += [Unauthenticated, Forbidden] if secured and declared.scope != "open" else []
    if declared.body or "DELETE" in handler.http_methods:
        problems += [MalformedBody, UnsupportedMediaType, BodyTooLarge]
    return list(dict.fromkeys(problems))


def _http_problem(request: Request, error: HTTPException) -> Response:
    """What Litestar itself refuses, in our form."""
    return echoed(request, _counted(request, _problem_of(request, error).response()))


def _problem_of(request: Request, error: HTTPException) -> Problem:
    path = request.url.path
    if error.status_code == 404:
        return NotFound(f"There is nothing at {shown(path)}; see /docs.")
    if error.status_code == 405:
        allowed = ", ".join(sorted((error.headers or {})["allow"].split(", ")))
        detail = f"{request.method} is not allowed at {shown(path)}; allowed: {allowed}."
        return MethodNotAllowed(detail, headers={"Allow": allowed})
    if error.status_code == 413:
        limit = request.app.state.settings.max_body
        return BodyTooLarge(f"The body is over BOTFARM_MAX_BODY, {limit} bytes.")
    return MalformedBody(f"The request is not readable: {error.detail}.")


def _unforeseen(request: Request, error: Exception) -> Response:
    """A 500: the log gets the traceback, the caller the id to find it by."""
    cause = cause_of(request)
    known = cast("str", cause.request_id)
    path = request.scope.get("path_template")  # not the path: a lock's id in it is the proof of holding
    log.error("request %s: %s %s failed", known, request.method, path, exc_info=error, extra={"cause": cause})
    detail = f"An unforeseen error; the service's log has it as request {known}."
    return echoed(request, _counted(request, InternalError(detail, request_id=known).response()))


@asynccontextmanager
async def _running(app: Litestar) -> AsyncIterator[None]:
    """Everything that lives as long as the service."""
    settings: Settings = app.state.settings
    async with contextlib.AsyncExitStack() as stack:
        database = stack.enter_context(prepared(settings))
        lanes = UNBATCHED if settings.batch == 1 else 4
        hot = await stack.enter_async_context(
            open_pool(database, lanes, "force_generic_plan", STATEMENT, settings.pooler)
        )
        pool = await stack.enter_async_context(
            open_pool(database, settings.pool_size, "force_custom_plan", STATEMENT, settings.pooler)
        )
        keyring = keyring_of(load_keys(settings))
        await check_keys(pool, keyring)
        passwords = Passwords(keyring)
        stack.callback(passwords.close)
        shared = os.environ.get(SHARED)
        if shared:
            JOURNAL.share(shared)
        stack.callback(JOURNAL.flush)  # after the last words of what is closed below
        events = Events(Tally(shared), JOURNAL if settings.log == "events" else None)
        gate = Gate(pool, parse_keys(signing_keys(settings))) if settings.auth == "on" else None
        app.state.farm = farm = Farm(settings, hot, pool, passwords, events, gate)
        jobs = [repeat(sweep, farm, 1), repeat(prune, farm, 60), repeat(publish, farm, 1)]
        jobs += [farm.desk.run(), farm.desk.announce()]
        if settings.listen_url or settings.pooler == "off":
            jobs.append(listen(farm, settings.listen_url.reveal() if settings.listen_url else database))
        if gate:
            stack.callback(gate.close)
            jobs.append(gate.keep_fresh())
        tasks = [asyncio.create_task(job) for job in jobs]
        on_stop(farm.stop)
        # What is there now stays: without freeze the collector walks over all of it again and again, in pauses
        # of 40 ms (p99 of a cycle at 64 connections: 36 -> 10 ms).
        gc.collect()
        gc.freeze()
        gc.set_threshold(10_000, 10, 10)
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await farm.settle()


def _cors(settings: Settings) -> CORSConfig | None:
    """Which pages of other origins may call: none, unless set."""
    if not settings.cors_origins:
        return None
    return CORSConfig(
        allow_origins=list(settings.cors_origins),
        allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "X-Request-Id", "traceparent"],
        expose_headers=["Location", "Retry-After", "WWW-Authenticate", "X-Request-Id", "traceparent"],
    )


def create_app(settings: Settings) -> Litestar:
    """The service as an ASGI application."""
    assets = str(importlib.resources.files("swagger_ui") / "static")
    return Litestar(
        route_handlers=[
            options,
            *ROUTES,
            index,
            docs,
            docs_start,
            openapi_json,
            *([issue_token] if settings.auth == "on" else []),
            create_static_files_router(path="/docs/assets", directories=[assets], include_in_schema=False),
        ],
        lifespan=[_running],
        state=State({"settings": settings, "openapi": openapi_document}),
        exception_handlers={HTTPException: _http_problem, Exception: _unforeseen},
        openapi_config=None,
        logging_config=None,
        request_max_body_size=settings.max_body,
        cors_config=_cors(settings),
    )


def __getattr__(name: str) -> Litestar:
    """`uvicorn botfarm:app`: the application is made when it is asked for, not when the module is imported."""
    if name == "app":
        settings = Settings.load()
        if not logging.getLogger().handlers:
            log_as_lines(settings.log == "events")
        return create_app(settings)
    raise AttributeError(name)
