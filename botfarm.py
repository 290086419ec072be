"""BotFarm: a pool of test users that end-to-end tests lock, use and give back.

A test user ("bot") is an account on the system under test. Two tests must never use one at the same time,
so a test acquires a lock on a free user that fits, works, and releases it. A lock ends by itself when its
ttl has passed, so a killed test frees its user.

    POST /locks          {"project_id": ..., "env": "stage"}   -> 201 with the lock and the password
    PATCH /locks/{id}    heartbeat: the lock now ends ttl seconds from now
    DELETE /locks/{id}   give the user back

This file is the small Litestar app: the handlers, the app, the start. The engine room is `farm/`, a room a concern,
each of which imports only those below it:

    farm/commands.py     the command line
    farm/server.py       uvicorn as we run it: limits for slow callers, workers, stopping
    farm/openapi.py      the OpenAPI document, with what Litestar can't know
    farm/calls.py        what each call passes on its way in and out
    farm/imports.py      NDJSON and CSV in, NDJSON out
    farm/locks.py        the statements of locks, shared by the calls that arrive together; refusals and why
    farm/overview.py     what pages show at a glance
    farm/waiting.py      who gets whom when calls wait
    farm/clients.py      who may call: clients, tokens, scopes, projects
    farm/telemetry.py    what happened: the log, which is the audit trail, and the metrics
    farm/codes.py        one-time codes, each given out once
    farm/passwords.py    sealing and hashing
    farm/migrations.py   the schema of the database, brought up to date
    farm/database.py     the SQL files, the two pools, statements that calls share
    farm/addresses.py    the database's URL, and what it means when nobody answers there
    farm/bodies.py       reading a body, and what is wrong with it
    farm/words.py        what callers send and get, with limits
    farm/problems.py     all that can be refused
    farm/settings.py     what can be configured
    farm/embedded.py     a PostgreSQL of our own
    farm/check.py        whether a service is ready: the health check of containers

The way of one acquire: farm/server.py reads it from the socket, farm/calls.py asks who calls and reads the body, and
`acquire_lock` below hands it to farm/locks.py. That claims a user with sql/acquire_locks.sql, in one statement with
the calls that arrived meanwhile, or lets farm/waiting.py do it in turn; farm/database.py runs it, farm/telemetry.py
tells of it, and farm/passwords.py opens the password for the reply. Where there is no user, farm/problems.py says why.
"""

from __future__ import annotations

if __name__ == "__main__":  # first of all: a command imports only what it needs, and this module under its own name
    import sys

    from farm.commands import main

    sys.exit(main())

import asyncio
import contextlib
import gc
import hashlib
import importlib.resources
import logging
import signal
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import datetime
from email.utils import format_datetime
from functools import partial
from operator import itemgetter
from typing import Annotated, Any, cast

import asyncpg
import msgspec
from litestar import HttpMethod, Litestar, Response, delete, patch, post, put, route
from litestar.config.cors import CORSConfig
from litestar.datastructures import State
from litestar.di import NamedDependency, Provide
from litestar.exceptions import HTTPException
from litestar.handlers import HTTPRouteHandler
from litestar.openapi import ResponseSpec
from litestar.params import FromPath, FromQuery, JSONBody, QueryParameter
from litestar.response import File, Stream
from litestar.types import BeforeRequestHookHandler, ExceptionHandlersMap
from msgspec import UNSET

from farm import problems, words
from farm.addresses import RIGHTS, SchemaError, explained, read_address, run_apart
from farm.bodies import media_of
from farm.calls import Call, Farm, echo, enter, fail, idempotency_key, refusal, refuse, reply
from farm.clients import LONGEST_FORM, Gate, grant_token, read_form
from farm.codes import sealed_codes, spend_code
from farm.database import DATABASE_FAULTS, SQL, new_id, open_pool
from farm.embedded import EmbeddedError
from farm.imports import PAGE, CsvFile, NdjsonFile, exported, labels_of, wants_csv
from farm.locks import Release, Renewal
from farm.migrations import MIGRATIONS, applied_migrations, prepared
from farm.openapi import openapi_document
from farm.overview import takes_gzip
from farm.passwords import KeyFault, Passwords, keyring_of, proven_keys
from farm.server import end_with_parent, on_stop
from farm.settings import BadSettings, Secret, Settings, jittered, log
from farm.telemetry import JOURNAL, Events, log_as_lines
from farm.waiting import Ask, listen
from farm.words import CSV, NDJSON, Lock, User

# ---- How handlers are declared and answer ------------------------------------------------------------------

NO_STORE = {"Cache-Control": "no-store"}


def get(path: str | list[str], **options: Any) -> Any:
    """GET, and with it HEAD: the same without the body."""
    return route(path, http_method=[HttpMethod.GET, HttpMethod.HEAD], status_code=200, **options)


# Handlers by audience, with the scope that a caller's token needs: `enter` in farm/calls.py asks for it. (No routers:
# Litestar gives each path to one of them, and here audiences share paths.)
READING: dict[str, Any] = {"tags": ["users"], "opt": {"scope": "users:read"}}
WRITING: dict[str, Any] = {"tags": ["users"], "opt": {"scope": "users:write"}}
LOCKING: dict[str, Any] = {"tags": ["locks"], "opt": {"scope": "locks"}}
UPLOADING: dict[str, Any] = {"tags": ["users"], "opt": {"scope": "users:write", "upload": True}}
LISTING: dict[str, Any] = {"tags": ["users"], "opt": {"scope": "users:read", "media": (NDJSON, CSV)}}
FORCING: dict[str, Any] = {"tags": ["locks"], "opt": {"scope": "admin"}}
ANYBODY: dict[str, Any] = {"tags": ["service"]}
# What acquires take beside their body; read by `idempotency_key`.
KEYED: dict[str, Any] = LOCKING | {
    "opt": {"scope": "locks", "keyed": "A repeat with the same key answers with the same lock."}
}
NO_USER = [problems.NoMatchingUser, problems.PoolExhausted, problems.LockEnded, problems.ShuttingDown]


# ---- Users -------------------------------------------------------------------------------------------------

Id = FromPath[uuid.UUID]
Limit = Annotated[int, QueryParameter(ge=1, le=1000)]
Cursor = Annotated[str | None, QueryParameter(max_length=200, description="`next` of the page before")]
FILTERED = {"filters": Provide(words.UserFilter, sync_to_thread=False)}


async def find_user(farm: Farm, id: uuid.UUID) -> User:
    row = await farm.pool.fetchrow(SQL["get_user"], id)
    if row is None:
        raise problems.UserNotFound.of(id)
    return User.of(row)


@post("/users", **WRITING, raises=[problems.LoginTaken, problems.NotSealed])
async def create_user(request: Call, data: JSONBody[words.NewUser]) -> Response[User]:
    """Create a user.

    The login is unique within project and env. The password is stored sealed or hashed.
    """
    farm, id = request.farm, new_id()
    totp = sealed_codes(farm.passwords, id, data.totp)
    secret = await farm.passwords.store(id, data.password)
    labels = msgspec.json.encode(data.labels).decode()
    made = (id, data.login, secret, data.project_id, data.env, data.domain, labels, *totp)
    if (row := await farm.pool.fetchrow(SQL["create_user"], *made)) is None:
        raise problems.LoginTaken.of(data.login)
    farm.events.log("user-created", request.cause, user_id=id)
    farm.desk.freed()
    return reply(User.of(row), 201, {"Location": f"/users/{id}"})


@get("/users", **READING, dependencies=FILTERED)
async def list_users(
    request: Call, filters: NamedDependency[words.UserFilter], limit: Limit = 100, cursor: Cursor = None
) -> words.UserPage:
    """List users, oldest first.

    Pass `next` as `cursor` for the next page. All filters must fit; `label=key:value` may be repeated.
    """
    request.check(filters)
    after = words.read_cursor(cursor, tuple[datetime, uuid.UUID]) if cursor is not None else words.FIRST_PLACE
    page = filters.columns((*after, limit + 1), request.caller.projects)
    rows = await request.farm.pool.fetch(SQL["list_users"], *page)
    place = rows[limit - 1] if len(rows) > limit else None
    more = words.write_cursor(place["created_at"], place["id"]) if place else None
    return words.UserPage([User.of(row) for row in rows[:limit]], more)


@get("/users/{id:uuid}", **READING, raises=[problems.UserNotFound])
async def get_user(request: Call, id: Id) -> User:
    """One user with its state."""
    return await find_user(request.farm, id)


@patch("/users/{id:uuid}", **WRITING, raises=[problems.UserNotFound, problems.LoginTaken, problems.NotSealed])
async def update_user(request: Call, id: Id, data: JSONBody[words.UserChanges]) -> User:
    """Change a user.

    What is left out stays; labels are replaced whole; a current lock runs on.
    """
    farm = request.farm
    login, password, domain = (None if v is UNSET else v for v in (data.login, data.password, data.domain))
    totp = data.totp is not UNSET, *sealed_codes(farm.passwords, id, data.totp)
    secret = await farm.passwords.store(id, password) if password is not None else None
    labels = None if data.labels is UNSET else msgspec.json.encode(data.labels).decode()
    try:
        changed = await farm.pool.fetchval(SQL["update_user"], id, login, secret, domain, labels, *totp)
    except asyncpg.UniqueViolationError:
        raise problems.LoginTaken.of(login) from None
    if changed:
        farm.events.log("user-changed", request.cause, user_id=id, changed=changed)
    farm.desk.freed()  # it may fit somebody now
    return await find_user(farm, id)


@delete("/users/{id:uuid}", **WRITING, raises=[problems.UserNotFound, problems.UserLocked])
async def delete_user(request: Call, id: Id, force: FromQuery[bool] = False) -> None:
    """Delete a user.

    One that is locked is deleted only with `force=true`; its lock then ends as `forced` (another client's: by an
    admin alone).
    """
    events = request.farm.events
    row = await request.farm.pool.fetchrow(SQL["delete_user"], id, force, request.caller.owner)
    if row is None:
        raise problems.UserNotFound.of(id)
    if not row["deleted"]:  # with force the lock is another client's
        raise problems.Forbidden.scope("admin") if force else problems.UserLocked.of(id, row)
    if row["lock_id"]:
        events.ended("forced" if row["held"] else "expired", row, request.cause)
    events.log("user-deleted", request.cause, user_id=id)


@post("/users/{id:uuid}/verify", status_code=200, **WRITING, raises=[problems.UserNotFound])
async def verify_password(request: Call, id: Id, data: JSONBody[words.PasswordCheck]) -> words.Valid:
    """Tell whether a password is the user's."""
    farm = request.farm
    secret = await farm.pool.fetchval(SQL["get_secret"], id)
    if secret is None:
        raise problems.UserNotFound.of(id)
    valid = await farm.passwords.verify(id, secret, data.password)
    farm.events.log("password-checked", request.cause, user_id=id, valid=valid)
    return words.Valid(valid)


@post("/users/{id:uuid}/quarantine", status_code=200, **WRITING, raises=[problems.UserNotFound])
async def quarantine_user(request: Call, id: Id, data: JSONBody[words.QuarantineReason]) -> User:
    """Take a user out.

    A current lock runs on; after it the user is not handed out until it is put back.
    """
    if await request.farm.pool.fetchval(SQL["set_quarantine"], id, data.reason):
        request.farm.events.log("user-quarantined", request.cause, user_id=id, reason=data.reason)
    return await find_user(request.farm, id)


@delete("/users/{id:uuid}/quarantine", status_code=200, **WRITING, raises=[problems.UserNotFound])
async def end_quarantine(request: Call, id: Id) -> User:
    """Put a user back. Also when it is not quarantined."""
    farm = request.farm
    if await farm.pool.fetchval(SQL["set_quarantine"], id, None):
        farm.events.log("user-freed", request.cause, user_id=id)
    farm.desk.freed()
    return await find_user(farm, id)


@get("/users/{id:uuid}/history", **READING, raises=[problems.UserNotFound])
async def list_history(request: Call, id: Id, limit: Limit = 100, cursor: Cursor = None) -> words.HistoryPage:
    """The locks of a user, newest first.

    A live one has neither `ended_at` nor `ended_by`.
    """
    await find_user(request.farm, id)
    (before,) = words.read_cursor(cursor, tuple[words.Fence]) if cursor is not None else (1 << 62,)
    rows = await request.farm.pool.fetch(SQL["list_history"], id, before, limit + 1)
    page = [words.Ended(**row) for row in rows[:limit]]
    return words.HistoryPage(page, words.write_cursor(page[-1].fence) if len(rows) > limit else None)


@get("/pools", **READING)
async def list_pools(request: Call, project_id: FromQuery[uuid.UUID | None] = None) -> words.PoolList:
    """The pools and how many of their users are in which state."""
    request.caller.check_project(project_id)
    rows = await request.farm.pool.fetch(SQL["list_pools"], project_id, request.caller.projects)
    waiting = request.farm.desk.waiting
    return words.PoolList([words.Pool(**row, waiting=waiting(words.Wish.of_pool(row))) for row in rows])


@get("/overview", **READING, responses={304: ResponseSpec(None, description="Nothing has changed")})
async def get_overview(request: Call, project_id: FromQuery[uuid.UUID | None] = None) -> Response[words.Overview]:
    """What a page shows at a glance: pools, the 200 locks that end first, the 50 latest ends.

    A second old at the most. A page that sends its `ETag` as `If-None-Match` is answered by 304 while nothing changes.
    """
    caller = request.caller
    caller.check_project(project_id)
    view = await request.farm.glances.view(caller.projects, project_id)
    headers = {"ETag": view.etag, "Cache-Control": "private, no-cache", "Vary": "Accept-Encoding"}
    if view.is_known(request.header(b"if-none-match")):
        return Response(cast("Any", None), status_code=304, headers=headers)
    body: Any = view.body
    if takes_gzip(request.header(b"accept-encoding")):
        body, headers["Content-Encoding"] = view.packed, "gzip"
    return Response(body, media_type=words.JSON, headers=headers)


@post(
    "/users/import", status_code=200, **UPLOADING, request_max_body_size=None,
    raises=[problems.UnsupportedMediaType, problems.BodyTooLarge, problems.MalformedBody, problems.LoginTaken,
        problems.NotSealed, problems.ShuttingDown],
)  # fmt: skip
async def import_users(request: Call) -> words.Imported:
    """Create or replace many users by project, env and login.

    NDJSON (`application/x-ndjson`) or CSV (`text/csv`, labels as `label.<key>` columns), all or nothing. A known
    user keeps its lock, and its password and its one-time codes when its line has none.
    """
    farm, settings = request.farm, request.farm.settings
    media = media_of(request.header(b"content-type") or "")
    if media not in (NDJSON, CSV):
        raise problems.UnsupportedMediaType(f"The content type is {media!r}, but an import is {NDJSON} or {CSV}.")
    request.check_encoding()
    request.check_length(settings.max_import, "BOTFARM_MAX_IMPORT")
    file = (NdjsonFile if media == NDJSON else CsvFile)(settings, farm.passwords, request.caller.projects)
    try:
        imported = await farm.imports.run(file, request.parts())
    except asyncio.CancelledError:  # the server stops, and has waited for it as long as it may
        raise problems.ShuttingDown(headers={"Connection": "close"}) from None
    farm.desk.freed()
    farm.events.log("users-imported", request.cause, **msgspec.structs.asdict(imported))
    return imported


@get("/users/export", **LISTING, dependencies=FILTERED)
async def export_users(request: Call, filters: NamedDependency[words.UserFilter]) -> Stream:
    """All users that fit, one a line, without secrets.

    NDJSON, or CSV with `Accept: text/csv`. An import takes both as they are.
    """
    request.check(filters)
    pool, projects = request.farm.pool, request.caller.projects
    first = await pool.fetch(SQL["list_users"], *filters.columns((*words.FIRST_PLACE, PAGE), projects))
    accept = ",".join(request.headers.getall("accept", []))
    labels = await labels_of(pool, filters, projects, first) if wants_csv(accept) else None
    request.farm.events.log("users-exported", request.cause)
    rows = [] if request.method == HttpMethod.HEAD else first
    lines = exported(pool, filters, projects, rows, labels)
    return Stream(lines, media_type=NDJSON if labels is None else CSV, headers={"Vary": "Accept"})


# ---- Locks -------------------------------------------------------------------------------------------------


NO_WISHES, LAST_TTL = words.AcquireUser(), words.ExtendLock()  # what a call without a body means


def ask_of(request: Call, wishes: words.Wishes, data: words.AcquireLock | words.AcquireUser | words.AcquireSet) -> Ask:
    client, key = request.caller.client, idempotency_key(request)
    return Ask(
        wishes=wishes, holder=data.holder, note=data.note, ttl=data.ttl, wait=data.wait, cause=request.cause,
        client=client, sent_key=key, key=uuid.uuid5(client, str(key)) if client and key else key,
    )  # fmt: skip


async def acquired(request: Call, ask: Ask, kind: Callable[[list[Lock]], Any] = itemgetter(0)) -> Response[Any]:
    """The reply to an acquire. Refusals are returned, because many share one."""
    granted = await request.farm.locks.acquire(request, ask)
    if isinstance(granted, problems.Problem):
        return refusal(request, granted)
    return reply(kind(granted), 201, NO_STORE)


@post("/locks", **KEYED, raises=NO_USER)
async def acquire_lock(request: Call, data: JSONBody[words.AcquireLock]) -> Response[Lock]:
    """Acquire a lock on any free user that matches.

    The reply carries the user's password, and the lock's id, which is the proof of holding. With an
    `Idempotency-Key` a repeat answers with the same lock, so no user is lost to a lost reply. With `prefer` one that
    has a live session comes first, among those that are free.
    """
    ask = ask_of(request, (data.wish(),), data)
    ask.prefers_session = data.prefer == "session"
    return await acquired(request, ask)


@put(
    "/users/{id:uuid}/lock", status_code=201, **KEYED, raises=[
        problems.UserNotFound, problems.UserLocked, problems.UserUnavailable, problems.LockEnded, problems.ShuttingDown,
    ],
)  # fmt: skip
async def acquire_user(request: Call, id: Id, data: JSONBody[words.AcquireUser] = NO_WISHES) -> Response[Lock]:
    """Acquire a lock on this very user."""
    if data is NO_WISHES:  # a body is checked as it is read, and the default ttl may be over BOTFARM_MAX_TTL, too
        request.check(data)
    ask = ask_of(request, (words.Wish(id),), data)
    if ask.wait:
        row = await request.farm.pool.fetchrow(SQL["get_user"], id)
        ask.home = words.Wish.of_pool(row) if row else None
        ask.wait = ask.wait if row else 0  # for nobody; but a key may have been bound to one who was deleted since
    return await acquired(request, ask)


@post("/locks/sets", **KEYED, raises=NO_USER)
async def acquire_set(request: Call, data: JSONBody[words.AcquireSet]) -> Response[words.LockSet]:
    """Acquire several users together, all or none.

    Filters may overlap: whoever fits only one of them is kept for that one. The locks come in the order asked.
    """
    wishes = tuple(wish for part in data.users for wish in [part.wish()] * part.count)
    return await acquired(request, ask_of(request, wishes, data), words.LockSet)


@get("/locks/{id:uuid}", **LOCKING, raises=[problems.LockNotHeld])
async def get_lock(request: Call, id: Id) -> Lock:
    """A lock that is held, without the password."""
    owner = request.caller.owner
    row = await request.farm.pool.fetchrow(SQL["get_lock"], id, owner)
    if row is None:
        raise await request.farm.locks.not_held(id, owner)
    return Lock.of(row)


@patch("/locks/{id:uuid}", **LOCKING, raises=[problems.LockNotHeld])
async def extend_lock(request: Call, id: Id, data: JSONBody[words.ExtendLock] = LAST_TTL) -> Response[Lock]:
    """Heartbeat: the lock now ends `ttl` seconds from now.

    Without a ttl the last one is used again. `holder` and `note` tell who has it from now on, and why.
    """
    owner = request.caller.owner
    holder = None if data.holder is UNSET else data.holder
    note = None if data.note is UNSET else data.note
    row = await request.farm.locks.extend(Renewal(id, data.ttl, owner, holder, note, request.cause))
    if row is None:
        raise await request.farm.locks.not_held(id, owner)
    return reply(Lock.of(row))


@delete("/locks/{id:uuid}", **LOCKING, raises=[problems.LockNotHeld])
async def release_lock(
    request: Call,
    id: Id,
    cooldown: Annotated[int, QueryParameter(ge=0, le=86400, description="seconds that the user rests")] = 0,
    quarantine: Annotated[str | None, QueryParameter(min_length=1, max_length=500, pattern=words.PLAIN)] = None,
    outcome: FromQuery[words.Outcome | None] = None,
) -> None:
    """Give the user back.

    `cooldown` lets it rest first; `quarantine` takes it out, with the reason, when the test found it broken. `outcome`
    tells how it went: a user whose locks end in `bad-login` again and again is quarantined.
    """
    owner = request.caller.owner
    if not await request.farm.locks.release(Release(id, cooldown, quarantine, owner, outcome, request.cause)):
        raise await request.farm.locks.not_held(id, owner)


# ---- With a lock: sessions and one-time codes, for its holder alone ------------------------------------------
# Each statement compares the lock: where that is not held nothing is done, and no row comes back.

LONGEST_SESSION = 256 * 1024  # bytes
SessionTtl = Annotated[int, QueryParameter(ge=1, le=2_592_000, description="seconds for which it is worth something")]
KEPT: dict[str, Any] = LOCKING | {"opt": {"scope": "locks", "limit": "what a session may have", "json": True}}


@put(
    "/locks/{id:uuid}/session", status_code=204, request_max_body_size=LONGEST_SESSION, **KEPT,
    raises=[problems.LockNotHeld, problems.NotSealed],
)  # fmt: skip
async def put_session(request: Call, id: Id, ttl: SessionTtl = 86400) -> None:
    """Keep what a test needs to be logged in: cookies, tokens, a browser's storage state.

    Any JSON of up to 256 KiB, for this user's next holders. It ends with its ttl, with a new password or login of the
    user, and when a quarantine begins.
    """
    session, farm, client = await request.any_json(), request.farm, request.caller.client
    keyring = farm.passwords.sealing()
    held = await farm.pool.fetchrow(SQL["get_lock"], id, client)
    if held:
        sealed = keyring.seal_as("session", held["user_id"], session)
        held = await farm.pool.fetchrow(SQL["put_session"], id, client, ttl, keyring.first, sealed)
    if held is None:
        raise await farm.locks.not_held(id, client)
    farm.events.log("session-stored", request.cause, held, ttl_seconds=ttl)


@get("/locks/{id:uuid}/session", **LOCKING, raises=[problems.LockNotHeld, problems.NoSession, problems.NotSealed])
async def get_session(request: Call, id: Id) -> Response[Any]:
    """The session of the user, byte for byte as it was stored."""
    farm, client = request.farm, request.caller.client
    keyring = farm.passwords.sealing()
    row = await farm.pool.fetchrow(SQL["get_session"], id, client)
    if row is None:
        raise await farm.locks.not_held(id, client)
    if row["sealed"] is None:
        raise problems.NoSession
    session = keyring.open_as("session", row["user_id"], row["key_id"], row["sealed"])
    farm.events.log("session-told", request.cause, row)
    headers = NO_STORE | {
        "ETag": f'"{hashlib.sha256(session).hexdigest()[:32]}"',
        "Last-Modified": format_datetime(row["stored_at"], usegmt=True),
        "Expires": format_datetime(row["session_until"], usegmt=True),
    }
    return Response(session, media_type=words.JSON, headers=headers)


@delete("/locks/{id:uuid}/session", **LOCKING, raises=[problems.LockNotHeld, problems.NotSealed])
async def delete_session(request: Call, id: Id) -> None:
    """Forget the session. Also when there is none."""
    farm, client = request.farm, request.caller.client
    farm.passwords.sealing()
    held = await farm.pool.fetchrow(SQL["delete_session"], id, client)
    if held is None:
        raise await farm.locks.not_held(id, client)
    farm.events.log("session-deleted", request.cause, held)


@post(
    "/locks/{id:uuid}/totp", status_code=200, tags=["locks"], opt={"scope": "locks", "bodiless": True},
    raises=[problems.LockNotHeld, problems.NoTotp, problems.CodeSpent, problems.NotSealed, problems.ShuttingDown],
)  # fmt: skip
async def give_code(request: Call, id: Id) -> Response[words.Code]:
    """Get a one-time code of the user.

    Each is given out once. Where the present one was given, or is about to end, the call waits for the next.
    """
    farm, client = request.farm, request.caller.client
    given = await spend_code(farm.pool, farm.passwords, farm.desk.stopping, id, client)
    if given is None:
        raise await farm.locks.not_held(id, client)
    row, code = given
    farm.events.log("code-told", request.cause, row)
    return reply(words.Code(code, row["valid_until"]), 200, NO_STORE)


@delete("/locks", status_code=200, **LOCKING)
async def release_holder(
    request: Call,
    holder: Annotated[str, QueryParameter(min_length=1, max_length=200, pattern=words.PLAIN)],
    project_id: FromQuery[uuid.UUID | None] = None,
) -> words.Released:
    """Give back everything that a holder holds: a CI job's last step."""
    farm, caller = request.farm, request.caller
    caller.check_project(project_id)
    rows = await farm.pool.fetch(SQL["release_holder"], holder, project_id, caller.owner, caller.projects)
    for row in rows:
        farm.events.ended("released", row, request.cause)
    farm.desk.freed()
    return words.Released(len(rows))


@delete("/users/{id:uuid}/lock", **FORCING, raises=[problems.UserNotFound, problems.UserLocked])
async def force_release(request: Call, id: Id) -> None:
    """End the lock of a user by force, whoever holds it. Also when nobody does.

    `user-locked` says that others take or change it in this very moment, again and again: try once more.
    """
    farm = request.farm
    for pause in (0, 0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4):
        await asyncio.sleep(pause)
        row = await farm.hot.fetchrow(SQL["force_release"], id)
        if row is None:
            raise problems.UserNotFound.of(id)
        if row["is_reached"]:
            break
    else:
        raise problems.UserLocked.contended(id)
    if row["lock_id"]:
        farm.events.ended("forced", row, request.cause)
    farm.desk.freed()


# ---- Tokens: RFC 6749, in whose form errors are told here ----------------------------------------------------

NOT_STORED = NO_STORE | {"Pragma": "no-cache"}


def refuse_token(request: Call, error: Exception) -> Response[words.TokenError]:
    """RFC 6749 section 5.2, also for what else goes wrong at /token."""
    match error:
        case problems.TokenRefusal():
            refused = error
        case problems.Overloaded():
            refused = problems.TokenRefusal("temporarily_unavailable", error.detail, 503, retry_after=1)
        case HTTPException():
            refused = problems.TokenRefusal("invalid_request", error.detail)
        case _:
            request.farm.events.database_failed("The database does not answer", error, request.cause)
            text = "The database does not answer; try again in a moment."
            refused = problems.TokenRefusal("temporarily_unavailable", text, 503, retry_after=1)
    request.farm.events.refused(refused.error)
    return reply(words.TokenError(refused.error, str(refused)), refused.status, NOT_STORED | refused.headers)


REFUSED_TOKEN = cast(
    "ExceptionHandlersMap", dict.fromkeys((problems.TokenRefusal, HTTPException, *DATABASE_FAULTS), refuse_token)
)


@post(
    "/token", status_code=200, tags=["service"], opt={"limit": "what a form may have"},
    request_max_body_size=LONGEST_FORM, exception_handlers=REFUSED_TOKEN,
)  # fmt: skip
async def issue_token(request: Call) -> Response[words.Token]:
    """Get a token.

    The client by HTTP Basic, or by `client_id` and `client_secret` in the form.
    """
    if request.scope["query_string"]:
        raise problems.TokenRefusal("invalid_request", "Parameters belong into the body, not into the query string.")
    form = read_form(request.header(b"content-type") or "", await request.body())
    address = request.client.host if request.client else ""
    token = await grant_token(cast("Gate", request.farm.gate), form, request.header(b"authorization"), address)
    return reply(token, 200, NOT_STORED)


# ---- Operations --------------------------------------------------------------------------------------------


@get("/livez", **ANYBODY)
async def livez() -> words.Health:
    """The process serves. Touches no database."""
    return words.Health("ok")


@get("/readyz", **ANYBODY, raises=[problems.DatabaseUnavailable])
async def readyz(request: Call) -> words.Health:
    """The database takes writes, and its schema and our rights in it are there."""
    pool = request.farm.pool
    ((can_write,),) = await pool.fetch(SQL["can_write"], timeout=3)
    if not can_write:
        await pool.look_anew()
        raise problems.DatabaseUnavailable("The database takes no writes: it is a standby, or set to read only.")
    if missing := set(MIGRATIONS).difference(await applied_migrations(pool)):
        text = f"The migration {min(missing)!r} is missing: run `python botfarm.py migrate`."
        raise problems.DatabaseUnavailable(text)
    if lacks := await pool.fetch(SQL["list_lacks"], timeout=3):
        raise problems.DatabaseUnavailable(f"The database lacks {lacks[0]['lack']}. {RIGHTS}")
    return words.Health("ok")


@get("/metrics", **ANYBODY, media_type="text/plain; version=1.0.0")
async def metrics(request: Call) -> bytes:
    """Numbers for Prometheus, over all workers of this start.

    Without the counts of users and of waiting calls where the database does not answer.
    """
    return await request.farm.exporter.text(None)


async def prune(farm: Farm) -> None:
    """Forget what is older than BOTFARM_HISTORY_DAYS, and what has ended, some rows at a time with pauses."""
    days = farm.settings.history_days
    for statement, *values in (("prune_history", days, 1000), ("prune_keys", days, 1000), ("prune_sessions", 100)):
        while await farm.pool.execute(SQL[statement], *values) == f"DELETE {values[-1]}":
            await asyncio.sleep(0.05)
    if farm.gate:
        await farm.pool.execute(SQL["prune_token_requests"])


async def repeat(farm: Farm, task: Callable[[], Awaitable[None]], name: str, seconds: float) -> None:
    """Run a task for ever, at jittered intervals; what fails is tried again at the next one."""
    while True:
        await asyncio.sleep(jittered(seconds))
        try:
            await task()
        except DATABASE_FAULTS as fault:
            farm.events.database_failed(f"{name} waits for the database", fault)
        except Exception:
            log.exception("%s failed; it goes on", name)


# ---- Pages -------------------------------------------------------------------------------------------------

DOCS = """<!doctype html><html lang="en"><meta charset="utf-8"><title>BotFarm API</title>
<link rel="stylesheet" href="/docs/assets/swagger-ui.css"><div id="ui"></div>
<script src="/docs/assets/swagger-ui-bundle.js"></script><script src="/docs/start.js"></script></html>"""

START = 'SwaggerUIBundle({url: "/docs/openapi.json", dom_id: "#ui", validatorUrl: null})'

# The dashboard as a browser reads it, and Swagger UI from our own origin. (Litestar's page for that has its script
# inside, which the policy forbids.)
DASHBOARD = [importlib.resources.files("farm") / f"dashboard.{kind}" for kind in ("html", "css", "js")]
HTML, CSS, JS = (file.read_text(encoding="utf-8") for file in DASHBOARD)
PAGES = {
    "/": ("text/html", HTML),
    "/dashboard.css": ("text/css", CSS),
    "/dashboard.js": ("text/javascript", JS),
    "/docs": ("text/html", DOCS),
    "/docs/start.js": ("text/javascript", START),
}
ASSETS = {file.name: file for file in (importlib.resources.files("swagger_ui") / "static").iterdir()}

# What the pages may load and where they may stand: their own files, and in no frame.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PAGE_HEADERS = {"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}
# Swagger UI styles by attributes.
DOCS_HEADERS = PAGE_HEADERS | {
    "Content-Security-Policy": POLICY.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")
}


@get([*PAGES], include_in_schema=False)
async def page(request: Call) -> Response[str]:
    path = request.scope["path_template"]
    media, text = PAGES[path]
    return Response(text, media_type=media, headers=DOCS_HEADERS if path == "/docs" else PAGE_HEADERS)


@get("/docs/assets/{name:str}", include_in_schema=False)
async def docs_asset(name: FromPath[str]) -> File:
    """A file of Swagger UI. (Litestar's own router for files answers a name that no file can have with a 500.)"""
    if name not in ASSETS:
        raise problems.NotFound.at(f"/docs/assets/{name}")
    return File(str(ASSETS[name]), filename=name, content_disposition_type="inline")  # by its name it has its type


@get("/docs/openapi.json", include_in_schema=False)
async def docs_openapi(request: Call) -> Response[Any]:
    return reply(request.app.state.openapi())


# ---- The app -----------------------------------------------------------------------------------------------


def calls_of(settings: Settings) -> list[HTTPRouteHandler]:
    calls = [
        create_user, list_users, import_users, export_users, get_user, update_user, delete_user, verify_password,
        quarantine_user, end_quarantine, list_history, list_pools, get_overview, acquire_lock, acquire_user,
        acquire_set, get_lock, extend_lock, release_lock, put_session, get_session, delete_session, give_code,
        release_holder, force_release, livez, readyz, metrics,
    ]  # fmt: skip
    return calls + ([issue_token] if settings.auth == "on" else [])


@contextmanager
def starting() -> Iterator[None]:
    """A start that fails without a bug says why in a line, and one that waits ends when it is told to.

    Litestar and uvicorn would each print a traceback, and uvicorn hears of a signal only when the start is over.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = {number: signal.signal(number, lambda *_: sys.exit(0)) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except (SchemaError, EmbeddedError, KeyFault, SystemExit, *DATABASE_FAULTS) as fault:
        if not isinstance(fault, SystemExit):
            log.error("%s", explained(fault, "DATABASE_URL") or fault)
        logging.getLogger("uvicorn.error").disabled = True
        raise
    finally:
        for number, handler in heard.items():
            signal.signal(number, handler)


@asynccontextmanager
async def running(app: Litestar) -> AsyncIterator[None]:
    """Everything that lives as long as the service."""
    settings: Settings = app.state.settings
    end_with_parent()
    async with contextlib.AsyncExitStack() as stack:
        with starting():
            if settings.listen_url:
                read_address(settings.listen_url.reveal(), "BOTFARM_LISTEN_URL")
            database = stack.enter_context(prepared(settings))
            keyring = keyring_of(run_apart(proven_keys(settings, database)))
        opened = partial(open_pool, database, pooler=settings.pooler)
        hot = await stack.enter_async_context(opened(4, "force_generic_plan"))
        pool = await stack.enter_async_context(opened(settings.pool_size, "force_custom_plan"))
        hot.kin = pool.kin = [hot, pool]
        passwords = Passwords(keyring)
        stack.callback(passwords.close)
        stack.callback(JOURNAL.flush)  # after the last words of what is closed below
        events = Events(JOURNAL if settings.log == "events" else None)
        gate = Gate(pool, cast("Secret", settings.signing_keys)) if settings.auth == "on" else None
        if gate:
            stack.callback(gate.close)
        app.state.farm = farm = Farm(settings, hot, pool, passwords, events, gate)
        tasks = [asyncio.create_task(job) for job in jobs_of(farm, database)]
        on_stop(farm.desk.close)
        collect_seldom()
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=0.5)  # bounded: a driver may swallow a cancellation
            await farm.locks.settle()


def jobs_of(farm: Farm, database: str) -> list[Coroutine[Any, Any, None]]:
    """What runs beside the calls. Nothing depends on it but the waiters."""
    jobs: list[Coroutine[Any, Any, None]] = [
        repeat(farm, farm.locks.sweep, "sweep", 1),
        repeat(farm, partial(prune, farm), "prune", 60),
    ]
    jobs += [farm.desk.run(), farm.desk.announce(), farm.exporter.keep_told()]
    if farm.settings.listen_url or farm.settings.pooler == "off":
        url = farm.settings.listen_url
        jobs.append(listen(farm.desk, url.reveal() if url else database))
    if farm.gate:
        jobs.append(repeat(farm, partial(farm.gate.refresh, None), "the look at the clients", farm.gate.REFRESH))
    return jobs


def collect_seldom() -> None:
    """What is there now stays: without freeze the collector walks over all of it again and again, in pauses of 40 ms.

    (p99 of a cycle at 64 connections: 36 -> 10 ms.)
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


def cors_of(settings: Settings) -> CORSConfig | None:
    """Which pages of other origins may call: none, unless set."""
    if not settings.cors_origins:
        return None
    sent = ["Authorization", "Content-Type", "Idempotency-Key", "If-None-Match", "X-Request-Id", "traceparent"]
    read = ["ETag", "Location", "Retry-After", "WWW-Authenticate", "X-Request-Id", "traceparent"]
    return CORSConfig(allow_origins=list(settings.cors_origins), allow_headers=sent, expose_headers=read)


def create_app(settings: Settings) -> Litestar:
    """The service as an ASGI application."""
    return Litestar(
        route_handlers=[*calls_of(settings), page, docs_asset, docs_openapi],
        lifespan=[running],
        state=State({"settings": settings, "openapi": partial(openapi_document, settings, tuple(calls_of(settings)))}),
        request_class=Call,
        before_request=cast("BeforeRequestHookHandler", enter),
        before_send=[echo],
        exception_handlers=cast("ExceptionHandlersMap", {HTTPException: refuse, Exception: fail}),
        openapi_config=None,
        logging_config=None,
        request_max_body_size=settings.max_body,
        cors_config=cors_of(settings),
    )


def __getattr__(name: str) -> Litestar:
    """`uvicorn botfarm:app`: the application is made when it is asked for, not when the module is imported."""
    if name == "app":
        try:
            settings = Settings.load()
        except BadSettings as fault:  # uvicorn would show them below 30 lines of traceback
            sys.exit(str(fault))
        if not logging.getLogger().handlers:
            log_as_lines(settings.log == "events")
        return create_app(settings)
    raise AttributeError(name)
